"""Parameters and projections: each declares shape, logical axes and initializer once; all else follows."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.sharding.rules import constrain, parts


def param(rngs: nnx.Rngs, shape: Sequence[int], axes: Sequence[str | None], std: float) -> nnx.Param:
    """Declare a float32 parameter drawn from N(0, std^2).

    The logical axes are kept under our own metadata key: Flax's `out_sharding` would shard eagerly, outside of jit.
    """
    if len(shape) != len(axes):
        raise ValueError(
            f"parameter of shape {tuple(shape)} declares {len(axes)} axes {tuple(axes)}; name every dimension"
        )
    return nnx.Param(std * jax.random.normal(rngs.params(), tuple(shape), jnp.float32), axes=tuple(axes))


def constant(shape: Sequence[int], axes: Sequence[str | None], value: float) -> nnx.Param:
    """Declare a float32 parameter that starts as `value` everywhere (norm scales, biases)."""
    return nnx.Param(jnp.full(tuple(shape), value, jnp.float32), axes=tuple(axes))


class Projection(nnx.Module):
    """Linear map between groups of named dimensions: y[..., out] = x[..., in] W[in, out] + b[out].

    Args:
      inputs, outputs: {logical axis: size}, in order; {"embed": 64} to {"heads": 4, "head_dim": 16} has W[64, 4, 16].
      std: standard deviation of the initial weights; the bias starts at zero.
    """

    def __init__(
        self, rngs: nnx.Rngs, inputs: dict[str, int], outputs: dict[str, int], *, bias: bool = False, std: float = 0.02
    ):
        shape = (*inputs.values(), *outputs.values())
        self.n_inputs = len(inputs)
        self.kernel = param(rngs, shape, (*inputs, *outputs), std)
        # The axis of a bias must not take the mesh axis of the batch away from activations: only heads and mlp shard.
        axes = tuple("norm" if name == "embed" else name for name in outputs)
        self.bias = constant(tuple(outputs.values()), axes, 0.0) if bias else None

    def __call__(self, x: Float[Array, "B T *inputs"]) -> Float[Array, "B T *outputs"]:
        y = jnp.tensordot(x, self.kernel[...].astype(x.dtype), axes=self.n_inputs)
        if self.bias is not None:
            y = y + jnp.expand_dims(self.bias[...].astype(x.dtype), (0, 1))
        return y


def project_together(x: Float[Array, "B T D"], *projections: Projection) -> list[Array]:
    """Apply several projections of one input as a single matrix product.

    The weights stay separate parameters (checkpoints, sharding and LoRA see q, k and v); they are joined at trace time,
    which costs one copy of the weights and saves the small products that a CPU runs badly. Weights that are split over
    their outputs (tensor parallelism) cannot be joined without moving them, and a single token (decoding) would copy
    all weights for one row: both are applied one by one.
    """
    if x.shape[1] == 1 or parts("heads") > 1 or parts("mlp") > 1:
        return [projection(x) for projection in projections]
    kernels = [p.kernel[...].astype(x.dtype) for p in projections]
    sizes = [math.prod(kernel.shape[1:]) for kernel in kernels]
    joined = jnp.concatenate(
        [kernel.reshape(kernel.shape[0], size) for kernel, size in zip(kernels, sizes, strict=True)], 1
    )
    y = x @ joined
    outputs, start = [], 0
    for projection, kernel, size in zip(projections, kernels, sizes, strict=True):
        part = y[..., start : start + size].reshape(*x.shape[:-1], *kernel.shape[1:])
        if projection.bias is not None:
            part = part + jnp.expand_dims(projection.bias[...].astype(x.dtype), (0, 1))
        outputs.append(part)
        start += size
    return outputs


class Embed(nnx.Module):
    """Table of vectors; the gather's gradient is a scatter-add (a one-hot product is 200 times slower on CPU)."""

    def __init__(self, rngs: nnx.Rngs, size: int, d_model: int, *, axis: str = "vocab", std: float = 0.02):
        self.axis = axis
        self.table = param(rngs, (size, d_model), (axis, "embed"), std)

    def __call__(self, ids: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        # The width is gathered first: a lookup in a table sharded by width would move activations instead of weights.
        return constrain(self.table[...].astype(dtype), self.axis, None)[ids]
