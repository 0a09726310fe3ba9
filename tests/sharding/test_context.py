"""Rows that devices share: twenty updates equal those of one device, and a row of a million tokens compiles."""

import functools
import math
import re

import jax
import numpy as np
import pytest

from jaxllm.core.batch import Batch
from jaxllm.layers.config import Learned, SlidingWindow
from jaxllm.models.build import abstract_params, bind, graph
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.training.config import AdamW, StepConfig
from jaxllm.training.feed import place
from jaxllm.training.optim import optimizer
from jaxllm.training.state import init_state
from jaxllm.training.step import compile_step, loss_sums

ROWS, LENGTH, STEPS = 4, 16, 20
SHAPE = {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 32, "max_seq_len": LENGTH}
SHAPE |= {"init_std": 0.2}
MIXED = ModelConfig(
    **SHAPE, n_kv_heads=2, window=SlidingWindow(size=5, layers=(True, False)), score_softcap=5.0, sinks=True
)
LEARNED = ModelConfig(**SHAPE, positions=Learned(), bias=True, tie_embeddings=True)
ADAMW = AdamW(lr=3e-3, eps=1e-3)  # a large eps: where a gradient is zero, its sign is a matter of rounding
CASES = {
    "windows": (MIXED, MeshConfig(data=2, context=2, tensor=2), {"remat": "full"}),
    "fsdp": (LEARNED, MeshConfig(fsdp=2, context=4, data=1), {"remat": "dots", "accumulate": 2}),
}


def rows(seed):
    """Rows of two documents each and of padding, which end anywhere in the parts of the devices."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 32, (ROWS, LENGTH + 1)).astype(np.int32)
    cut, end = generator.integers(1, 9, (ROWS, 1)), LENGTH - generator.integers(0, 5, (ROWS, 1))
    at = np.arange(LENGTH)[None]
    segments = np.where(at < cut, 1, np.where(at < end, 2, 0)).astype(np.int32)
    positions = np.where(segments == 2, at - cut, at * (segments == 1)).astype(np.int32)
    chosen = generator.random((ROWS, LENGTH)) < np.linspace(0.2, 0.9, ROWS)[:, None]
    return Batch(tokens[:, :-1], tokens[:, 1:], (chosen & (segments > 0)).astype(np.float32), segments, positions)


@functools.cache
def run(model, mesh, accumulate=1, remat="none", layers="scan"):
    """Return (metrics of each update, parameters, logits of the first batch before it)."""
    n_devices = 1 if mesh == MeshConfig() else 8
    mesh = make_mesh(mesh, jax.devices()[:n_devices])
    compute = ComputeConfig(dtype="float32", layers=layers, remat=remat, loss_chunk=3)
    step = StepConfig(accumulate=accumulate)
    with jax.set_mesh(mesh):
        state, shardings = init_state(model, optimizer(ADAMW), mesh, seed=0)
        on_mesh = lambda seed: jax.tree.map(lambda x: place(x, mesh), rows(seed))
        logits = jax.jit(lambda params, x: bind(graph(model, compute)[0], params)(x.tokens, x.segments, x.positions))
        before = np.asarray(logits(state.params, on_mesh(0)))
        update, history = compile_step(model, compute, ADAMW, step, shardings), []
        for number in range(STEPS):
            state, metrics = update(state, on_mesh(number % 2), ADAMW.lr)
            history.append({key: float(value) for key, value in metrics.items()})
        return history, jax.device_get(state.params), before


@pytest.mark.parametrize(("model", "mesh", "how"), CASES.values(), ids=CASES)
def test_twenty_updates_are_those_of_one_device(model, mesh, how):
    history, params, logits = run(model, mesh, **how)
    expected, wanted, plain = run(model, MeshConfig())
    real = rows(0).segments > 0
    np.testing.assert_allclose(logits[real], plain[real], atol=2e-5)
    assert expected[-1]["loss"] < expected[1]["loss"] - 0.1
    for found, one in zip(history, expected, strict=True):
        assert found == pytest.approx(one, rel=1e-4)
    jax.tree.map(lambda found, one: np.testing.assert_allclose(found, one, atol=1e-4), params, wanted)


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=1, context=4, tensor=2)], ids=["one", "shared"])
def test_nothing_of_a_row_of_a_million_tokens_grows_with_its_square(mesh):
    length = 2**20
    model = ModelConfig(**SHAPE | {"max_seq_len": length})
    compute = ComputeConfig(dtype="float32", layers="scan", remat="full", loss_chunk=1024)
    with jax.set_mesh(make_mesh(mesh, jax.devices()[: 8 if mesh.context > 1 else 1])):
        of_type = lambda dtype: jax.ShapeDtypeStruct((1, length), dtype)
        batch = Batch(*(of_type(dtype) for dtype in ("int32", "int32", "float32", "int32", "int32")))
        gradient = jax.grad(lambda params, batch: loss_sums(params, batch, model, compute)[0])
        program = str(jax.make_jaxpr(gradient)(abstract_params(model), batch))
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"\[([\d,]+)\]", program)}
    assert max(math.prod(shape) for shape in shapes) <= 2 * length * SHAPE["d_ff"]
