"""Topologies: `v5p:4x4x4`, `2*v5e:16x16`, `h100:8` in words, as devices that nobody owns; what their chips can do."""

import functools
import math
import os
import re
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from pydantic import Field

from jaxllm.core.config import Config

Coordinates = tuple[int, ...]
COMPILERS = {"tpu": ("libtpu",), "gpu": ("jax-cuda13-plugin", "jax-cuda13-pjrt")}  # packages


class Chip(Config):
    """What one chip can do; sources are in chips.yaml."""

    kind: Literal["tpu", "gpu"]
    peak: float = Field(gt=0, description="dense bfloat16 peak, FLOP/s")
    hbm_bytes: float = Field(gt=0, description="memory")
    hbm_bandwidth: float = Field(gt=0, description="bytes/s")
    host_bandwidth: float = Field(gt=0, description="to the memory of its host, one way, bytes/s")
    clock: float | None = Field(None, gt=0, description="of the cycles that the compiler estimates, Hz")
    link_bandwidth: float = Field(gt=0, description="of one link to a neighbour, one way, bytes/s")
    dcn_bandwidth: float | None = Field(None, gt=0, description="to other slices, bytes/s of one chip")
    torus: int = Field(ge=1, le=3, description="dimensions of the network")
    wraps_at: int | None = Field(None, ge=2, description="a dimension that is a multiple of it is a ring, else a line")
    largest: tuple[int, ...] = Field(description="shape of the largest slice")
    config: str | None = Field(None, description="libtpu's name for the chip's way to work, where it has several")


class Topology(NamedTuple):
    """`slices` pieces of `shape` chips each."""

    name: str
    chip: Chip
    shape: Coordinates
    slices: int

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.shape) * self.slices

    @property
    def compilers(self) -> tuple[str, ...]:
        """Names of the packages that compile for it."""
        return COMPILERS[self.chip.kind]

    def __str__(self) -> str:
        text = f"{self.name}:{'x'.join(map(str, self.shape))}"
        return text if self.slices == 1 else f"{self.slices}*{text}"


@functools.cache
def chips() -> dict[str, Chip]:
    """Return every chip that can be planned for."""
    table = yaml.safe_load(Path(__file__).with_name("chips.yaml").read_text(encoding="utf-8"))
    return {name: Chip.model_validate(fields) for name, fields in table.items()}


def parse(text: str) -> Topology:
    """Read "v5p:4x4x4", "2*v5e:16x16" (two slices, joined by the data centre's network) or "h100:8".

    Raises:
      ValueError: unknown chip, or a shape that its pods do not have; the message has the valid ones.
    """
    match = re.fullmatch(r"(?:(\d+)\*)?([a-z]\w*):(\d+(?:x\d+)*)", text.strip().lower())
    if match is None:
        sold = re.fullmatch(r"(v\d\w*)-\d+", text.strip().lower())  # of which v4 and v5p count cores, two of a chip
        also = f"; {text} is the name that it is sold by: of v5p-128, 64 chips, the shape is 4x4x4" if sold else ""
        raise ValueError(
            f"topology {text!r}: write CHIP:SHAPE, such as v5p:4x4x4, v5e:16x16, h100:8 or 2*v5e:16x16{also}"
        )
    slices, name, shape = int(match[1] or 1), match[2], tuple(map(int, match[3].split("x")))
    if name not in chips():
        raise ValueError(f"topology {text!r}: unknown chip {name!r}; there are {', '.join(chips())}")
    chip = chips()[name]
    valid = shapes(chip)
    if shape not in valid:
        size = math.prod(shape)
        near = sorted(valid, key=lambda each: (abs(math.log(max(size, 1) / math.prod(each))), each))[:6]
        said = ", ".join("x".join(map(str, each)) for each in sorted(near, key=math.prod))
        raise ValueError(f"topology {text!r}: {name} has no shape {match[3]}; of a like size are {said}")
    if slices < 1 or (slices > 1 and chip.kind == "gpu"):
        raise ValueError(f"topology {text!r}: slices are of TPUs, and at least 1; a plan for GPUs is for one node")
    return Topology(name, chip, shape, slices)


def shapes(chip: Chip) -> list[Coordinates]:
    """Return the shapes of slices; of a 3-D torus the sides ascend, and from 4 x 4 x 4 on are multiples of 4.

    Source: Google Cloud, "TPU v5p" and "TPU v5e", tables of topologies.
    """
    if chip.torus == 1:
        return [(n,) for n in (1, 2, 4, 8)]
    if chip.torus == 2:
        return [(1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)]
    small = [(2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4)]
    sides = range(4, max(chip.largest) + 1, 4)
    large = [(x, y, z) for x in sides for y in sides for z in sides if x <= y <= z]
    return small + [shape for shape in large if all(a <= b for a, b in zip(shape, chip.largest, strict=True))]


def devices(topology: Topology) -> list[Any]:
    """Return the devices of `topology`, for meshes and compilation; nothing can run on them.

    Call `without_hardware` before anything imports jax.

    Raises:
      ValueError: the package that compiles for this chip is not installed.
    """
    for name in topology.compilers:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            extra = {"tpu": "plan", "gpu": "plan-cuda"}[topology.chip.kind]
            raise ValueError(f"a plan for {topology} needs {name}; run: pip install 'jaxllm[{extra}]'") from None
    from jax.experimental import topologies

    if topology.chip.kind == "gpu":
        from jaxllm.planning.cuda import describe

        return describe(topology)
    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chip.config is not None:
        options["chip_config_name"] = topology.chip.config
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    name = f"{topology.name}:{'x'.join(map(str, topology.shape))}"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def without_hardware() -> None:
    """Have JAX run on the CPU and libtpu look for no TPU, in this process and those that it starts."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # several plans at a time
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # else libtpu asks Google's metadata server which TPU this machine has
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5p-8")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
