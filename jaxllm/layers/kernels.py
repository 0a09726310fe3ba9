"""The inner product of attention: softmax(q k / sqrt(H)) v under a mask, written for XLA.

Kernels take grouped heads, never repeat keys, and reduce in float32.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.layers.cache import LayerCache
from jaxllm.layers.masks import CacheMask, CausalMask, Mask

# Finite, because a row without any visible key (padding) would turn to NaN with -inf, in the gradient as well.
HIDDEN = -1e30

# Query rows per block of the causal kernel. 128 was the best of 64 ... 512 on CPU; long rows get at most 16 blocks, so
# that the program does not grow with the sequence.
BLOCK_LENGTH = 128
MAX_BLOCKS = 16


def attend(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Mask) -> Array:
    """Return the attention output, [B, T, N, H].

    Causal rows are cut into blocks of queries that only meet the keys up to their own end: half of the work of a full
    square, and exactly the same sums for what is visible.
    """
    length = q.shape[1]
    if not isinstance(mask, CausalMask) or length <= BLOCK_LENGTH:
        return _attend_block(q, k, v, mask.dense(slice(0, length), slice(0, k.shape[1])))
    block = max(BLOCK_LENGTH, -(-length // MAX_BLOCKS))
    outputs = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        visible = mask.dense(slice(start, stop), slice(0, stop))
        outputs.append(_attend_block(q[:, start:stop], k[:, :stop], v[:, :stop], visible))
    return jnp.concatenate(outputs, axis=1)


def _attend_block(q: Array, k: Array, v: Array, visible: Array) -> Array:
    """Attention of one block; `visible` is bool [B or 1, T, S]."""
    batch, length, n_heads, head_dim = q.shape
    n_kv_heads = k.shape[2]
    q = q.reshape(batch, length, n_kv_heads, n_heads // n_kv_heads, head_dim)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * head_dim**-0.5
    scores = jnp.where(visible[:, None, None, :, :], scores, HIDDEN)
    probs = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", probs, v).reshape(batch, length, n_heads, head_dim)


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
