"""Layouts that a step may have, judged by their shapes: does one fit, and how long do products and collectives take?

Mesh shape x rematerialisation x microbatches. Rows of tokens are shared over the axes context (of attention too) and
tensor (of what lies between products).
"""

import itertools
import math
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxllm.models import accounting
from jaxllm.models.config import ComputeConfig
from jaxllm.planning import memory
from jaxllm.planning.aot import Abstract, Job, abstract
from jaxllm.planning.network import Network
from jaxllm.planning.topology import Topology
from jaxllm.sharding.config import AXES, ROW_AXES, MeshConfig, axis_sizes, batch_parts, slice_sizes

SLACK = 1.1  # a candidate is tried if its shapes need up to so much more than there is: they are an estimate
AGAIN = {"none": 0.0, "full": 1 / 3}  # of the model's FLOPs, what the backward pass computes again; of others a tenth
# Axes whose sizes are tried; tensor over more than a host's chips is too slow.
TRIED, MAX_TENSOR = ("data", "fsdp", "context", "tensor"), 8
BEST_SHARE = 0.7  # of the peak, for the order in which candidates are tried
Check = Callable[[Job], None]  # raises ValueError where parts of a job contradict each other, as `recipe.check` does


class Candidate(NamedTuple):
    """A job with what is expected of it: bytes of a device, seconds at best."""

    job: Job
    bytes: float
    seconds: float


def candidates(job: Job, place: Topology, devices: list[Any], check: Check) -> tuple[list[Candidate], list[str]]:
    """Return (what may fit, the fastest first; why other layouts are refused).

    Devices share rows over context only where a policy fits with no fewer of them: smaller microbatches need as little
    memory, and no keys to be gathered.

    Args:
      job: gives the model and the global batch, which stay as they are.
    """
    found, refused = [], []
    least: dict[tuple[int, int, str], int] = {}  # of fsdp, tensor and policy: the smallest context that may fit
    for mesh in _meshes(job, len(devices)):
        key = lambda remat, mesh=mesh: (mesh.fsdp, mesh.tensor, remat)
        policies = [remat for remat in remats() if least.get(key(remat), mesh.context) == mesh.context]
        cuts = []
        for accumulate in _microbatches(job.rows, mesh):
            step = job.step.model_copy(update={"accumulate": accumulate})
            each = job._replace(mesh=mesh, step=step)
            if problem := _problem(each, place, check):
                refused.append(problem)
            else:
                cuts.append(each)
        if not cuts or not policies:
            continue
        parts = abstract(cuts[0], devices)
        speed = _Speed(job, place, parts)
        for remat, cut in itertools.product(policies, cuts):
            each = cut._replace(compute=job.compute.model_copy(update={"remat": remat}))
            needed = sum(memory.expected(each, parts, place.chip.kind).values())
            if needed <= SLACK * place.chip.hbm_bytes:
                found.append(Candidate(each, needed, speed.seconds(each)))
                least[key(remat)] = mesh.context
    return sorted(found, key=lambda each: (each.seconds, each.job.step.accumulate, each.bytes)), refused


def _problem(job: Job, place: Topology, check: Check) -> str:
    """Say why a layout cannot be had, "" if it can."""
    try:
        slice_sizes(job.mesh, axis_sizes(job.mesh, place.size), place.slices)
        check(job)
    except ValueError as error:
        return str(error)
    return ""


def remats() -> tuple[str, ...]:
    """Return the names of the policies of `compute.remat`."""
    return typing.get_args(ComputeConfig.model_fields["remat"].annotation)


def _meshes(job: Job, count: int) -> Iterator[MeshConfig]:
    """Yield shapes of the mesh, by context, whose tensor axis divides the heads, fsdp the width and context the row, in
    two chunks for each device; other axes are as they are.
    """
    model, mesh = job.model, job.mesh
    count //= math.prod(max(getattr(mesh, axis), 1) for axis in AXES if axis not in TRIED)
    sizes = [size for size in range(1, count + 1) if count % size == 0]
    for context, fsdp, tensor in itertools.product(sizes, sizes, sizes):
        data, rest = divmod(count, fsdp * context * tensor)
        whole = model.kv_heads % tensor == 0 and model.d_ff % tensor == 0 and model.d_model % fsdp == 0
        whole = whole and tensor <= MAX_TENSOR and (context == 1 or job.seq_len % (2 * context) == 0)
        if not rest and whole and job.rows % (data * fsdp) == 0:
            yield mesh.model_copy(update=dict(zip(TRIED, (data, fsdp, context, tensor), strict=True)))


