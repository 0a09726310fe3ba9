"""Functions that the compiler cannot split by itself, run on each device's part of their arrays."""

import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

from jaxllm.sharding.rules import Axes, partition_spec


def platform() -> str:
    """Return what the program is for ("cpu", "gpu", "tpu"): the devices of the mesh, which need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = jax.default_backend() if device is None else device.platform
    return "gpu" if name in ("cuda", "rocm") else name


def parts(axis: str) -> int:
    """Return how many devices of the mesh share an axis of it that the compiler may use here."""
    return _free().get(axis, 1)


def pieces(axis: str, size: int) -> int:
    """Return into how many pieces devices cut a dimension of a logical axis and a size here."""
    cut = spec((axis,), (size,))[0]
    return math.prod(parts(name) for name in ((cut,) if isinstance(cut, str) else cut or ()))


def spec(axes: Axes, shape: Sequence[int]) -> PartitionSpec:
    """Return how an array of these logical axes is split here."""
    return partition_spec(axes, shape, _free())


def on_shards(function: Callable[..., Array], arrays: Sequence[Array | None], axes: Sequence[Axes]) -> Array:
    """Return `function(*arrays)`, of which each device computes its part: as that of the first array, by its `axes`.

    Arrays may be None. Without a mesh, or with one device, this is a plain call.
    """
    free = _free()
    if all(size == 1 for size in free.values()):
        return function(*arrays)
    specs = tuple(None if x is None else spec(names, x.shape) for x, names in zip(arrays, axes, strict=True))
    return jax.shard_map(
        function, in_specs=specs, out_specs=specs[0], axis_names=frozenset(free), check_vma=False
    )(*arrays)  # fmt: skip


def _free() -> dict[str, int]:
    """Sizes of the axes of the mesh that no `jax.shard_map` around this has taken."""
    mesh = jax.sharding.get_abstract_mesh()
    return {
        name: mesh.shape[name]
        for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True)
        if kind == AxisType.Auto
    }
