"""Adam whose moments take one or two bytes per parameter in the place of four.

int8: blocks of at most 256 numbers along the last axis share a float32 scale, their largest magnitude; each number is a
code of 8 bits, logarithmic in its share of that. Source: Dettmers et al. 2022, 8-bit Optimizers via Block-wise
Quantization, from which this deviates: blocks are shorter and stay within the last axis, so that codes are sharded as
their parameter is, and codes are logarithms and no table, because a TPU gathers slowly. As there, tables of embeddings
and small arrays keep float32. A decay of all of a block is exact, for it is one of the scale.

bfloat16: rounded to nearest. A change of the second moment below 1/256 would be lost, so b2 <= 0.99.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from jaxllm.core.tree import map_named

BLOCK, SMALLEST = 256, 4096
OCTAVES = {"signed": 24.0, "unsigned": 40.0}  # of the smallest code below the scale; squares have a wider range


class CompactAdamState(NamedTuple):
    """Moments as codes, and scales of the same tree; a scale that is not needed is a zero.

    The path of each array ends with that of its parameter, by which `state.state_shardings` finds its place.
    """

    count: Int[Array, ""]
    mu: Any
    mu_scale: Any
    nu: Any
    nu_scale: Any


def scale_by_compact_adam(b1: float, b2: float, eps: float, kind: str) -> optax.GradientTransformation:
    """Return `optax.scale_by_adam` that keeps its moments as `kind`: "bfloat16" or "int8"."""

    def init(params: optax.Params) -> CompactAdamState:
        def zeros(name: str, leaf: Array) -> tuple:
            both = (_store(name, jnp.zeros(leaf.shape, jnp.float32), kind, square) for square in (False, True))
            return tuple(part for pair in both for part in pair)

        return CompactAdamState(jnp.zeros((), jnp.int32), *_apart(params, map_named(zeros, params), 4))

    def update(
        gradient: optax.Updates, state: CompactAdamState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, CompactAdamState]:
        count = optax.safe_increment(state.count)
        steps = count.astype(jnp.float32)

        def one(name: str, g: Array, *stored: Array) -> tuple:
            g = g.astype(jnp.float32)
            mu = b1 * _load(*stored[:2], False) + (1 - b1) * g
            nu = b2 * _load(*stored[2:], True) + (1 - b2) * jnp.square(g)
            direction = (mu / (1 - b1**steps)) / (jnp.sqrt(nu / (1 - b2**steps)) + eps)
            return direction, *_store(name, mu, kind, False), *_store(name, nu, kind, True)

        direction, *moments = _apart(gradient, map_named(one, gradient, *state[1:]), 5)
        return direction, CompactAdamState(count, *moments)

    return optax.GradientTransformation(init, update)


def _apart(like: Any, tuples: Any, size: int) -> tuple:
    """Return a tree like another, of tuples, as a tuple of trees."""
    return jax.tree.transpose(jax.tree.structure(like), jax.tree.structure((0,) * size), tuples)


def _store(name: str, x: Float[Array, "..."], kind: str, square: bool) -> tuple[Array, Array]:
    """Return (codes, scales)."""
    if kind == "bfloat16":
        return x.astype(jnp.bfloat16), jnp.float32(0)
    if x.size < SMALLEST or name.endswith("embed/table"):
        return x, jnp.float32(0)
    return quantise(x, square=square)


def _load(codes: Array, scales: Array, square: bool) -> Float[Array, "..."]:
    exact = codes.dtype not in (jnp.int8, jnp.uint8)
    return codes.astype(jnp.float32) if exact else dequantise(codes, scales, square=square)


def block_size(length: int) -> int:
    """Return the longest block of at most 256 that divides `length`; of less than 32, rather all of it."""
    size = max(each for each in range(1, min(BLOCK, length) + 1) if length % each == 0)
    return size if size >= 32 else length


def quantise(x: Float[Array, "..."], *, square: bool) -> tuple[Array, Float[Array, "..."]]:
    """Return (codes of the shape of `x`, largest magnitudes [..., blocks]).

    Code 0 is zero, and code +-c of up to n is 2^((|c| - n) R / (n - 1)) of the block's largest, with R octaves.

    Args:
      square: all numbers are >= 0: uint8 codes, n = 255; else int8, n = 127.
    """
    size = block_size(x.shape[-1])
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // size, size)
    scale = jnp.max(jnp.abs(blocks), axis=-1)
    share = jnp.abs(blocks) / jnp.where(scale == 0, 1.0, scale)[..., None]
    largest, octaves = (255, OCTAVES["unsigned"]) if square else (127, OCTAVES["signed"])
    level = jnp.log2(jnp.maximum(share, 1e-30)) * ((largest - 1) / octaves) + largest
    # Small ones are zero; but squares are rounded up, or a step would be divided by nothing.
    zero = share == 0 if square else level < 0.5
    code = jnp.where(zero, 0.0, jnp.clip(jnp.round(level), 1, largest))
    code = code if square else jnp.sign(blocks) * code
    return code.reshape(x.shape).astype(jnp.uint8 if square else jnp.int8), scale


def dequantise(codes: Array, scale: Float[Array, "..."], *, square: bool) -> Float[Array, "..."]:
    """Return what `quantise` has kept, float32."""
    blocks = codes.astype(jnp.float32).reshape(*scale.shape, codes.shape[-1] // scale.shape[-1])
    largest, octaves = (255, OCTAVES["unsigned"]) if square else (127, OCTAVES["signed"])
    share = jnp.exp2((jnp.abs(blocks) - largest) * (octaves / (largest - 1)))
    return (jnp.sign(blocks) * share * scale[..., None]).reshape(codes.shape)
