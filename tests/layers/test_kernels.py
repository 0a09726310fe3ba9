import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.layers import kernels
from jaxllm.layers.masks import CacheMask, CausalMask


def reference(q, k, v, visible):
    """softmax(q k^T / sqrt(H)) v in float64 NumPy, head by head."""
    out = np.zeros(q.shape)
    group = q.shape[2] // k.shape[2]
    for n in range(q.shape[2]):
        scores = np.einsum("bth,bsh->bts", q[:, :, n], k[:, :, n // group]) / np.sqrt(q.shape[-1])
        scores = np.where(visible, scores, -np.inf)
        probs = np.exp(scores - scores.max(-1, keepdims=True))
        out[:, :, n] = np.einsum("bts,bsh->bth", probs / probs.sum(-1, keepdims=True), v[:, :, n // group])
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
