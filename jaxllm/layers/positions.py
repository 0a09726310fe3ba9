"""Where a token stands: rotary angles, a learned table, or nothing."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope_angles(positions: Int[Array, "B T"], head_dim: int, theta: float) -> tuple[Array, Array]:
    """Return (cos, sin), float32 [B, T, 1, H/2], of positions * theta^(-2i/H).

    float32 whatever the compute dtype: at position 4096 a bfloat16 angle is off by whole turns.
    """
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[:, :, None, None] * frequencies[None, None, None, :]
    # The product with the identity is exact, and a fence: without it XLA on a CPU moves the cosines into `rotate` and
    # computes them anew for every head of every layer.
    fence = lambda x: jnp.matmul(x, jnp.eye(head_dim // 2), precision=jax.lax.Precision.HIGHEST)
    return fence(jnp.cos(angles)), fence(jnp.sin(angles))


def rotate(x: Float[Array, "B T N H"], angles: tuple[Array, Array]) -> Float[Array, "B T N H"]:
    """Rotate the pairs (x[i], x[i + H/2]) by their angles, in float32.

    Scores of rotated queries and keys depend on the difference of positions alone.
    """
    cos, sin = angles
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