def _microbatches(rows: int, mesh: MeshConfig) -> list[int]:
    """Return into how many microbatches, 128 at most, the rows of a device can be cut."""
    parts = math.prod(max(getattr(mesh, axis), 1) for axis in ROW_AXES)
    return [count for count in range(1, 129) if rows % (parts * count) == 0]


class _Speed:
    """The time of a step at best: products at `BEST_SHARE` of the peak, or what moves beside them if that is more.

    Beside them, parameters are gathered over fsdp, twice for each microbatch, and what is offloaded goes to the host
    and back. Nothing hides that gradients are summed, once for each microbatch, over fsdp, data and context, that
    activations are over tensor, four times a layer (six with recomputation), and that keys and values are gathered over
    context, twice, and their gradients summed. Left out, as every layout that is tried has the same axes: what stages
    and experts pass on.
    """

    def __init__(self, job: Job, place: Topology, parts: Abstract):
        self.parts, self.mesh, self.place = parts, parts.mesh, place
        self.network = Network.of(place, list(parts.mesh.devices.flat)) if place.chip.kind == "tpu" else None
        self.flops = accounting.flops_per_token(job.model, job.seq_len) * job.rows * job.seq_len
        self.weights = memory.of_device(parts.state.params) / 2 * parts.mesh.shape["fsdp"]  # bfloat16, gathered

    def seconds(self, job: Job) -> float:
        model, again = job.model, 1 + AGAIN.get(job.compute.remat, 0.1)
        sizes = self.mesh.shape
        working = self.mesh.size * (1 - job.compute.pipeline.idle(sizes["stage"]))
        computing = self.flops * again / working / (BEST_SHARE * self.place.chip.peak)
        gathers = 2 * self._over("all-gather", self.weights, "fsdp")
        sums = self._over("reduce-scatter", self.weights, "fsdp")
        sums += sum(self._over("all-reduce", 2 * self.weights / sizes["fsdp"], axis) for axis in ("data", "context"))
        numbers = 2.0 * job.rows * job.seq_len / batch_parts(sizes)  # bytes of a number for each token of whole rows
        reductions = 6 if job.compute.remat == "full" else 4
        layer = reductions * self._over("all-reduce", numbers * model.d_model / sizes["context"], "tensor")
        keys = numbers * model.kv_heads * (model.head_width + model.value_width) / sizes["tensor"]
        layer += 3 * self._over("all-gather", keys, "context")
        beside = max(computing, job.step.accumulate * gathers, self._offloaded(job))
        return beside + job.step.accumulate * sums + model.n_layers * layer

    def _offloaded(self, job: Job) -> float:
        """Return the seconds in which what waits in the memory of the host goes there and comes back."""
        if job.compute.remat != "offload":
            return 0.0
        kept = job._replace(compute=job.compute.model_copy(update={"remat": "dots"}))
        on_chip, less = (memory.expected(each, self.parts, self.place.chip.kind)["activations"] for each in (kept, job))
        return 2 * job.step.accumulate * (on_chip - less) / self.place.chip.host_bandwidth

    def _over(self, op: str, size: float, axis: str) -> float:
        """Return the seconds of a collective over an axis; over all three dimensions of a torus every one becomes an
        all-reduce, as libtpu 0.0.42 compiles it.
        """
        members = group(self.mesh, axis)
        if len(members) == 1:
            return 0.0
        if self.network is None:
            return size / self.place.chip.link_bandwidth
        extents = [len(set(along)) for along in zip(*(self.network.places[each][1] for each in members), strict=True)]
        op = "all-reduce" if sum(extent > 1 for extent in extents) > 2 else op
        return self.network.seconds(op, size, size, members)


def group(mesh: Mesh, axis: str) -> list[int]:
    """Return the first group of partitions along an axis of the mesh."""
    ids = np.arange(mesh.size).reshape(mesh.devices.shape)
    return np.moveaxis(ids, mesh.axis_names.index(axis), 0).reshape(mesh.shape[axis], -1)[:, 0].tolist()
