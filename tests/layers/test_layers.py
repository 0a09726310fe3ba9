import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxllm.layers.config import Rope
from jaxllm.layers.ffn import Ffn, Gated, Plain
from jaxllm.layers.linear import Projection, param
from jaxllm.layers.norms import LayerNorm, Norm, RMSNorm
from jaxllm.layers.positions import rope_angles, rotate
from jaxllm.sharding import shards

X = np.random.default_rng(0).normal(size=(2, 3, 8)).astype(np.float32)


def test_rms_norm_formula():
    norm = Norm(RMSNorm(eps=1e-6), 8)
    norm.scale[...] = jnp.arange(8.0)
    expected = X / np.sqrt((X**2).mean(-1, keepdims=True) + 1e-6) * np.arange(8.0)
    np.testing.assert_allclose(norm(X), expected, atol=1e-6)


def test_layer_norm_formula():
    norm = Norm(LayerNorm(eps=1e-5), 8)
    norm.scale[...], norm.bias[...] = jnp.arange(8.0), jnp.ones(8)
    expected = (X - X.mean(-1, keepdims=True)) / np.sqrt(X.var(-1, keepdims=True) + 1e-5) * np.arange(8.0) + 1
    np.testing.assert_allclose(norm(X), expected, atol=1e-5)


def test_norm_reduces_bfloat16_in_float32():
    large = jnp.full((1, 1, 512), 3.0, jnp.bfloat16)
    np.testing.assert_allclose(Norm(RMSNorm(), 512)(large).astype(np.float32), 1.0, atol=1e-2)


def test_rope_scores_depend_on_distance_alone():
    q, k = (jnp.asarray(np.random.default_rng(i).normal(size=(1, 1, 1, 8)), jnp.float32) for i in (1, 2))

    def score(query_position, key_position):
        turn = lambda x, p: rotate(x, rope_angles(jnp.array([[p]]), 8, Rope()))
        return jnp.sum(turn(q, query_position) * turn(k, key_position))

    np.testing.assert_allclose(score(7, 3), score(104, 100), rtol=1e-4)
    np.testing.assert_allclose(score(0, 0), jnp.sum(q * k), rtol=1e-6)


@pytest.mark.parametrize("width", [128, 32])  # all of a head, or the first part of it
def test_rope_by_a_product_is_rope_and_its_gradient_too(width, monkeypatch):
    x = jax.random.normal(jax.random.key(0), (2, 8, 3, 128), jnp.bfloat16)
    angles = rope_angles(jnp.arange(16).reshape(2, 8) * 37, width, Rope())

    def both(platform):
        monkeypatch.setattr(shards, "platform", lambda: platform)
        return jax.vjp(lambda x: rotate(x, angles), x)

    (plain, back), (turned, back_turned) = both("cpu"), both("tpu")
    np.testing.assert_array_equal(plain.astype(np.float32), turned.astype(np.float32))
    np.testing.assert_array_equal(*(f(x)[0].astype(np.float32) for f in (back, back_turned)))


def test_rope_literal_quarter_turn():
    # One pair, first frequency 1: position pi/2 turns (1, 0) to (0, 1).
    x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    angles = (jnp.cos(jnp.pi / 2).reshape(1, 1, 1, 1), jnp.sin(jnp.pi / 2).reshape(1, 1, 1, 1))
    np.testing.assert_allclose(rotate(x, angles)[0, 0, 0], [0.0, 1.0], atol=1e-6)


@pytest.mark.parametrize("batch", [(2, 3), (1, 1)])  # a single row has a product of its own
@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [({"embed": 4}, {"heads": 2, "head_dim": 3}), ({"heads": 2, "head_dim": 2}, {"embed": 5})],
)
def test_gradients_of_a_projection_are_those_of_the_product(inputs, outputs, batch):
    projection = Projection(nnx.Rngs(0), inputs, outputs, std=1.0)
    x = jax.random.normal(jax.random.key(1), (*batch, *inputs.values()))
    kernel = projection.kernel[...]

    structure, _ = nnx.split(projection)
    ours = lambda x, kernel: jnp.sum(jnp.sin(nnx.merge(structure, {"kernel": kernel})(x)))
    plain = lambda x, kernel: jnp.sum(jnp.sin(jnp.tensordot(x, kernel, axes=len(inputs))))
    np.testing.assert_allclose(ours(x, kernel), plain(x, kernel), atol=1e-5)
    expected = jax.grad(plain, (0, 1))(x, kernel)
    for a, b in zip(jax.grad(ours, (0, 1))(x, kernel), expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("config", [Gated(), Plain(activation="relu")])
def test_ffn_formula(config):
    ffn = Ffn(nnx.Rngs(0), config, d_model=8, d_ff=16, bias=True)
    up = X @ ffn.up.kernel[...]
    hidden = jax.nn.silu(X @ ffn.gate.kernel[...]) * up if isinstance(config, Gated) else jnp.maximum(up, 0)
    np.testing.assert_allclose(ffn(X), hidden @ ffn.down.kernel[...], atol=1e-6)


def test_every_dimension_needs_an_axis_name():
    with pytest.raises(ValueError, match="name every dimension"):
        param(nnx.Rngs(0), (2, 3), ("embed",), 0.02)
