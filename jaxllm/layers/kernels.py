"""The inner product of attention: softmax(q k / sqrt(H)) v under a mask, written for XLA.

Kernels take grouped heads, never repeat keys, and reduce in float32.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jaxllm.layers.cache import LayerCache
from jaxllm.layers.masks import CacheMask, CausalMask

# Finite, because a row without any visible key (padding) would turn to NaN with -inf, in the gradient as well.
HIDDEN = -1e30

# Causal rows are cut into about four blocks of queries of 64 to 128 rows; long rows get at most 16 blocks, so that the
# program does not grow with the sequence. Measured on CPU.
MIN_BLOCK, MAX_BLOCK, BLOCKS, MAX_BLOCKS = 64, 128, 4, 16


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: CausalMask
) -> Float[Array, "B T N H"]:
    """Return the attention output of whole rows.

    Each block of queries only meets the keys up to its own end: half of the work of a full square, and exactly the same
    sums for what is visible.
    """
    q = rearrange(q, "B T (K G) H -> B K G T H", K=k.shape[2])
    k, v = (rearrange(x, "B S K H -> B K S H") for x in (k, v))
    outputs = []
    for start, stop in query_blocks(q.shape[3]):
        visible = mask.dense(slice(start, stop), slice(0, stop))
        outputs.append(_attend_block(q[:, :, :, start:stop], k[:, :, :stop], v[:, :, :stop], visible))
    return rearrange(jnp.concatenate(outputs, axis=3), "B K G T H -> B T (K G) H")


def query_blocks(length: int) -> list[tuple[int, int]]:
    """Return (start, stop) of each block of queries: 300 -> (0, 75), (75, 150), (150, 225), (225, 300)."""
    block = max(min(max(length // BLOCKS, MIN_BLOCK), MAX_BLOCK), -(-length // MAX_BLOCKS))
    return [(start, min(start + block, length)) for start in range(0, length, block)]


@jax.custom_vjp
def _attend_block(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """Attention of one block; q is [B, K, G, T, H], k and v are [B, K, S, H], `visible` is bool [B or 1, T, S].

    With e = exp(q k^T / sqrt(H) - max), r = 1 / sum_s e and o = r (e v), the gradient is, for p = r e,
    dv = p^T do and d(q k^T) = p (do v^T - sum_h(do o)) / sqrt(H): the softmax's sum over the keys becomes one over the
    H values of a head. Source: Dao et al. 2022 (FlashAttention), appendix B.2.
    """
    return _block_forward(q, k, v, visible)[0]


def _block_forward(q: Array, k: Array, v: Array, visible: Array) -> tuple[Array, tuple[Array, ...]]:
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(visible[:, None, None, :, :], scores, HIDDEN)
    weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
    r = 1.0 / jnp.sum(weights, axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    y = (jnp.einsum("bkgts,bksh->bkgth", weights, v, preferred_element_type=jnp.float32) * r).astype(v.dtype)
    return y, (q, k, v, weights, r, y)


def _block_backward(residuals: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, weights, r, y = residuals
    dy = (dy.astype(jnp.float32) * r).astype(v.dtype)
    inner = jnp.einsum("bkgth,bkgth->bkgt", dy, y, preferred_element_type=jnp.float32)[..., None]
    dv = jnp.einsum("bkgts,bkgth->bksh", weights, dy)
    dscores = jnp.einsum("bkgth,bksh->bkgts", dy, v, preferred_element_type=jnp.float32)
    dscores = (weights * (dscores - inner) * q.shape[-1] ** -0.5).astype(q.dtype)
    dq = jnp.einsum("bkgts,bksh->bkgth", dscores, k)
    return dq, jnp.einsum("bkgts,bkgth->bksh", dscores, q), dv, None


_attend_block.defvjp(_block_forward, _block_backward)


def attend_cache(q: Float[Array, "B T N H"], cache: LayerCache, mask: CacheMask) -> Array:
    """Return the attention output of new tokens over all that `cache` holds, [B, T, N, H]."""
    batch, length, n_heads, head_dim = q.shape
    rows, slots, _ = cache.keys.shape
    shape = (batch, length, rows // batch, n_heads * batch // rows, head_dim)
    q = jnp.swapaxes(q.reshape(shape), 1, 2).reshape(rows, -1, head_dim)  # [R, T * G, H]
    keys, values = cache.keys.astype(q.dtype), cache.values.astype(q.dtype)
    scores = jnp.einsum("rqh,rsh->rqs", q, keys, preferred_element_type=jnp.float32) * head_dim**-0.5
    scores = scores.reshape(batch, shape[2], length, shape[3], slots)
    visible = mask.dense(slice(0, length), slice(0, slots))[:, None, :, None, :]
    probs = jax.nn.softmax(jnp.where(visible, scores, HIDDEN), axis=-1).astype(q.dtype).reshape(rows, -1, slots)
    # The order of the operands is the layout of the product; jnp.einsum would swap them and transpose the cache.
    y = jax.lax.dot_general(probs, values, (((2,), (1,)), ((0,), (0,))))
    y = jnp.swapaxes(y.reshape(batch, shape[2], length, shape[3], head_dim), 1, 2)
    return y.reshape(batch, length, n_heads, head_dim)
