"""The device mesh: which devices hold which part of batch and model."""

import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxllm.sharding.config import AXES, ROW_AXES, MeshConfig, axis_sizes, batch_parts, slice_sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lay `devices` (default: all) out on the axes of `config`, in the order that suits the interconnect.

    Axis types are Auto on purpose: under Explicit, gathers from a sharded vocabulary need annotations at each use.

    Raises:
      ValueError: the sizes do not fit the devices, or the slices that these lie in.
    """
    return Mesh(
        arrange(config, jax.devices() if devices is None else devices), AXES, axis_types=(AxisType.Auto,) * len(AXES)
    )


def arrange(config: MeshConfig, devices: Sequence[jax.Device]) -> np.ndarray:
    """Return `devices` as an array with the axes of a mesh: neighbours in it are neighbours on the interconnect.

    Of several slices each is arranged by itself, and `config.across` goes over all of them; on GPUs, whose slices may
    be no more than hosts, only if it can. Devices that hold the same rows lie in one host, wherever a host has room for
    them: each process reads the rows of its own devices. The order of CPUs is that of their hosts.
    """
    sizes = axis_sizes(config, len(devices))
    slices = defaultdict(list)
    for device in devices:
        slices[getattr(device, "slice_index", 0)].append(device)
    counts = {number: len(each) for number, each in slices.items()}
    if len(set(counts.values())) > 1:
        raise ValueError(f"the slices differ in size: {counts} devices by slice; use slices of one size")
    if devices[0].platform == "cpu":
        return np.asarray(devices).reshape(tuple(sizes.values()))
    if devices[0].platform == "gpu" and sizes[config.across] % len(slices):
        slices = {0: devices}
    sizes = slice_sizes(config, sizes, len(slices))
    parts = [_arrange_slice(sizes, slices[number]) for number in sorted(slices)]
    return np.concatenate(parts, axis=AXES.index(config.across))


def _arrange_slice(sizes: Mapping[str, int], devices: Sequence[jax.Device]) -> np.ndarray:
    """Arrange the devices of a slice by its network alone, or host by host if that would lay rows over several."""
    found = _try_whole_axes(mesh_utils.create_device_mesh, tuple(sizes.values()), devices)
    by_row = found.reshape(batch_parts(sizes), -1)
    if all(len({device.process_index for device in row}) == 1 for row in by_row):
        return found
    left, outer = len({device.process_index for device in devices}), dict.fromkeys(sizes, 1)
    for axis in ROW_AXES:
        outer[axis] = math.gcd(left, sizes[axis])
        left //= outer[axis]
    if left > 1:  # a host has no room for a row
        return found
    inner = tuple(size // outer[axis] for axis, size in sizes.items())
    build = functools.partial(mesh_utils.create_hybrid_device_mesh, process_is_granule=True)
    return _try_whole_axes(build, inner, tuple(outer.values()), devices)


def _try_whole_axes(build: Callable[..., np.ndarray], *arguments: Any) -> np.ndarray:
    try:
        return build(*arguments)
    except NotImplementedError:  # no product of whole axes of the torus
        return build(*arguments, allow_split_physical_axes=True)


@functools.lru_cache
def reader(mesh: Mesh) -> tuple[tuple[int, ...], int]:
    """Return (which parts of a batch this process holds, number of parts); several processes may hold the same ones.

    Part n of N is the n-th N-th of the rows. Those of a process need not follow one another: on a torus, its devices
    are a block of the network and not of the rows.
    """
    rows, process = mesh.devices.reshape(batch_parts(mesh.shape), -1), jax.process_index()
    held = (number for number, row in enumerate(rows) if any(device.process_index == process for device in row))
    return tuple(held), len(rows)


def on_mesh_of(params: Any, function: Callable) -> Callable:
    """Return `function`, called on the mesh over which `params` are spread; unchanged if they are on one device."""
    sharding = jax.tree.leaves(params)[0].sharding
    if not isinstance(sharding, NamedSharding):
        return function

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        with jax.set_mesh(sharding.mesh):
            return function(*arguments, **keywords)

    return call
