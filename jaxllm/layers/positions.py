"""Where a token stands: rotary angles, a learned table, or nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.layers.config import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RelativeBias,
    Rope,
    RopeScaling,
    Sinusoids,
    YarnScaling,
)
from jaxllm.layers.linear import param
from jaxllm.sharding import shards


def rope_angles(positions: Int[Array, "B T"], head_dim: int, rope: Rope, *, local: bool = False) -> tuple[Array, Array]:
    """Return (cos, sin), float32 [B, T, 1, R/2], of positions * theta^(-2i/R); R = rotated part of a head of H.

    float32 whatever the compute dtype: at position 4096 a bfloat16 angle is off by whole turns.

    Args:
      local: those of the layers with a window, where `rope.local_theta` is set.
    """
    width = int(head_dim * rope.fraction)
    theta, scaling = (rope.local_theta, None) if local else (rope.theta, rope.scaling)
    frequencies = theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
    frequencies, magnitude = _scaled(frequencies, theta, scaling, positions)
    frequencies = jnp.reshape(frequencies.astype(jnp.float32), (-1, 1, 1, width // 2))  # one set, or one per row
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies
    # The product with the identity is exact, and a fence: without it XLA on a CPU moves the cosines into `rotate` and
    # computes them anew for every head of every layer.
    fence = lambda x: jnp.matmul(x, jnp.eye(width // 2), precision=jax.lax.Precision.HIGHEST)
    return fence(jnp.cos(angles) * magnitude), fence(jnp.sin(angles) * magnitude)


def sinusoids(positions: Int[Array, "B T"], d_model: int, config: Sinusoids) -> Float[Array, "B T D"]:
    """Return the vectors that are added to embeddings, float32."""
    frequencies = 10_000.0 ** (-np.arange(0, d_model, 2, dtype=np.float64) / d_model)
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies.astype(np.float32)[None, None]
    pair = jnp.sin(angles), jnp.cos(angles)
    if config.interleaved:
        return jnp.stack(pair, axis=-1).reshape(*positions.shape, d_model)
    return jnp.concatenate(pair, axis=-1)


class RelativeScores(nnx.Module):
    """b[h, bucket(key - query)]: what each head adds to the score of a key at a distance.

    Args:
      both_ways: keys may stand behind the query (an encoder); each direction then has half of the buckets.
    """

    def __init__(self, rngs: nnx.Rngs, config: RelativeBias, n_heads: int, *, both_ways: bool, std: float):
        self.buckets = relative_buckets(config, both_ways=both_ways)
        self.reach = config.max_distance
        self.table = param(rngs, (config.buckets, n_heads), ("buckets", "heads"), std)

    def __call__(self, queries: Int[Array, "*B T"], keys: Int[Array, "S"]) -> Float[Array, "*B N T S"]:
        """Return the numbers for queries and keys at these positions, float32."""
        ahead = jnp.broadcast_to(keys, (*queries.shape, keys.shape[0])) - queries[..., None]
        distance = jnp.clip(ahead, -self.reach, self.reach)
        bucket = jnp.asarray(self.buckets, jnp.int32)[distance + self.reach]
        return jnp.moveaxis(self.table[...][bucket], -1, -3)


def relative_buckets(config: RelativeBias, *, both_ways: bool) -> tuple[int, ...]:
    """Return the bucket of each distance key - query from -max_distance to max_distance.

    Example, 4 buckets, max_distance 4, one way: distances -4 ... 4 are in 3 2 2 1 0 0 0 0 0
    """
    distance = np.arange(-config.max_distance, config.max_distance + 1)
    count = config.buckets // 2 if both_ways else config.buckets
    far = np.abs(distance) if both_ways else np.maximum(-distance, 0)
    exact = count // 2
    with np.errstate(divide="ignore"):
        grown = np.log(far.astype(np.float32) / exact) / math.log(config.max_distance / exact) * (count - exact)
    ranged = np.minimum(exact + np.where(far > 0, grown, 0).astype(np.int64), count - 1)
    bucket = np.where(far < exact, far, ranged) + (count * (distance > 0) if both_ways else 0)
    return tuple(bucket.tolist())


def rotate(
    x: Float[Array, "B T N H"], angles: tuple[Array, Array], *, interleaved: bool = False
) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x[i], x[i + R/2]) of the first R dimensions by their angles, in float32.

    Scores of rotated queries and keys depend on the difference of positions alone.

    Args:
      interleaved: the pairs are (x[2i], x[2i + 1]); they are returned half a head apart, which scores do not see.
    """
    cos, sin = angles
    width = 2 * cos.shape[-1]
    if shards.platform() == "tpu" and not interleaved:
        return _turn(x, cos, sin)
    first, second, rest = jnp.split(x.astype(jnp.float32), (width // 2, width), axis=-1)
    if interleaved:
        pairs = jnp.concatenate([first, second], axis=-1)
        first, second = pairs[..., 0::2], pairs[..., 1::2]
    parts = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*parts, rest] if rest.shape[-1] else parts, axis=-1).astype(x.dtype)


