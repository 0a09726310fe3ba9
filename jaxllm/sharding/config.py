"""The sizes of the device mesh. Without JAX, so that --help and the checks of a recipe are quick."""

import math
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from jaxllm.core.config import Config

# From the outside in: what talks least lies furthest apart.
AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # those that split the rows that a layer works on
ROW_AXES = ("stage", *BATCH_AXES)  # those that split the rows of a batch everywhere else: embedding, head and loss


class MeshConfig(Config):
    """Sizes of the mesh axes; their product is the number of devices, and one of them may be -1 (all that are left)."""

    stage: int = Field(1, ge=-1, description="devices in a row that each have some of the layers (pipeline)")
    data: int = Field(-1, ge=-1, description="replicas of the model, each with its own part of the batch")
    fsdp: int = Field(1, ge=-1, description="devices that share one replica's parameters and optimizer state (ZeRO-3)")
    expert: int = Field(
        1, ge=-1, description="devices that share the experts of each layer, and split the batch as data and fsdp do"
    )
    context: int = Field(1, ge=-1, description="devices that share each row of tokens, for long ones")
    tensor: int = Field(
        1, ge=-1,
        description="devices that split every matrix product (heads, ffn width, vocabulary), and rows between them",
    )  # fmt: skip
    across: Literal["stage", "data", "fsdp"] = Field(
        "data", description="the axis that goes over several TPU slices or GPU hosts, whose network is the slowest"
    )


def axis_sizes(config: MeshConfig, device_count: int) -> dict[str, int]:
    """Resolve the -1 of `config` for `device_count` devices.

    Raises:
      ValueError: the sizes do not multiply to the device count.
    """
    given = config.stage, config.data, config.fsdp, config.expert, config.context, config.tensor
    sizes = dict(zip(AXES, given, strict=True))
    described = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if 0 in sizes.values() or len(free) > 1:
        raise ValueError(f"mesh {described}: sizes are >= 1, and at most one is -1; set the others to 1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = device_count // fixed
    if math.prod(sizes.values()) != device_count:
        remedy = f"they are no multiple of {fixed}" if free else "set mesh.data=-1 to fill up"
        raise ValueError(f"mesh {described} does not use {device_count} devices exactly; {remedy}")
    return sizes


def slice_sizes(config: MeshConfig, sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """Return the axis sizes within a slice, where `config.across` goes over all slices.

    Raises:
      ValueError: the slices do not divide that axis.
    """
    axis = config.across
    if sizes[axis] % slices:
        others = " or ".join(name for name in ("stage", "data", "fsdp") if sizes[name] % slices == 0)
        raise ValueError(
            f"the devices lie in {slices} slices, which do not divide mesh.{axis}={sizes[axis]}; make it a multiple of "
            f"{slices}{f', or set mesh.across to {others}' * bool(others)}"
        )
    return {**sizes, axis: sizes[axis] // slices}


def batch_parts(sizes: Mapping[str, int]) -> int:
    """Return into how many parts a mesh of these axis sizes splits the rows of a batch."""
    return math.prod(sizes[axis] for axis in ROW_AXES)
