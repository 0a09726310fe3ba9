"""Keys and values of the tokens so far, for decoding. Slot s of a row holds the token at position s of that row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Memory(NamedTuple):
    """What a decoder attends to beside itself: the source as hidden states, or as one layer's keys and values of them.

    Attributes:
      segments: of the source's tokens, int32 [B, S]; 0 = padding.
      targets: of the tokens that attend to it, int32 [B, T]; None: all of segment 1.
    """

    states: "Float[Array, 'B S D'] | LayerCache"
    segments: Int[Array, "B S"]
    targets: Int[Array, "B T"] | None = None


class LayerCache(NamedTuple):
    """One layer's keys and values.

    Attributes:
      keys, values: [R, S, H], with the rows and heads of the batch in one axis R = B * K: each (row, head) is a matrix
        that a product reads as it lies. Any other order makes XLA copy the whole cache for every token.
        Zero where nothing was written yet. Without values, keys are latents: [B, S, rank + rotated], that values are
        made of as well.
      memory: keys and values of the source, for layers that attend to one.
    """

    keys: Float[Array, "R S H"]
    values: Float[Array, "R S H"] | None
    memory: Memory | None = None


Cache = tuple[LayerCache, ...]  # one entry per layer: separate buffers, which a decode loop updates in place


def init_cache(n_layers: int, shape: tuple[int, int, int, int], dtype: jnp.dtype, *, latent: bool = False) -> Cache:
    """Return an empty cache of `n_layers` layers, of latents or not; `shape` is (B, S, K, H)."""
    batch, slots, n_kv_heads, head_dim = shape
    empty = lambda: jnp.zeros((batch * n_kv_heads, slots, head_dim), dtype)
    return tuple(LayerCache(empty(), None if latent else empty()) for _ in range(n_layers))


def update(
    cache: LayerCache, keys: Float[Array, "B T K H"], values: Float[Array, "B T K H"] | None,
    positions: Int[Array, "B T"],
) -> LayerCache:  # fmt: skip
    """Write T new tokens per row at the row's `positions`, which are consecutive from positions[:, 0]."""
    batch, length, n_kv_heads, head_dim = keys.shape
    start = jnp.repeat(positions[:, 0], n_kv_heads)

    def write(buffer: Array, new: Array, start: Array) -> Array:
        return jax.lax.dynamic_update_slice(buffer, new.astype(buffer.dtype), (start, 0))

    def add(buffer: Array, new: Array) -> Array:
        new = jnp.swapaxes(new, 1, 2).reshape(batch * n_kv_heads, length, head_dim)
        return jax.vmap(write)(buffer, new, start)

    return cache._replace(keys=add(cache.keys, keys), values=None if values is None else add(cache.values, values))
