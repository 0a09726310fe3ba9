import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.sharding.config import MeshConfig
from jaxllm.sharding.mesh import make_mesh
from jaxllm.sharding.rules import named_sharding
from jaxllm.training.losses import chunks, cross_entropy

GENERATOR = np.random.default_rng(0)
HIDDEN = GENERATOR.normal(size=(2, 12, 8)).astype(np.float32)
TABLE = GENERATOR.normal(size=(31, 8)).astype(np.float32)
TARGETS = GENERATOR.integers(0, 31, (2, 12))
WEIGHTS = (GENERATOR.random((2, 12)) < 0.6).astype(np.float32) * 0.5


def plain(hidden, table, z, smoothing=0.0):
    targets, weights = TARGETS[:, : hidden.shape[1]], WEIGHTS[:, : hidden.shape[1]]
    logits = hidden @ table.T
    log_z = jax.nn.logsumexp(logits, axis=-1)
    nats = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = (1 - smoothing) * nats + smoothing * (log_z - jnp.mean(logits, axis=-1)) + z * log_z**2
    return jnp.sum(weights * loss), jnp.sum(weights * nats)


@pytest.mark.parametrize(
    ("length", "chunk"), [(12, 1), (12, 4), (12, 5), (12, 12), (12, 512), (11, 2), (11, 4), (7, 6)]
)
@pytest.mark.parametrize(("z", "smoothing"), [(0.0, 0.0), (0.01, 0.0), (0.01, 0.1)])
def test_value_and_gradients_equal_the_formula(length, chunk, z, smoothing):
    hidden, rows = HIDDEN[:, :length], (TARGETS[:, :length], WEIGHTS[:, :length])
    chunked = lambda h, m: cross_entropy(h, m, *rows, z, chunk, None, smoothing)
    ours = jax.jit(jax.value_and_grad(chunked, (0, 1), has_aux=True))(hidden, TABLE)
    expected = jax.value_and_grad(lambda h, m: plain(h, m, z, smoothing), (0, 1), has_aux=True)(hidden, TABLE)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), ours, expected)
    np.testing.assert_allclose(jax.jit(chunked)(hidden, TABLE), plain(hidden, TABLE, z, smoothing), rtol=1e-5)


@pytest.mark.parametrize(("length", "count", "size"), [(1024, 2, 512), (1021, 2, 511), (1025, 3, 342), (100, 1, 100)])
def test_a_prime_length_is_padded_and_not_cut_to_pieces(length, count, size):
    shapes = jax.eval_shape(lambda x: chunks((x,), 512), jax.ShapeDtypeStruct((3, length, 8), np.float32))
    assert shapes[0].shape == (count, 3, size, 8)
    program = str(jax.make_jaxpr(lambda x: chunks((x,), 512))(jax.ShapeDtypeStruct((3, length, 8), np.float32)))
    assert ("pad" in program) == (count * size != length)


def test_gradient_scales_with_the_cotangent():
    tenth = jax.grad(lambda h: cross_entropy(h, TABLE, TARGETS, WEIGHTS, 0.0, 4)[0] / 10)(HIDDEN)
    whole = jax.grad(lambda h: cross_entropy(h, TABLE, TARGETS, WEIGHTS, 0.0, 4)[0])(HIDDEN)
    np.testing.assert_allclose(10 * tenth, whole, rtol=1e-5)


def test_tokens_of_weight_zero_have_no_gradient():
    gradient = jax.grad(lambda h: cross_entropy(h, TABLE, TARGETS, WEIGHTS, 0.01, 4)[0])(HIDDEN)
    assert np.all(np.asarray(gradient)[WEIGHTS == 0] == 0)


def test_no_array_of_all_logits_exists():
    program = (
        jax.jit(jax.grad(lambda h: cross_entropy(h, TABLE, TARGETS, WEIGHTS, 0.0, 2)[0]))
        .lower(HIDDEN)
        .compile()
        .as_text()
    )
    assert "f32[2,12,31]" not in program and "f32[6,2,2,31]" not in program


@pytest.mark.parametrize(
    "mesh", [{"data": 4, "tensor": 2}, {"fsdp": 2, "context": 4}, {"data": 2, "fsdp": 2, "expert": 2}, {"stage": 8}]
)
@pytest.mark.parametrize(("z", "smoothing", "cap"), [(0.01, 0.1, None), (0.0, 0.0, 3.0)])
def test_devices_sum_the_gradient_of_the_table_once_after_the_last_chunk(mesh, z, smoothing, cap):
    rng = np.random.default_rng(1)
    batch, vocabulary, width = (8, 16), 34, 10
    hidden = rng.normal(size=(*batch, width)).astype(np.float32)
    table = rng.normal(size=(vocabulary, width)).astype(np.float32)
    targets, weights = rng.integers(0, vocabulary, batch), rng.random(batch).astype(np.float32)
    both = jax.value_and_grad(lambda h, m: cross_entropy(h, m, targets, weights, z, 2, cap, smoothing)[0], (0, 1))
    on_one = jax.jit(both)(hidden, table)
    found = make_mesh(MeshConfig(**{"data": 1, **mesh}), jax.devices())
    with jax.set_mesh(found):
        rows = named_sharding(found, ("rows", "length", None), hidden.shape)
        program = jax.jit(both, in_shardings=(rows, None)).lower(hidden, table).compile()
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), program(hidden, table), on_one
        )
    sums = re.findall(r" = ([^=]*) (?:all-reduce|reduce-scatter)\(.*op_name=\"(.*?)\"", program.as_text())
    sizes = {str(width), str(vocabulary // mesh.get("tensor", 1))}
    of_table = [
        name for shapes, name in sums for shape in re.findall(r"\[(.*?)\]", shapes) if sizes <= set(shape.split(","))
    ]
    assert of_table and not [name for name in of_table if "while/body" in name]
