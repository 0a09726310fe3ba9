"""Who may attend to whom, kept symbolic until a kernel needs it.

A mask is a small pytree with the facts; `dense` writes the bool[B, T, S] out (True = may attend). Kernels that can skip
whole blocks read the facts instead.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

# Finite, because a row without any visible key (padding) would turn to NaN with -inf, in the gradient as well.
HIDDEN = -1e30


class LayerWindow(NamedTuple):
    """A window of some layers, in a loop over layers: `size`, where `on`."""

    size: int
    on: Bool[Array, ""]

    @property
    def size_here(self) -> Int[Array, ""]:
        """The window of this layer, or one that no row reaches the end of."""
        return jnp.where(self.on, self.size, 2**30)


Window = int | LayerWindow | None  # tokens that are seen, the token itself included; None: all


class CausalMask(NamedTuple):
    """Self-attention over one row: a token sees itself and earlier tokens of its own segment.

    Attributes:
      segments: int32 [B, T]; tokens of different segments never see each other. None: the row is one segment.
      window: how far back a token sees.
      bias: added to the scores of each head.

    Example, segments 1 1 2 2:

        1 . . .
        1 1 . .
        . . 1 .
        . . 1 1
    """

    segments: Int[Array, "B T"] | None = None
    window: Window = None
    bias: Float[Array, "N T S"] | None = None

    def dense(self, queries: slice, keys: slice) -> Bool[Array, "B T S"]:
        """Write out the rows `queries` and the columns `keys` (slices of Python ints, stop included in each)."""
        rows = jnp.arange(queries.start, queries.stop)[:, None]
        columns = jnp.arange(keys.start, keys.stop)[None, :]
        visible = within(rows, columns, self.window)[None]
        if self.segments is not None:
            visible = visible & (self.segments[:, queries, None] == self.segments[:, None, keys])
        return visible

    def keys(self, queries: slice) -> slice:
        """Return the keys outside of which `queries` see nothing."""
        first = max(0, queries.start + 1 - self.window) if isinstance(self.window, int) else 0
        return slice(first, queries.stop)


class FullMask(NamedTuple):
    """Self-attention of an encoder: a token sees all tokens of its own segment, earlier and later.

    Attributes:
      segments: int32 [B, T]; tokens of different segments never see each other. Padding is a segment of its own, 0, so
        that no token ever sees it and no row is without keys. None: the row is one segment, without padding.
      bias: added to the scores of each head.

    Example, segments 1 1 2 0:

        1 1 . .
        1 1 . .
        . . 1 .
        . . . 1
    """

    segments: Int[Array, "B T"] | None = None
    bias: Float[Array, "N T S"] | None = None

    def dense(self, queries: slice, keys: slice) -> Bool[Array, "B T S"]:
        """Write out the rows `queries` and the columns `keys` (slices of Python ints, stop included in each)."""
        if self.segments is None:
            return jnp.ones((1, queries.stop - queries.start, keys.stop - keys.start), bool)
        return self.segments[:, queries, None] == self.segments[:, None, keys]


class CrossMask(NamedTuple):
    """Attention of one text into another: a token of the target sees all tokens of its own segment of the source.

    Attributes:
      sources: int32 [B, S]; 0 = padding. targets: int32 [B, T]; None: all of segment 1.
    """

    sources: Int[Array, "B S"]
    targets: Int[Array, "B T"] | None = None

    def dense(self, queries: slice, keys: slice) -> Bool[Array, "B T S"]:
        """Write out the rows `queries` and the columns `keys`."""
        targets = jnp.ones((1, 1), jnp.int32) if self.targets is None else self.targets[:, queries]
        visible = targets[:, :, None] == self.sources[:, None, keys]
        return jnp.broadcast_to(visible, (visible.shape[0], queries.stop - queries.start, visible.shape[2]))


class CacheMask(NamedTuple):
    """Attention of new tokens into a cache: slot s of a row holds the token at position s.

    Attributes:
      positions: int32 [B, T] of the queries; a query sees the slots 0 ... position.
      window: how far back it sees.
      bias: added to the scores of each head.
    """

    positions: Int[Array, "B T"]
    window: Window = None
    bias: Float[Array, "B N T S"] | None = None

    def dense(self, queries: slice, keys: slice) -> Bool[Array, "B T S"]:
        """Write out the rows `queries` and the slots `keys`."""
        slots = jnp.arange(keys.start, keys.stop)[None, None, :]
        return within(self.positions[:, queries, None], slots, self.window)


Segments = tuple[Int[Array, "B T"], Int[Array, "B S"]]  # of queries and of keys


class Rule(NamedTuple):
    """What a kernel does with every row: scores are `scale` q k^T, bent to below a `softcap` if there is one.

    Attributes:
      causal: a query sees no key after itself, and none farther back than `window`.
    """

    scale: float
    softcap: float | None = None
    causal: bool = True
    window: int | None = None


RowMask = CausalMask | FullMask | CrossMask  # of attention between rows that are there whole
Mask = RowMask | CacheMask


def within(query: Array, key: Array, window: Window) -> Array:
    """Whether a query at one place sees a key at another: itself and those before it, as far as the window goes."""
    window = window.size_here if isinstance(window, LayerWindow) else window
    visible = query >= key
    return visible if window is None else visible & (query - key < window)


def fill(x: Array, multiple: int, value: int) -> Array:
    """Return rows [B, T, ...] with `value` behind them, up to a multiple of tokens."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), *((0, 0),) * (x.ndim - 2)), constant_values=value)


def segment_ids(mask: RowMask) -> Segments | None:
    """Return the segments of queries and of keys, which see each other where they are equal; None: all do."""
    if not isinstance(mask, CrossMask):
        return None if mask.segments is None else (mask.segments, mask.segments)
    return jnp.ones_like(mask.sources) if mask.targets is None else mask.targets, mask.sources