@jax.custom_vjp
def _turn(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Float[Array, "B T N H"]:
    """Return `rotate`, with partners brought by a product: half a row of a TPU's lanes is dear to cut off and to join.

    The product moves numbers and changes signs, so that it is exact; the gradient is the rotation by the other sign.
    """
    half, whole = cos.shape[-1], x.shape[-1]
    swap = np.zeros((whole, whole), np.float32)
    swap[half : 2 * half, :half], swap[:half, half : 2 * half] = -np.eye(half), np.eye(half)
    exact = {"precision": "highest", "preferred_element_type": jnp.float32}  # or float32 goes by way of bfloat16
    partner = jnp.einsum("btnh,hk->btnk", x, jnp.asarray(swap, x.dtype), **exact)
    wide = lambda x, rest: jnp.concatenate([x, x, jnp.full((*x.shape[:-1], whole - 2 * half), rest, x.dtype)], axis=-1)
    cos, sin = wide(cos, 1), wide(sin, 0)
    return (x.astype(jnp.float32) * cos + partner * sin).astype(x.dtype)


_turn.defvjp(
    lambda x, cos, sin: (_turn(x, cos, sin), (cos, sin)),
    lambda angles, dy: (_turn(dy, angles[0], -angles[1]), None, None),
)


def _scaled(
    frequencies: np.ndarray, theta: float, scaling: RopeScaling | None, positions: Array
) -> tuple[np.ndarray | Array, float]:
    """Return (stretched frequencies, factor on cosine and sine)."""
    match scaling:
        case None:
            return frequencies, 1.0
        case LinearScaling():
            return frequencies / scaling.factor, 1.0
        case Llama3Scaling():
            turns = scaling.original_len * frequencies / (2 * math.pi)
            kept = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
            return frequencies * (kept + (1 - kept) / scaling.factor), 1.0
        case YarnScaling():
            # The pair that makes n turns in the original length; between beta_fast and beta_slow a linear blend.
            log_theta = math.log(theta)
            pair = lambda n: len(frequencies) * math.log(scaling.original_len / (n * 2 * math.pi)) / log_theta
            low, high = pair(scaling.beta_fast), pair(scaling.beta_slow)
            if scaling.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, 2 * len(frequencies) - 1)
            kept = 1 - np.clip((np.arange(len(frequencies)) - low) / max(high - low, 1e-3), 0, 1)
            return frequencies * (kept + (1 - kept) / scaling.factor), scaling.magnitude
        case LongRopeScaling():
            short, long = (frequencies / np.asarray(x) for x in (scaling.short_factors, scaling.long_factors))
            beyond = jnp.max(positions, axis=-1)[:, None, None, None] >= scaling.original_len  # of its row alone
            return jnp.where(beyond, long[None, None, None], short[None, None, None]), scaling.magnitude
