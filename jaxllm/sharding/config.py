"""The sizes of the device mesh. Without JAX, so that --help and the checks of a recipe are quick."""

import math
from collections.abc import Mapping

from pydantic import Field

from jaxllm.core.config import Config

AXES = ("data", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")  # those that split the rows of a batch


class MeshConfig(Config):
    """Sizes of the mesh axes; their product is the number of devices, and one of them may be -1 (all that are left)."""

    data: int = Field(-1, ge=-1, description="replicas of the model, each with its own part of the batch")
    fsdp: int = Field(1, ge=-1, description="devices that share one replica's parameters and optimizer state (ZeRO-3)")
    expert: int = Field(
        1, ge=-1, description="devices that share the experts of each layer, and split the batch as data and fsdp do"
    )
    context: int = Field(1, ge=-1, description="devices that share each row of tokens, for long ones")
    tensor: int = Field(1, ge=-1, description="devices that split every matrix product (heads, ffn width, vocabulary)")


def axis_sizes(config: MeshConfig, device_count: int) -> dict[str, int]:
    """Resolve the -1 of `config` for `device_count` devices.

    Raises:
      ValueError: the sizes do not multiply to the device count.
    """
    sizes = dict(zip(AXES, (config.data, config.fsdp, config.expert, config.context, config.tensor), strict=True))
    described = " x ".join(f"{axis}={size}" for axis, size in sizes.items())
    free = [axis for axis, size in sizes.items() if size == -1]
    if 0 in sizes.values() or len(free) > 1:
        raise ValueError(f"mesh {described}: sizes are >= 1, and at most one is -1; set the others to 1")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        sizes[free[0]] = device_count // fixed
    if math.prod(sizes.values()) != device_count:
        raise ValueError(f"mesh {described} does not use {device_count} devices exactly; set mesh.data=-1 to fill up")
    return sizes


def batch_parts(sizes: Mapping[str, int]) -> int:
    """Return into how many parts a mesh of these axis sizes splits the rows of a batch."""
    return math.prod(sizes[axis] for axis in BATCH_AXES)
