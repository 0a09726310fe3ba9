import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.layers import kernels
from jaxllm.layers.cache import LayerCache
from jaxllm.layers.masks import CacheMask, CausalMask


def reference(q, k, v, visible, sinks=None):
    """softmax(q k^T / sqrt(H)) v in float64 NumPy, head by head; a sink is a key of this score without a value."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for n in range(q.shape[2]):
        scores = np.einsum("bth,bsh->bts", q[:, :, n], k[:, :, n // group]) / np.sqrt(q.shape[-1])
        scores = np.where(visible, scores, -np.inf)
        if sinks is not None:
            scores = np.concatenate([scores, np.full((*scores.shape[:2], 1), sinks[n])], axis=-1)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        probs = (probs / probs.sum(-1, keepdims=True))[..., : k.shape[1]]
        out[:, :, n] = np.einsum("bts,bsh->bth", probs, v[:, :, n // group])
    return out


def inputs(length, n_heads=4, n_kv_heads=2, width=8, batch=2):
    shapes = ((batch, length, n_heads, width), (batch, length, n_kv_heads, width), (batch, length, n_kv_heads, width))
    generator = np.random.default_rng(0)
    return [generator.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("length", [5, 128, 129, 300])
def test_blocks_equal_the_full_square_with_segments(length):
    q, k, v = inputs(length)
    segments = np.sort(np.random.default_rng(1).integers(1, 4, (2, length)))
    visible = (np.tri(length, dtype=bool)) & (segments[:, :, None] == segments[:, None, :])
    out = kernels.attend(q, k, v, CausalMask(jnp.asarray(segments)))
    np.testing.assert_allclose(out, reference(q, k, v, visible), atol=2e-6)


SINKS = np.array([-30.0, 0.5, 3.0, 40.0], np.float32)  # the first takes nothing, the last all


@pytest.mark.parametrize(("length", "window"), [(5, None), (129, 9)])
def test_a_sink_takes_its_share_of_the_softmax(length, window):
    q, k, v = inputs(length)
    visible = np.tri(length, dtype=bool)[None] & ~np.tri(length, k=-(window or length), dtype=bool)[None]
    expected = reference(q, k, v, visible, SINKS)
    np.testing.assert_allclose(kernels.attend(q, k, v, CausalMask(window=window), sinks=SINKS), expected, atol=2e-6)
    rows = lambda x: jnp.moveaxis(x, 2, 1).reshape(-1, length, x.shape[-1])  # as a cache has them
    positions = jnp.tile(jnp.arange(length), (2, 1))
    cached = kernels.attend_cache(q, LayerCache(rows(k), rows(v)), CacheMask(positions, window), sinks=SINKS)
    np.testing.assert_allclose(cached, expected, atol=2e-6)


def test_the_gradient_with_a_sink_is_that_of_a_softmax_with_one_more_score():
    q, k, v = (jnp.asarray(x) for x in inputs(70))
    hidden = jnp.where(np.tri(70, dtype=bool), 0.0, kernels.HIDDEN)[None, None]

    def plain(q, k, v, sinks):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / 8**0.5 + hidden
        sunk = jnp.broadcast_to(sinks[None, :, None, None], (2, 4, 70, 1))
        probs = jax.nn.softmax(jnp.concatenate([scores, sunk], axis=-1), axis=-1)[..., :-1]
        return jnp.einsum("bnts,bsnh->btnh", probs, v)

    ours = lambda q, k, v, sinks: kernels.attend(q, k, v, CausalMask(), sinks=sinks)
    sinks = jnp.array([-2.0, 0.5, 1.0, 3.0])
    gradient = lambda function: jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), (0, 1, 2, 3))(q, k, v, sinks)
    for found, expected in zip(gradient(ours), gradient(plain), strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-6 * np.abs(expected).max() + 1e-6)


def test_padding_rows_without_keys_stay_finite():
    q, k, v = inputs(6)
    segments = jnp.array([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    gradient = jax.grad(lambda q: jnp.sum(kernels.attend(q, k, v, CausalMask(segments)) ** 2))(q)
    assert np.isfinite(gradient).all()


def test_causal_mask_literal():
    mask = CausalMask(jnp.array([[1, 1, 2, 2]])).dense(slice(0, 4), slice(0, 4))
    np.testing.assert_array_equal(mask[0].astype(int), [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]])


def test_cache_mask_literal():
    mask = CacheMask(jnp.array([[2, 3], [0, 1]])).dense(slice(0, 2), slice(0, 5))
    np.testing.assert_array_equal(
        mask.astype(int), [[[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]]
    )
