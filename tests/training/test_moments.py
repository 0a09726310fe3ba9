"""Moments in fewer bytes: what a code keeps, and that training with them is nearly the same."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.core.batch import Batch
from jaxllm.models.build import abstract_params
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.training.config import AdamW, Muon, StepConfig
from jaxllm.training.feed import place
from jaxllm.training.moments import block_size, dequantise, quantise, scale_by_compact_adam
from jaxllm.training.optim import optimizer
from jaxllm.training.state import init_state
from jaxllm.training.step import compile_step

TOKENS = np.random.default_rng(0).integers(0, 64, (8, 17)).astype(np.int32)
ONES, PLACES = np.ones((8, 16), np.int32), np.tile(np.arange(16, dtype=np.int32), (8, 1))
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:], ONES.astype(np.float32), ONES, PLACES)
WIDE = ModelConfig(vocab_size=64, d_model=64, n_layers=2, n_heads=4, d_ff=128, max_seq_len=32)


@pytest.mark.parametrize(("square", "worst"), [(False, 0.07), (True, 0.057)])
def test_a_code_keeps_sign_and_share_of_the_largest_of_its_block(square, worst):
    generator = np.random.default_rng(0)
    x = jnp.asarray(generator.normal(size=(3, 512)) * 2.0 ** generator.uniform(-15, 5, (3, 512)), jnp.float32)
    x = (jnp.square(x) if square else x).at[1, :256].set(0.0)
    codes, scale = quantise(x, square=square)
    assert codes.dtype == (jnp.uint8 if square else jnp.int8) and codes.shape == x.shape and scale.shape == (3, 2)
    kept = dequantise(codes, scale, square=square)
    np.testing.assert_array_equal(jnp.max(jnp.abs(kept[0, :256])), jnp.max(jnp.abs(x[0, :256])))
    np.testing.assert_array_equal(kept[1, :256], 0)
    in_range = jnp.abs(x) > 2.0 ** (-39 if square else -23) * jnp.repeat(scale, 256, axis=-1)
    assert float(jnp.max(jnp.where(in_range, jnp.abs(kept / x - 1), 0.0))) < worst
    assert not square or bool(jnp.all((kept > 0) == (x > 0)))  # nothing is divided by zero that was not zero
    np.testing.assert_array_equal(quantise(0.5 * kept, square=square)[0], codes)  # a decay of all is exact


def test_blocks_divide_the_last_axis():
    assert [block_size(length) for length in (64, 256, 300, 11008, 509, 1376)] == [64, 256, 150, 256, 509, 172]


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_directions_are_those_of_adam(kind):
    params = {"a": jnp.zeros((16, 512)), "embed": {"table": jnp.zeros((16, 512))}, "scale": jnp.zeros(5)}
    ours, exact = scale_by_compact_adam(0.9, 0.95, 1e-8, kind), optax.scale_by_adam(0.9, 0.95, 1e-8)
    state, expected_state = ours.init(params), exact.init(params)
    for number in range(20):
        gradient = jax.tree.map(lambda x, n=number: jax.random.normal(jax.random.key(n), x.shape) + 0.3, params)
        direction, state = ours.update(gradient, state)
        expected, expected_state = exact.update(gradient, expected_state)
    apart = jax.tree.map(lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)), direction, expected)
    assert 0 < apart["a"] < (0.01 if kind == "bfloat16" else 0.1), apart
    if kind == "int8":  # embeddings and small arrays are exact
        assert max(apart["embed"]["table"], apart["scale"]) < 1e-5
    width = {"bfloat16": 2, "int8": 1}[kind]
    assert (state.mu["a"].dtype.itemsize, state.nu["a"].dtype.itemsize) == (width, width)


def test_training_is_nearly_the_same_on_one_device_and_on_many():
    def losses(optim, mesh_config, devices):
        mesh = make_mesh(mesh_config, jax.devices()[:devices])
        with jax.set_mesh(mesh):
            state, shardings = init_state(WIDE, optimizer(optim), mesh, seed=0)
            update = compile_step(WIDE, ComputeConfig(dtype="float32", layers="scan"), optim, StepConfig(), shardings)
            found = []
            for _ in range(8):
                state, metrics = update(state, place(BATCH, mesh), optim.lr)
                found.append(float(metrics["loss"]))
        return found, sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)), state

    optim = AdamW(lr=1e-2, moments="int8")
    found, size, _ = losses(optim, MeshConfig(), 1)
    expected, whole, _ = losses(AdamW(lr=1e-2), MeshConfig(), 1)
    np.testing.assert_allclose(found, expected, rtol=0.02)
    assert found[-1] < found[0] - 0.5 and size < 0.75 * whole
    spread, _, many = losses(optim, MeshConfig(data=2, fsdp=2, tensor=2), 8)
    np.testing.assert_allclose(spread, found, rtol=1e-3)
    up = many.opt_state[1].mu["blocks"]["ffn"]["up"]["kernel"]
    assert up.dtype == jnp.int8 and up.addressable_shards[0].data.size == up.size // 8


def test_muon_keeps_its_momentum_in_two_bytes():
    state = jax.eval_shape(optimizer(Muon(moments="bfloat16")).init, abstract_params(WIDE))
    widths = [leaf.dtype.itemsize for leaf in jax.tree.leaves(state) if leaf.ndim == 3]
    assert widths.count(2) == 3 and 4 not in widths, widths


def test_bfloat16_moments_with_a_long_memory_are_refused():
    with pytest.raises(
        ValueError, match=r"loses changes below 1/256 of a number, and b2=0.999 makes only such; set b2"
    ):
        AdamW(moments="bfloat16", b2=0.999)
