"""Logical axis names to mesh axes: the one table that spreads a model over devices.

Every parameter and every constrained activation names its axes in words ("embed", "heads"); this module turns the words
into a PartitionSpec for whatever mesh is in use. It knows nothing of layers.
"""

from collections.abc import Mapping, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxllm.sharding.config import BATCH_AXES, ROW_AXES

Axes = tuple[str | None, ...]

# Mesh axes in the order in which they are tried. An empty tuple means "never sharded".
RULES: Mapping[str, tuple[str, ...]] = {
    "rows": ROW_AXES,  # of a batch, outside of the layers
    "batch": BATCH_AXES,  # rows that a layer works on
    "length": (),
    # Of what goes from layer to layer: there, devices that split products have nothing to split but the row.
    "stream": ("context", "tensor"),
    "stages": ("stage",),
    "layers": ("stage",),
    "vocab": ("tensor",),
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "latent": (),
    "mlp": ("tensor",),
    "experts": ("expert",),
    "norm": (),
    "types": (),
    "labels": (),
    "buckets": (),
    "slots": (),
}


def partition_spec(axes: Sequence[str | None], shape: Sequence[int], mesh_shape: Mapping[str, int]) -> PartitionSpec:
    """Resolve logical `axes` of an array of `shape` to a PartitionSpec.

    For each dimension in turn, every mesh axis of its rule that is still free, larger than one and divides what is left
    of the dimension is taken. An axis that does not divide is skipped, not an error: a 2-head model on 8 devices runs.

    Example, mesh {data: 2, fsdp: 4}:

        ("batch", "length"), (16, 128)  ->  P(("data", "fsdp"), None)
        ("embed", "mlp"), (64, 256)     ->  P("fsdp", None)

    Raises:
      ValueError: an axis name that is not in `RULES`, or axes and shape of different length.
    """
    if len(axes) != len(shape):
        raise ValueError(f"axes {tuple(axes)} name {len(axes)} dimensions, the array has shape {tuple(shape)}")
    used: set[str] = set()
    entries: list[tuple[str, ...] | str | None] = []
    for name, size in zip(axes, shape, strict=True):
        if name is not None and name not in RULES:
            raise ValueError(f"unknown logical axis {name!r}; the rules have {', '.join(RULES)}")
        taken: list[str] = []
        parts = 1
        for axis in RULES[name] if name is not None else ():
            devices = mesh_shape.get(axis, 1)
            if axis in used or devices == 1 or size % (parts * devices):
                continue
            taken.append(axis)
            used.add(axis)
            parts *= devices
        entries.append(tuple(taken) if len(taken) > 1 else taken[0] if taken else None)
    return PartitionSpec(*entries)


def named_sharding(mesh: Mesh, axes: Sequence[str | None], shape: Sequence[int]) -> NamedSharding:
    """`partition_spec` bound to `mesh`."""
    return NamedSharding(mesh, partition_spec(axes, shape, mesh.shape))


def constrain(x: Array, *axes: str | None) -> Array:
    """Ask the compiler to lay `x` out by its logical axes; a no-op where no mesh is set (single-device use)."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, partition_spec(axes, x.shape, mesh.shape))
