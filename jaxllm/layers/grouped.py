"""Products of rows that stand in groups, each group with a matrix of its own: what a layer of experts is made of."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.sharding import shards

MAX_BLOCK = 64  # rows; measured on CPU
# Of the kernels for TPUs, by the bytes of a number: rows, and the two widths of a matrix. More does not fit the chip.
TILES = {2: (512, 1024, 1024), 4: (512, 512, 512)}
_cut = jax.lax.dynamic_slice_in_dim


def grouped_product(
    x: Float[Array, "R D"], kernels: Float[Array, "E D F"], sizes: Int[Array, "E"]
) -> Float[Array, "R F"]:
    """Return y_r = x_r W_e: of the first sizes[0] rows with the first matrix, and so on; of rows in no group, anything.

    XLA on a CPU computes `ragged_dot` as the product of all rows with all matrices, masked. There the rows of a group
    are multiplied block by block instead, which is R products for R E: with 8 to 32 experts a gradient takes 5 to 17
    times less, and a decode step reads the matrices of the chosen experts alone. For a TPU, XLA has a kernel of the
    product, but computes the gradient of the matrices as all rows with all of them, masked, and turns them round in
    memory for that of the rows. There both are kernels that JAX brings, which read rows that are in a group alone.
    """
    if shards.platform() == "tpu":
        return _tpu_product(x, kernels, sizes)
    if jax.sharding.get_abstract_mesh().size > 1:
        return jax.lax.ragged_dot(x, kernels, sizes)
    return _product(x, kernels, sizes)


@jax.custom_vjp
def _product(x: Array, kernels: Array, sizes: Array) -> Array:
    forward = lambda x, kernels, sizes: _rows(x, kernels, sizes, 0)
    return jax.lax.platform_dependent(x, kernels, sizes, cpu=forward, default=jax.lax.ragged_dot)


def _backward(residuals: tuple[Array, Array, Array], dy: Array) -> tuple[Array, Array, None]:
    def blocks(x: Array, kernels: Array, sizes: Array, dy: Array) -> tuple[Array, Array]:
        return _rows(dy, kernels, sizes, 1), _outer(x, dy, sizes).astype(kernels.dtype)

    def whole(x: Array, kernels: Array, sizes: Array, dy: Array) -> tuple[Array, Array]:
        return jax.vjp(lambda x, kernels: jax.lax.ragged_dot(x, kernels, sizes), x, kernels)[1](dy)

    return *jax.lax.platform_dependent(*residuals, dy, cpu=blocks, default=whole), None


_product.defvjp(lambda *inputs: (_product(*inputs), inputs), _backward)


@jax.custom_vjp
def _tpu_product(x: Array, kernels: Array, sizes: Array) -> Array:
    return jax.lax.ragged_dot(x, kernels, sizes)


def tpu_gradients(
    residuals: tuple[Array, Array, Array], dy: Array, *, interpret: bool = False
) -> tuple[Array, Array, None]:
    """Return the gradients of x (of rows in no group, anything), of the matrices and of the sizes, which have none.

    Args:
      residuals: x, the matrices, the sizes. interpret: run on a CPU, slowly.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm  # here: slow to import

    x, kernels, sizes = residuals
    tile = TILES[x.dtype.itemsize]
    more = -len(x) % tile[0]
    rows, dy = (jnp.pad(y, ((0, more), (0, 0))) for y in (x, dy))
    dx = gmm(dy, kernels, sizes, x.dtype, tile, transpose_rhs=True, interpret=interpret)[: len(x)]
    return dx, tgmm(rows.T, dy, sizes, kernels.dtype, tile, interpret=interpret), None


_tpu_product.defvjp(lambda *inputs: (_tpu_product(*inputs), inputs), tpu_gradients)


def _rows(x: Float[Array, "R D"], kernels: Float[Array, "E D F"], sizes: Int[Array, "E"], axis: int) -> Array:
    """Multiply each row with its matrix over `axis` of that: 0 = its inputs, 1 = its outputs.

    A block that is longer than the rest of its group writes into rows of the next one, whose own blocks come later.
    """
    size, (x,) = _padded(sizes, x)

    def step(y: Array, expert: Array, start: Array, stop: Array) -> Array:
        part = jax.lax.dot_general(_cut(x, start, size), kernels[expert], (((1,), (axis,)), ((), ())))
        return jax.lax.dynamic_update_slice_in_dim(y, part, start, 0)

    return _over_blocks(step, jnp.zeros((len(x), kernels.shape[2 - axis]), x.dtype), sizes, size)[:-size]


def _outer(x: Float[Array, "R D"], dy: Float[Array, "R F"], sizes: Int[Array, "E"]) -> Float[Array, "E D F"]:
    """Return x^T dy of each group, float32."""
    size, (x, dy) = _padded(sizes, x, dy)

    def step(total: Array, expert: Array, start: Array, stop: Array) -> Array:
        inside = (start + jnp.arange(size) < stop)[:, None]
        part = jnp.where(inside, _cut(dy, start, size), jnp.zeros((), dy.dtype))
        part = jnp.einsum("rd,rf->df", _cut(x, start, size), part, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_index_in_dim(total, total[expert] + part, expert, 0)

    return _over_blocks(step, jnp.zeros((len(sizes), x.shape[1], dy.shape[1]), jnp.float32), sizes, size)


def _over_blocks(step: Callable[..., Array], start: Array, sizes: Int[Array, "E"], size: int) -> Array:
    """Fold `step`(carry, expert, first row, end of its group) over the blocks of all groups, in the order of rows."""
    ends, counts = jnp.cumsum(sizes), -(-sizes // size)
    last = jnp.cumsum(counts)

    def body(block: Array, carry: Array) -> Array:
        expert = jnp.searchsorted(last, block, side="right")
        within = block - (last[expert] - counts[expert])
        return step(carry, expert, ends[expert] - sizes[expert] + within * size, ends[expert])

    return jax.lax.fori_loop(0, last[-1], body, start)


def _padded(sizes: Int[Array, "E"], *arrays: Float[Array, "R D"]) -> tuple[int, list[Array]]:
    """Return (rows of a block, arrays with as many more rows, which the last block may read)."""
    size = min(max(len(arrays[0]) // len(sizes), 1), MAX_BLOCK)
    return size, [jnp.pad(x, ((0, size), (0, 0))) for x in arrays]
