"""The device mesh: which devices hold which part of batch and model."""

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxllm.sharding.config import AXES, MeshConfig, axis_sizes, slice_sizes


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

    Of several slices each is arranged by itself, and `config.across` goes over all of them. On GPUs, and on CPUs, the
    order of the devices is that of the hosts, so that the inner axes stay within a host.
    """
    sizes = axis_sizes(config, len(devices))
    counts = Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(set(counts.values())) > 1:
        raise ValueError(f"the slices differ in size: {dict(counts)} devices by slice; use slices of one size")
    inner, outer = (tuple(part.values()) for part in slice_sizes(config, sizes, len(counts)))
    if devices[0].platform == "cpu":
        return np.asarray(devices).reshape(tuple(sizes.values()))
    build = functools.partial(mesh_utils.create_device_mesh, inner, devices)
    if len(counts) > 1:
        build = functools.partial(mesh_utils.create_hybrid_device_mesh, inner, outer, devices)
    try:
        return build()
    except NotImplementedError:  # no product of whole axes of the torus
        return build(allow_split_physical_axes=True)


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
