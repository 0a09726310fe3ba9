"""The device mesh: which devices hold which part of batch and model."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxllm.sharding.config import AXES, MeshConfig, axis_sizes


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Lay `devices` (default: all) out on the axes of `config`, in the order that suits the interconnect.

    Axis types are Auto on purpose: under Explicit, gathers from a sharded vocabulary need annotations at each use.
    """
    devices = jax.devices() if devices is None else devices
    sizes = axis_sizes(config, len(devices))
    types = (AxisType.Auto,) * len(AXES)
    if devices[0].platform == "cpu":
        return Mesh(np.asarray(devices).reshape(tuple(sizes.values())), AXES, axis_types=types)
    build = functools.partial(mesh_utils.create_device_mesh, tuple(sizes.values()), devices)
    try:
        return Mesh(build(), AXES, axis_types=types)
    except NotImplementedError:  # no product of whole axes of the torus
        return Mesh(build(allow_split_physical_axes=True), AXES, axis_types=types)


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
