"""Attention over long rows, written for XLA: an online softmax over pairs of blocks, in memory linear in the length.

Which block of queries meets which block of keys is data: a list of pairs without those that the mask hides whole. So
one program serves a whole row, and each device of a group that shares a row.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.layers.masks import HIDDEN, Rule, Segments, fill, within

BLOCK = 512  # rows and columns of a block of scores


class Rows(NamedTuple):
    """What `attend_pairs` knows beside queries, keys and values.

    Attributes:
      queries, keys: the segments of both, int32 [B, R] and [B, S].
      pairs: int32 [P, 3], from `block_pairs`.
    """

    queries: Int[Array, "B R"]
    keys: Int[Array, "B S"]
    pairs: Int[Array, "P 3"]


def block_size(length: int) -> int:
    """Return the largest size, at most `BLOCK`, that divides a length."""
    return next(size for size in range(min(BLOCK, length), 0, -1) if length % size == 0)


def block_pairs(places: Sequence[int], n_keys: int, size: int, rule: Rule) -> np.ndarray:
    """Return (block of queries, block of keys, place of its first query) of all pairs that are not hidden whole.

    Args:
      places: of the first query of each block in the whole row, in the order in which the blocks are held.
      n_keys: how many blocks of keys there are.

    Example, blocks of 4, two of queries at 8 and 0, causal: (0, 0, 8), (0, 1, 8), (0, 2, 8), (1, 0, 0)
    """
    first = lambda place: 0 if rule.window is None else max(0, place + 1 - rule.window) // size
    seen = lambda place: range(first(place), place // size + 1) if rule.causal else range(n_keys)
    return np.asarray([(block, key, place) for block, place in enumerate(places) for key in seen(place)], np.int32)


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K U"],
    segments: Segments | None, sinks: Float[Array, "N"] | None, rule: Rule,
) -> Float[Array, "B T N U"]:  # fmt: skip
    """Return the attention output of whole rows."""
    length = q.shape[1]
    one = lambda x: jnp.ones(x.shape[:2], jnp.int32)
    own, others = (fill(x, BLOCK, -1) for x in segments or (one(q), one(k)))
    q, k, v = (fill(x, BLOCK, 0) for x in (q, k, v))
    pairs = block_pairs(range(0, q.shape[1], BLOCK), k.shape[1] // BLOCK, BLOCK, rule)
    return attend_pairs(q, k, v, Rows(own, others, jnp.asarray(pairs)), rule, sinks, BLOCK)[:, :length]


def attend_pairs(
    q: Float[Array, "B R N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K U"], rows: Rows,
    rule: Rule, sinks: Float[Array, "N"] | None, size: int,
) -> Float[Array, "B R N U"]:  # fmt: skip
    """Return the attention output of queries over all of `rows.pairs`; rows that see nothing get zeros.

    Args:
      size: of a block, which divides R and S.
    Source: Dao et al. 2022 (FlashAttention), algorithms 1 and 4, with the sums of a block kept outside of the loop.
    """
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(1, k.shape[2], -1, 1)
    cut = lambda x, heads: jnp.moveaxis(
        x.reshape(x.shape[0], -1, size, *heads, x.shape[-1]), (1, 2), (0, len(heads) + 2)
    )
    q = cut(q, (k.shape[2], q.shape[2] // k.shape[2]))  # [blocks, B, K, G, size, H]
    y = _attend(q, cut(k, k.shape[2:3]), cut(v, v.shape[2:3]), sinks, rows, rule)
    y = jnp.moveaxis(y, (0, 4), (1, 2))  # [B, blocks, size, K, G, U]
    return y.reshape(y.shape[0], -1, y.shape[3] * y.shape[4], y.shape[5])


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, sinks: Array | None, rows: Rows, rule: Rule) -> Array:
    return _forward(q, k, v, sinks, rows, rule)[0]


def _scores(rows: Rows, rule: Rule, q: Array, k: Array) -> Callable[[Array], tuple[Array, Array]]:
    """Return the function from a pair to its (scores [B, K, G, T, S], which of them count)."""
    size = q.shape[-2]
    queries, keys = (jnp.moveaxis(x.reshape(x.shape[0], -1, size), 1, 0) for x in (rows.queries, rows.keys))

    def scores(pair: Array) -> tuple[Array, Array]:
        s = rule.scale * jnp.einsum("bkgth,bksh->bkgts", q[pair[0]], k[pair[1]], preferred_element_type=jnp.float32)
        s = s if rule.softcap is None else rule.softcap * jnp.tanh(s / rule.softcap)
        seen = queries[pair[0]][:, :, None] == keys[pair[1]][:, None, :]
        if rule.causal:
            place = jnp.arange(size)
            seen &= within((pair[2] + place)[:, None], (pair[1] * size + place)[None, :], rule.window)[None]
        return s, seen[:, None, None]

    return scores


def _forward(q, k, v, sinks, rows, rule):
    # Tied together: what depends on `rows` alone, as whether a key is seen, JAX would compute once for all layers and
    # all pairs, and keep.
    q, rows = jax.lax.optimization_barrier((q, rows))
    shape, scores = q.shape[:-1], _scores(rows, rule, q, k)
    top = jnp.full(shape, HIDDEN) if sinks is None else jnp.broadcast_to(sinks[None], shape)
    total = jnp.zeros(shape) if sinks is None else jnp.ones(shape)

    def body(carry: tuple, pair: Array) -> tuple[tuple, None]:
        block, (sums, top, total) = pair[0], carry
        s, seen = scores(pair)
        new = jnp.maximum(top[block], jnp.max(jnp.where(seen, s, HIDDEN), axis=-1))
        weights = jnp.where(seen, jnp.exp(s - new[..., None]), 0.0)
        kept = jnp.exp(top[block] - new)
        part = jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v[pair[1]], preferred_element_type=jnp.float32)
        sums = _put(sums, block, sums[block] * kept[..., None] + part)
        total = _put(total, block, total[block] * kept + jnp.sum(weights, axis=-1))
        return (sums, _put(top, block, new), total), None

    start = jnp.zeros((*shape, v.shape[-1])), top, total
    (sums, top, total), _ = jax.lax.scan(body, start, rows.pairs)
    total = jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    y = (sums / total[..., None]).astype(v.dtype)
    return y, (q, k, v, sinks, rows, y, top + jnp.log(total))


def _backward(rule, residuals, dy):
    q, k, v, sinks, rows, y, log_total = residuals
    dy, rows = jax.lax.optimization_barrier((dy, rows))
    scores = _scores(rows, rule, q, k)
    inner = jnp.sum(dy.astype(jnp.float32) * y, axis=-1)

    def body(carry: tuple, pair: Array) -> tuple[tuple, None]:
        (dq, dk, dv), (row, key, _) = carry, pair
        s, seen = scores(pair)
        weights = jnp.where(seen, jnp.exp(s - log_total[row][..., None]), 0.0)
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        dv = _put(dv, key, dv[key] + product("bkgts,bkgth->bksh", weights.astype(v.dtype), dy[row]))
        ds = weights * (product("bkgth,bksh->bkgts", dy[row], v[key]) - inner[row][..., None]) * rule.scale
        ds = (ds if rule.softcap is None else ds * (1.0 - (s / rule.softcap) ** 2)).astype(q.dtype)
        dq = _put(dq, row, dq[row] + product("bkgts,bksh->bkgth", ds, k[key]))
        dk = _put(dk, key, dk[key] + product("bkgts,bkgth->bksh", ds, q[row]))
        return (dq, dk, dv), None

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    gradients = jax.lax.scan(body, zeros, rows.pairs)[0]
    dsinks = None
    if sinks is not None:
        dsinks = -jnp.sum(jnp.exp(sinks[None] - log_total) * inner, axis=(0, 1, 4))[None, ..., None]
    return *(d.astype(x.dtype) for d, x in zip(gradients, (q, k, v), strict=True)), dsinks, None


def _put(x: Array, block: Array, value: Array) -> Array:
    return jax.lax.dynamic_update_index_in_dim(x, value, block, 0)  # in its place; x.at[...] would be a scatter


_attend.defvjp(_forward, _backward)
