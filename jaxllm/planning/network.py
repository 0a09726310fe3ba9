"""What joins the chips of a topology, and how long a collective takes on it at best."""

import math
import re
from typing import NamedTuple

import numpy as np

from jaxllm.planning.hlo import Instruction, n_bytes
from jaxllm.planning.topology import Coordinates, Topology

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
HOP_S = 1e-6  # of one step to a neighbour, whatever its size


class Network(NamedTuple):
    """The chips in the order of a mesh.

    Attributes:
      places: (slice, coordinates in it) of each partition of the program.
    """

    topology: Topology
    places: list[tuple[int, Coordinates]]

    @classmethod
    def of(cls, topology: Topology, devices: list) -> "Network":
        """Read the places of `devices` (of TPUs)."""
        place = lambda device: (getattr(device, "slice_index", 0) or 0, tuple(device.coords))
        return cls(topology, [place(device) for device in devices])

    def ring(self, group: list[int]) -> tuple[float, int]:
        """Return (bytes/s that each chip of `group` can receive in its slice, steps to the farthest).

        Along each dimension of the torus in which the group extends, two links bring data if it closes to a ring, else
        one, because the ends of a line have no other.
        """
        chip, shape = self.topology.chip, (*self.topology.shape, 1, 1)[:3]
        home = self.places[group[0]][0]
        coordinates = [place for slice_index, place in (self.places[member] for member in group) if slice_index == home]
        links, steps = 0, 0
        for size, along in zip(shape, zip(*coordinates, strict=True), strict=True):
            extent = len(set(along))
            if extent > 1:
                closed = extent == size and size % chip.wraps_at == 0
                links += 2 if closed else 1
                steps += extent // 2 if closed else extent - 1
        return max(links, 1) * chip.link_bandwidth, steps

    def seconds(self, op: str, given: float, result: float, group: list[int]) -> float:
        """Return the time of one collective, alone on the network, by the size of what each chip gives and gets.

        Source: Austin et al. 2025, "How to scale your model", chapter 3: an all-gather takes bytes / bandwidth, an
        all-reduce twice that, an all-to-all a quarter of the gather of the same array.
        """
        chip = self.topology.chip
        slices = len({self.places[member][0] for member in group})
        inside = len(group) // slices
        bandwidth, steps = self.ring(group)
        if op == "collective-permute":
            return self.between(op, given, given, slices) or given / chip.link_bandwidth + HOP_S
        size, passes = {
            "all-gather": (result, 1), "reduce-scatter": (given, 1), "all-reduce": (given, 2),
        }.get(op, (given * len(group), 0.25))  # fmt: skip
        time = passes * (size * (inside - 1) / inside / bandwidth + steps * HOP_S)
        return time + self.between(op, given / inside, result / inside, slices)

    def between(self, op: str, given: float, result: float, slices: int) -> float:
        """Return the time of a collective between as many slices, of which each chip carries its part.

        It is what a chip must receive over the data centre's network at least, at its share of the host's bandwidth;
        latency, some tens of microseconds, is not counted.
        """
        if slices == 1:
            return 0.0
        size = {"all-gather": result, "all-reduce": 2 * given}.get(op, given)
        return size * (1 if op == "collective-permute" else (slices - 1) / slices) / self.topology.chip.dcn_bandwidth

    def inside(self, partitions: int) -> "Network":
        """Return the network of a program of so many partitions: all of this one, or one slice."""
        if partitions in (0, len(self.places)):
            return self
        return self._replace(places=[place for place in self.places if place[0] == self.places[0][0]])

    def of_instruction(self, instruction: Instruction, given: float) -> float:
        """Return the time of a collective instruction that reads `given` bytes."""
        op, result = instruction.op.removesuffix("-start"), n_bytes(instruction.type)
        if op != instruction.op:  # the type of a start is (operands, results)
            result = max(result - given, given if op == "all-reduce" else 0)
        return self.seconds(op, given, result, group_of(instruction, len(self.places)))


def group_of(instruction: Instruction, n_devices: int) -> list[int]:
    """Return the partitions of the first group of a collective, from its `replica_groups` in any of XLA's notations.

    Example: {{0,1},{2,3}} -> 0 1;  [2,2]<=[2,2]T(1,0) -> 0 2;  mesh['x'=2,'y'=2] {'x'} -> 0 2;
    mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'x'} -> 0 1
    """
    text = instruction.attributes
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return [int(found[1]), int(found[2])]
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [int(each) for each in found[1].split(",")]
    iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if found := re.search(rf"replica_groups=\[(\d+),(\d+)\]<={iota}", text):
        return _iota(found[3], found[4]).reshape(int(found[1]), int(found[2]))[0].tolist()
    if found := re.search(rf"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\({iota}\))?\s*\{{([^}}]*)\}}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
        ids = _iota(found[2] or str(math.prod(sizes.values())), found[3]).reshape(tuple(sizes.values()))
        wanted = re.findall(r"'(\w+)'", found[4])
        return ids[tuple(slice(None) if name in wanted else 0 for name in sizes)].reshape(-1).tolist()
    return list(range(n_devices))


def _iota(sizes: str, order: str | None) -> np.ndarray:
    """Return 0, 1, 2 ... in the shape of `sizes`, "4,16", with its axes in `order`, "1,0"."""
    ids = np.arange(math.prod(shape := [int(each) for each in sizes.split(",")])).reshape(shape)
    return ids.transpose([int(each) for each in order.split(",")]) if order else ids
