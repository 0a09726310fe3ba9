"""Attention by the Pallas kernel for TPUs that JAX brings (splash): linear memory, hidden blocks are never read."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jaxtyping import Array, Float

from jaxllm.layers.context import Share
from jaxllm.layers.linear import PRODUCT
from jaxllm.layers.masks import Rule, Segments, fill

LANES = 128  # of a TPU: rows are filled up to a multiple of them
BLOCK = 512  # rows and columns of a block of scores
# Longer rows have larger blocks: the table of blocks must fit the scalar memory, and is made block by block in Python.
MOST_BLOCKS, LONG = 256, 65_536

_BLOCKS = [np.array([[n > 0, n > 1]]) for n in range(3)]  # of which nothing, something or all is seen


class Visible(splash.Mask):
    """What the queries at `places` of rows of `keys` see by a rule.

    Blocks are judged by their corners: a mask of a million tokens is never written out.
    """

    def __init__(self, places: np.ndarray, keys: int, rule: Rule):
        self.q_sequence, self._places, self._keys, self._causal = places, places.tolist(), keys, rule.causal
        self._window = keys if rule.window is None else rule.window
        self._key = (places.tobytes(), keys, rule)

    @property
    def shape(self) -> tuple[int, int]:
        """Numbers of queries and of keys."""
        return len(self.q_sequence), self._keys

    def mask_function(self, queries: Array, keys: Array) -> Array:
        """Return bool, whether queries see keys."""
        if not self._causal:
            return (queries >= 0) & (keys >= 0)
        return (queries >= keys) & (queries - keys < self._window)

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        """Return bool [1, 2], whether (some, all) keys of a block are seen; its queries are consecutive places."""
        if not self._causal:
            return _BLOCKS[2]
        rows, keys = block
        nearest, farthest = (self._places[rows.start] - keys.stop + 1, self._places[rows.stop - 1] - keys.start)
        some, whole = farthest >= 0 and nearest < self._window, nearest >= 0 and farthest < self._window
        return _BLOCKS[int(some) + int(whole)]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Visible) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K U"],
    segments: Segments | None, sinks: Float[Array, "N"] | None, rule: Rule,
    share: Share | None = None, *, interpret: bool = False,
) -> Float[Array, "B T N U"]:  # fmt: skip
    """Return the attention output of whole rows, or of a device's `share` of them.

    Args:
      interpret: run on a CPU, slowly.
    """
    rows, keys = q.shape[1], k.shape[1]
    one = lambda length: jnp.ones((q.shape[0], length), jnp.int32)
    own, others = (fill(x, LANES, -1) for x in segments or (one(rows), one(keys)))
    q, k, v = (fill(x, LANES, 0) for x in (q * jnp.asarray(rule.scale, q.dtype), k, v))
    places = np.arange(q.shape[1], dtype=np.int32)[None] if share is None else share.places
    kernel = _kernel(Visible(places.reshape(-1), k.shape[1], rule), len(places), q.shape[2], rule.softcap, interpret)
    if share is not None:  # the part of the tables of blocks that is about its queries
        mine = lambda x, axis: jax.lax.dynamic_slice_in_dim(
            x, share.number * (x.shape[axis] // len(places)), x.shape[axis] // len(places), axis
        )
        kernel = jax.tree.map(lambda x: mine(x, 0 if x.ndim == 1 else 1), kernel)
    each = lambda q, k, v, own, others: kernel(q, k, v, splash.SegmentIds(own, others), sinks=sinks)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(jax.vmap(each)(*heads_first, own, others), 1, 2)[:, :rows]


def _kernel(seen: Visible, shares: int, heads: int, softcap: float | None, interpret: bool) -> Callable[..., Array]:
    length = len(seen.q_sequence) // shares
    rows = _divisor(length if shares == 1 else length // 2, 2 * BLOCK if seen.shape[1] > LONG else BLOCK)
    keys = _divisor(seen.shape[1], min(4 * BLOCK, max(BLOCK, seen.shape[1] // MOST_BLOCKS)))
    part = _divisor(keys, BLOCK)
    sizes = {"block_q": rows, "block_kv": keys, "block_kv_compute": part}
    sizes |= {"block_q_dkv": rows, "block_kv_dkv": keys, "block_kv_dkv_compute": part}
    sizes |= {"block_q_dq": rows, "block_kv_dq": part if keys == part else 2 * part}
    return splash.make_splash_mha(
        splash.MultiHeadMask([seen] * heads), block_sizes=splash.BlockSizes(**sizes), attn_logits_soft_cap=softcap,
        head_shards=1, q_seq_shards=shares, residual_checkpoint_name=PRODUCT, interpret=interpret,
    )  # fmt: skip


def _divisor(length: int, most: int) -> int:
    return next(size for size in (2048, 1024, 512, 256, 128) if length % size == 0 and (size <= most or size == LANES))
