"""Parameters and projections: each declares shape, logical axes and initializer once; all else follows."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from jaxllm.sharding.rules import constrain

PRODUCT = "projection"  # by this name rematerialisation knows what is dear to recompute
ROW_PARTS = 4
FEW_ROWS = 64  # so many are multiplied faster in parts than at once


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
        self.turned = False

    def __call__(self, x: Float[Array, "B T *inputs"]) -> Float[Array, "B T *outputs"]:
        kernel = self.kernel[...].astype(x.dtype)
        if self.turned:
            y = _turned_product(x, kernel)
        else:
            y = checkpoint_name(_product(x, kernel, self.n_inputs), PRODUCT)
        if self.bias is not None:
            y = y + jnp.expand_dims(self.bias[...].astype(x.dtype), (0, 1))
        return y

    def join(self, *others: "Projection") -> None:
        """Become one map, to a flat output, with `others` of the same input: theirs come behind its own."""
        parts = [self, *others]
        flat = lambda leaf, kept: leaf[...].reshape(*leaf.shape[:kept], -1)
        self.kernel = nnx.Param(jnp.concatenate([flat(part.kernel, self.n_inputs) for part in parts], axis=-1))
        if self.bias is not None:
            self.bias = nnx.Param(jnp.concatenate([flat(part.bias, 0) for part in parts]))

    def turn(self) -> None:
        """Hold W[in, out] as W[out, in], if these lines are longer."""
        if self.kernel.shape[0] > self.kernel.shape[1]:
            self.kernel, self.turned = nnx.Param(self.kernel[...].T), True


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, kernel: Array, n_inputs: int) -> Array:
    """y = x W, whose gradient is written as x^T dy, or as (dy^T x)^T if dy is the narrower one.

    XLA on a CPU turns the first operand of such a product, and computes all that led to it in transposed order. For a
    wide dy, which automatic differentiation puts first, that costs more than the product.
    """
    whole = functools.partial(jnp.tensordot, axes=n_inputs)
    if x.shape[:2] == (1, 1) and jax.sharding.get_abstract_mesh().size <= 1:  # several devices split it themselves
        return jax.lax.platform_dependent(x, kernel, cpu=functools.partial(_row_product, n_inputs), default=whole)
    return whole(x, kernel)


def _row_product(n_inputs: int, x: Array, kernel: Array) -> Array:
    """y = x W for a single row, as the sum of `ROW_PARTS` products that each read their own rows of W.

    Decoding waits for weights to come from memory. XLA on a CPU reads those of one product with one core, and those of
    a batch of products with all cores: 1.4 to 2 times as fast for 0.6 to 6 MB on two cores.
    """
    inputs = math.prod(kernel.shape[:n_inputs])
    parts = math.gcd(inputs, ROW_PARTS)
    y = jnp.einsum("pk,pkn->pn", x.reshape(parts, -1), kernel.reshape(parts, inputs // parts, -1))
    return functools.reduce(jnp.add, y).reshape(1, 1, *kernel.shape[n_inputs:])


def _turned_product(x: Float[Array, "B T K"], kernel: Float[Array, "N K"]) -> Float[Array, "B T N"]:
    """y = x W^T, for few rows as products that each read their own rows of W, as in `_row_product`."""
    rows = x.reshape(-1, x.shape[-1])
    parts = math.gcd(kernel.shape[0], ROW_PARTS) if len(rows) <= FEW_ROWS else 1
    rows = jnp.broadcast_to(rows, (parts, *rows.shape))
    # The order of the operands is that of the product: jnp.einsum may swap them, and it is slower then.
    y = jax.lax.dot_general(kernel.reshape(parts, -1, x.shape[-1]), rows, (((2,), (2,)), ((0,), (0,))))
    return jnp.moveaxis(y, 2, 0).reshape(*x.shape[:2], -1)


def _product_backward(n_inputs: int, residuals: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    outputs = tuple(range(kernel.ndim))[n_inputs:]
    dx = jnp.tensordot(dy, kernel, axes=(tuple(range(2, dy.ndim)), outputs))
    if kernel.ndim == 2 and kernel.shape[0] > kernel.shape[1]:
        return dx, jnp.tensordot(dy, x, axes=((0, 1), (0, 1))).T
    return dx, jnp.tensordot(x, dy, axes=((0, 1), (0, 1)))


_product.defvjp(lambda x, kernel, n_inputs: (_product(x, kernel, n_inputs), (x, kernel)), _product_backward)


class Embed(nnx.Module):
    """Table of vectors; the gather's gradient is a scatter-add (a one-hot product is 200 times slower on CPU)."""

    def __init__(self, rngs: nnx.Rngs, size: int, d_model: int, *, axis: str = "vocab", std: float = 0.02):
        self.axis = axis
        self.table = param(rngs, (size, d_model), (axis, "embed"), std)

    def __call__(self, ids: Int[Array, "B T"], dtype: jnp.dtype) -> Float[Array, "B T D"]:
        if jax.sharding.get_abstract_mesh().size <= 1:
            return self.table[...][ids].astype(dtype)
        # The width is gathered first: a lookup in a table sharded by width would move activations instead of weights.
        return constrain(self.table[...].astype(dtype), self.axis, None)[ids]
