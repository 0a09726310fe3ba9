"""What the compiler for TPUs is told of a layer, lest it fuses or lays out what is then dear; the values are the same.

On other platforms these functions return what they are given. The gains are in docs/results.md, "Plans for pods".
"""

from typing import TypeVar

import jax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float

from jaxllm.sharding import shards
from jaxllm.sharding.rules import Axes

T = TypeVar("T")


def computed_once(x: T) -> T:
    """Return x, and its gradient, not fused into the products that read them: each tile would compute them again."""
    return jax.lax.optimization_barrier(x) if shards.platform() == "tpu" else x


def gradient_once(x: T) -> T:
    """Return x, of which the gradient alone is `computed_once`."""
    return _gradient_once(x) if shards.platform() == "tpu" else x


@jax.custom_vjp
def _gradient_once(x: T) -> T:
    return x


_gradient_once.defvjp(lambda x: (x, None), lambda _, dx: (jax.lax.optimization_barrier(dx),))


def rows_in_order(x: Float[Array, "B T D"], axes: Axes) -> Float[Array, "B T D"]:
    """Return x with its rows as they are written, D innermost; else some products turn them, and others turn them back.

    Args:
      axes: the logical ones of x, of which each device orders its part.
    """
    if shards.platform() != "tpu":
        return x
    return shards.on_shards(lambda part: with_layout_constraint(part, Layout((0, 1, 2))), [x], [axes])
