"""Attention over rows that devices share: each has all keys, gathered, and two chunks of queries of equal work in all.

A row lies over C devices in its order, and everything but attention reads it so. Attention cuts it into 2 C chunks and
exchanges queries, so that device d works for chunks d and 2 C - 1 - d: under a causal mask, all then meet equally many
keys. Keys and values are gathered rather than passed around a ring: what a row's segments and windows hide can be
skipped by any kernel, and with grouped heads they are a small part of what the products cost. Source: Llama 3, 2024,
section 3.3.2.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxllm.layers.masks import Rule, Segments
from jaxllm.layers.stream import Rows, attend_pairs, block_pairs, block_size
from jaxllm.sharding import shards

AXIS = "context"


class Share(NamedTuple):
    """The queries of one device.

    Attributes:
      number: which device this is. places: int32 [C, T / C], where the queries of each device stand in the row.
    """

    number: Int[Array, ""]
    places: np.ndarray


def parts(rows: int, keys: int) -> int:
    """Return how many devices share rows of this length in attention: those of the axis, if chunks are of one size."""
    count = shards.parts(AXIS)
    return count if rows == keys and rows % (2 * count) == 0 else 1


def attend(
    compute: Callable[..., Array], q: Float[Array, "B R N H"], k: Float[Array, "B R K H"], v: Float[Array, "B R K U"],
    segments: Segments | None, sinks: Float[Array, "N"] | None,
) -> Float[Array, "B R N U"]:  # fmt: skip
    """Return the attention output of a device's part R = T / C of rows; call it inside of `shards.on_shards`.

    Args:
      compute: the attention of queries of a `Share`: (q, k, v, segments, sinks, share).
      segments: of whole rows.
    """
    count, chunk = jax.lax.axis_size(AXIS), q.shape[1] // 2
    held = held_chunks(count)
    places = (held[:, :, None] * chunk + np.arange(chunk)).reshape(count, -1).astype(np.int32)
    share = Share(jax.lax.axis_index(AXIS), places)
    k, v = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (k, v))
    if segments is not None:
        segments = jnp.take(segments[0], jnp.asarray(places)[share.number], axis=1), segments[1]
    y = compute(_exchange(q, _sends(count)), k, v, segments, sinks, share)
    return _exchange(y, [[(there, here) for here, there in sends] for sends in _sends(count)])


def attend_xla(
    q: Float[Array, "B R N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K U"], segments: Segments | None,
    sinks: Float[Array, "N"] | None, share: Share, rule: Rule,
) -> Float[Array, "B R N U"]:  # fmt: skip
    """Return the attention output of the queries of a share, computed by XLA."""
    length, chunk = k.shape[1], q.shape[1] // 2
    size = block_size(chunk)
    lists = [block_pairs(places[::size], length // size, size, rule) for places in share.places]
    longest = max(len(pairs) for pairs in lists)
    nothing = (0, 0, -length)  # queries before the row, which see no key: only windows make lists of different length
    lists = [np.concatenate([x, np.full((longest - len(x), 3), nothing, np.int32)]) for x in lists]
    one = lambda x: jnp.ones(x.shape[:2], jnp.int32)
    rows = Rows(*(segments or (one(q), one(k))), jnp.asarray(np.stack(lists))[share.number])
    return attend_pairs(q, k, v, rows, rule, sinks, size)


def held_chunks(count: int) -> np.ndarray:
    """Return which two chunks each device works for, [C, 2]: an even one, that was first on some device, and an odd."""
    return np.array([sorted((d, 2 * count - 1 - d), key=lambda chunk: chunk % 2) for d in range(count)])


def _sends(count: int) -> list[list[tuple[int, int]]]:
    """Return (from, to) of the first chunk of each device, and of the second."""
    place = lambda chunk: min(chunk, 2 * count - 1 - chunk)
    return [[(d, place(2 * d + second)) for d in range(count)] for second in (0, 1)]


def _exchange(x: Array, sends: list[list[tuple[int, int]]]) -> Array:
    halves = jnp.split(x, 2, axis=1)
    return jnp.concatenate([jax.lax.ppermute(half, AXIS, to) for half, to in zip(halves, sends, strict=True)], axis=1)
