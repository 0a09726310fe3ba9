"""Weights from a checkpoint into sharded arrays, and back: a few tensors on the host at a time."""

import functools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxllm.core.tree import map_named, named_leaves
from jaxllm.hf.checkpoint import Tensors, Writer, aligned
from jaxllm.hf.rows import sizes_of
from jaxllm.hf.table import Row, finish, names, put, stacked, stored_shape, take
from jaxllm.models.build import EXACT, AnyConfig, Params, abstract_params

THREADS = 4  # at most, that read and turn tensors, each one at a time
TURNED = 16  # columns of a matrix that are turned together: rows of as many lines stay in the nearest cache


def match(checkpoint: Tensors, rows: list[Row], config: AnyConfig) -> None:
    """Compare a checkpoint with the table.

    Raises:
      ValueError: tensors are missing, too many, or of another shape; the message lists all of them.
    """
    sizes, called, there = sizes_of(config), checkpoint.called, checkpoint.stored  # `in checkpoint` would read
    shapes = {name: leaf.shape for name, leaf in named_leaves(abstract_params(config)).items()}
    wanted: dict[str, tuple[int, ...]] = {}
    for row in rows:
        shape = stored_shape(row, shapes[row.ours][stacked(row) :], sizes)
        wanted |= dict.fromkeys(names(row, sizes), finish(row, np.broadcast_to(np.int8(0), shape), sizes).shape)
    problems = [f"{called(name)}: missing" for name in wanted if name not in there]
    problems += [f"{called(name)}: not part of this model" for name in sorted(there.keys() - wanted.keys())]
    problems += [
        f"{called(name)}: shape {list(there[name].shape)}, expected {list(expected)}"
        for name, expected in wanted.items() if name in there and there[name].shape != expected
    ]  # fmt: skip
    if problems:
        shown = problems[:40] + [f"... and {len(problems) - 40} more"] * (len(problems) > 40)
        raise ValueError(
            f"{checkpoint.origin}: the tensors do not fit {checkpoint.described_by}:\n  "
            + "\n  ".join(shown)
            + f"\nUse the files that belong together; a model changed by hand must say so in {checkpoint.described_by}"
        )


def read_params(
    checkpoint: Tensors, rows: list[Row], config: AnyConfig, shardings: Any = None, dtype: str | None = None
) -> Params:
    """Read all parameters, each straight into its place on the mesh.

    A stacked parameter is filled in its place, by layer and expert: beside the parameters, the host holds as much as
    the largest tensor of the checkpoint, which may be several small ones.

    Args:
      shardings: tree of the parameters; None: one device.
      dtype: of the parameters; None: as stored. Those of `EXACT` are never narrowed: two experts that score alike would
        change places.
    """
    match(checkpoint, rows, config)
    by_name, sizes = {row.ours: row for row in rows}, sizes_of(config)
    places = named_leaves(shardings) if shardings is not None else {}
    size_of = lambda stored: math.prod(stored.shape) * jnp.dtype(stored.dtype).itemsize
    largest = max(map(size_of, checkpoint.stored.values()), default=0)

    def read(name: str, leaf: jax.ShapeDtypeStruct) -> Array:
        row, sharding = by_name[name], places.get(name)
        tensors = names(row, sizes)
        get = lambda theirs: take(row, checkpoint[theirs], sizes)
        kept = checkpoint.stored[tensors[0]].dtype
        wanted = jnp.promote_types(dtype or kept, kept) if name.endswith(EXACT) else dtype or kept
        here = sharding is None and jax.local_devices()[0].platform == "cpu"  # the memory of the device is this one
        if not stacked(row):
            whole = np.ascontiguousarray(get(tensors[0]).astype(wanted, copy=False))
            if not whole.flags.writeable:  # of a mapped file, and a CPU takes it as its own memory, whatever may_alias
                mapped, whole = whole, aligned(whole.shape, whole.dtype)
                whole[...] = mapped
            return jax.device_put(whole, sharding)
        indices = np.ndindex(leaf.shape[: stacked(row)])
        if here:
            whole = aligned(leaf.shape, np.dtype(wanted))
            threads = min(THREADS, largest // max(1, size_of(checkpoint.stored[tensors[0]])))
            with ThreadPoolExecutor(max(1, threads)) as pool:
                list(pool.map(lambda index, theirs: _fill(whole[index], get(theirs)), indices, tensors))
            return jax.device_put(whole)
        stack = jax.jit(functools.partial(jnp.zeros, leaf.shape, wanted), out_shardings=sharding)()
        for index, theirs in zip(indices, tensors, strict=True):
            part = get(theirs).astype(wanted)
            start = np.array([*index, *[0] * part.ndim], np.int32)
            stack = _set(stack, np.ascontiguousarray(part[(None,) * len(index)]), start)
        return stack

    return map_named(read, abstract_params(config))


def _fill(into: np.ndarray, tensor: np.ndarray) -> None:
    """Copy a tensor, which may be a view that is turned: by blocks, or each number would come from another page."""
    near = int(np.argmin(tensor.strides))
    if near == tensor.ndim - 1:
        into[...] = tensor
        return
    for index in np.ndindex(tensor.shape[near + 1 : -1]):
        rest = (slice(None),) * (near + 1) + index
        for start in range(0, tensor.shape[-1], TURNED):
            block = (*rest, slice(start, start + TURNED))
            into[block] = tensor[block]


@functools.partial(jax.jit, donate_argnums=0)
def _set(stack: Array, part: Array, start: Array) -> Array:
    return jax.lax.dynamic_update_slice(stack, part, tuple(start))


def write_params(params: Params, rows: list[Row], config: AnyConfig, writer: Writer) -> None:
    """Write all parameters in the checkpoint's layout, one tensor at a time."""
    leaves, sizes = named_leaves(params), sizes_of(config)
    groups: dict[str, list[Row]] = {}  # the rows that share a tensor
    for row in rows:
        groups.setdefault(row.theirs, []).append(row)
    for group in groups.values():
        for index, theirs in enumerate(names(group[0], sizes)):
            parts = [_part(leaves[row.ours], row, index) for row in group]
            tensor = np.empty(stored_shape(group[0], parts[0].shape, sizes), parts[0].dtype)
            for row, part in zip(group, parts, strict=True):
                put(row, part, tensor, sizes)
            writer.add(theirs, finish(group[0], tensor, sizes))


def _part(leaf: Array, row: Row, index: int) -> np.ndarray:
    return np.asarray(leaf[np.unravel_index(index, leaf.shape[: stacked(row)])] if stacked(row) else leaf)
