"""The best layout of a step: mesh shape x rematerialisation x microbatches; the likely ones are compiled.

A candidate is first judged by its shapes: does it fit, and how long do products and collectives take at best? The most
promising are compiled, some at a time, and ranked by the model estimate of their schedule.
"""

import collections
import itertools
import math
import typing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from jaxllm.models import accounting
from jaxllm.models.config import ComputeConfig
from jaxllm.planning import memory, topology
from jaxllm.planning.aot import Abstract, Compiled, Job, abstract, compile_step
from jaxllm.planning.network import Network
from jaxllm.planning.report import Plan, line, plan_of
from jaxllm.planning.topology import Topology
from jaxllm.sharding.config import AXES, ROW_AXES, MeshConfig, axis_sizes, batch_parts, slice_sizes

SLACK = 1.1  # a candidate is tried if its shapes need up to so much more than there is: they are an estimate
AGAIN = {"none": 0.0, "full": 1 / 3}  # of the model's FLOPs, what the backward pass computes again; of others a tenth
TRIED, MAX_TENSOR = ("data", "fsdp", "tensor"), 8  # axes whose sizes are tried; more than a host's chips are too slow
BEST_SHARE = 0.7  # of the peak, for the order in which candidates are tried
Check = Callable[[Job], None]  # raises ValueError where parts of a job contradict each other, as `recipe.check` does


class Candidate(NamedTuple):
    """A job with what is expected of it: bytes of a device, seconds at best."""

    job: Job
    bytes: float
    seconds: float


def candidates(job: Job, place: Topology, devices: list[Any], check: Check) -> tuple[list[Candidate], list[str]]:
    """Return (what may fit, the fastest first; why other layouts are refused).

    Args:
      job: gives the model and the global batch, which stay as they are.
    """
    found, refused = [], []
    for mesh in _meshes(job, len(devices)):
        cuts = []
        for accumulate in _microbatches(job.rows, mesh):
            step = job.step.model_copy(update={"accumulate": accumulate})
            each = job._replace(mesh=mesh, step=step)
            if problem := _problem(each, place, check):
                refused.append(problem)
            else:
                cuts.append(each)
        if not cuts:
            continue
        parts = abstract(cuts[0], devices)
        speed = _Speed(job, place, parts)
        for remat, cut in itertools.product(remats(), cuts):
            each = cut._replace(compute=job.compute.model_copy(update={"remat": remat}))
            needed = sum(memory.expected(each, parts, place.chip.kind).values())
            if needed <= SLACK * place.chip.hbm_bytes:
                found.append(Candidate(each, needed, speed.seconds(each)))
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
    """Yield shapes of the mesh whose tensor axis divides the heads, and fsdp the width; other axes are as they are."""
    model, mesh = job.model, job.mesh
    count //= math.prod(max(getattr(mesh, axis), 1) for axis in AXES if axis not in TRIED)
    for fsdp, tensor in itertools.product(range(1, count + 1), range(1, MAX_TENSOR + 1)):
        data, rest = divmod(count, fsdp * tensor)
        whole = model.kv_heads % tensor == 0 and model.d_ff % tensor == 0 and model.d_model % fsdp == 0
        if not rest and whole and job.rows % (data * fsdp) == 0:
            yield mesh.model_copy(update=dict(zip(TRIED, (data, fsdp, tensor), strict=True)))


def _microbatches(rows: int, mesh: MeshConfig) -> list[int]:
    """Return into how many microbatches the rows of a device can be cut, by powers of two."""
    parts = math.prod(max(getattr(mesh, axis), 1) for axis in ROW_AXES)
    return [1 << power for power in range(8) if rows % (parts << power) == 0]


class _Speed:
    """The time of a step at best: products at `BEST_SHARE` of the peak, or what moves meanwhile if that is more.

    Parameters are gathered twice for each microbatch and their gradients reduced once, over fsdp, beside the products;
    activations are reduced four times a layer (six with recomputation), over tensor, while nothing else goes on. Left
    out, as every layout that is tried has the same axes: keys and values over context, what stages and experts pass on.
    """

    def __init__(self, job: Job, place: Topology, parts: Abstract):
        self.mesh, self.place = parts.mesh, place
        self.network = Network.of(place, list(parts.mesh.devices.flat)) if place.chip.kind == "tpu" else None
        self.flops = accounting.flops_per_token(job.model, job.seq_len) * job.rows * job.seq_len
        self.weights = memory.of_device(parts.state.params) / 2 * parts.mesh.shape["fsdp"]  # bfloat16, gathered

    def seconds(self, job: Job) -> float:
        again = 1 + AGAIN.get(job.compute.remat, 0.1)
        sizes = self.mesh.shape
        working = self.mesh.size * (1 - job.compute.pipeline.idle(sizes["stage"]))
        computing = self.flops * again / working / (BEST_SHARE * self.place.chip.peak)
        moved = ("all-gather", "all-gather", "reduce-scatter")
        gathers = sum(self._over(op, self.weights, "fsdp") for op in moved)
        gathers += sum(self._over("all-reduce", 2 * self.weights / sizes["fsdp"], axis) for axis in ("data", "context"))
        width = 2.0 * job.model.d_model * job.rows * job.seq_len / batch_parts(sizes) / sizes["context"]
        reductions = (6 if job.compute.remat == "full" else 4) * job.model.n_layers
        return max(computing, job.step.accumulate * gathers) + reductions * self._over("all-reduce", width, "tensor")

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


def make_plan(job: Job, place: Topology) -> Plan:
    """Compile one job; runs in a process of its own as well."""
    devices = topology.devices(place)
    parts = abstract(job, devices)
    sizes = memory.expected(job, parts, place.chip.kind)
    state = sum(sizes.get(name, 0.0) for name in memory.EXACT)
    hopeless = Compiled("", {}, 0.0, problem="the state alone is too large") if state > place.chip.hbm_bytes else None
    return plan_of(job, place, parts, hopeless or compile_step(job, place, devices))


def least(job: Job, place: Topology) -> str:
    """Say how many chips of its kind hold the state of a job at least, which all of them share, and its gradients."""
    chip, whole = place.chip, job.step.model_copy(update={"accumulate": 1})
    alone = job._replace(mesh=MeshConfig(data=1), step=whole)
    sizes = memory.expected(alone, abstract(alone, topology.devices(place)[:1]), chip.kind)
    size = sum(sizes.get(name, 0.0) for name in (*memory.EXACT, "gradients"))
    count = math.ceil(size / chip.hbm_bytes)
    slices = max(1, math.ceil(count / math.prod(chip.largest)))
    shape = next((each for each in topology.shapes(chip) if math.prod(each) * slices >= count), chip.largest)
    return (
        f"state and gradients are {size / 2**30:,.0f} GiB in all, which take {count} chips of {place.name} at least, "
        f"{place._replace(shape=shape, slices=slices)}, and activations more"
    )


def search(
    job: Job, place: Topology, check: Check, tries: int, workers: int, say: Callable[[str], None]
) -> list[tuple[Job, Plan]]:
    """Compile the most promising candidates, `workers` at a time; return those that fit, the best first.

    What a compiler refuses is said, and left out.

    Raises:
      ValueError: nothing can fit, by the shapes alone, or everything is refused.
    """
    possible, refused = candidates(job, place, topology.devices(place), check)
    if not possible:
        also = f"; {len(refused)} layouts are refused, the last because {refused[-1]}" if refused else ""
        raise ValueError(
            f"no mesh of {place} holds this model and batch of {job.rows} rows, whatever is recomputed; take more "
            f"chips{also}"
        )
    jobs, found = [each.job for each in _varied(possible)[:tries]], []
    say(f"{len(possible)} layouts may fit; {len(jobs)} are compiled, {workers} at a time")
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=topology.without_hardware) as pool:
        running = {pool.submit(make_plan, each, place): each for each in jobs}
        for future in as_completed(running):
            own = running[future]
            name = " ".join(changes(job, own)) or "as it is"
            try:
                plan = future.result()
            except Exception as error:  # catch-all: one that fails, or a dead worker, may not cost the other plans
                say(f"{name}: failed, {type(error).__name__}: {error}")
                continue
            say(f"{name}: {line(plan)}")
            if plan.fits:
                found.append((own, plan))
    return sorted(found, key=lambda each: each[1].time.step if each[1].time else each[1].needed)


def _varied(possible: list[Candidate]) -> list[Candidate]:
    """Return candidates so that each mesh and policy comes once, with its fastest cut, before any comes twice."""
    seen: dict[tuple, int] = collections.defaultdict(int)
    turns = []
    for place, each in enumerate(possible):
        key = each.job.mesh, each.job.compute
        turns.append((seen[key], place, each))
        seen[key] += 1
    return [each for _, _, each in sorted(turns, key=lambda turn: turn[:2])]


def nearest(job: Job, plan: Plan, place: Topology, check: Check) -> list[tuple[Job, Plan]]:
    """Return what differs least from a job that does not fit, and does fit, with its plan; at most three are compiled.

    Of each kind of change (recompute more, smaller microbatches, another mesh, several of them) the fastest that needs
    less by its shapes, in the proportion in which the compiler has too much.
    """
    devices = topology.devices(place)
    own = sum(memory.expected(job, abstract(job, devices), place.chip.kind).values())
    limit = min(own * plan.available / plan.needed if plan.needed else own, place.chip.hbm_bytes)
    changed: dict[tuple[bool, ...], Job] = {}
    for each in candidates(job, place, devices, check)[0]:
        if each.bytes < limit:
            other = each.job
            changed.setdefault((other.mesh != job.mesh, other.step != job.step, other.compute != job.compute), other)
    for key in sorted(changed, key=lambda key: (sum(key), key))[:3]:
        found = make_plan(changed[key], place)
        if found.fits:
            return [(changed[key], found)]
    return []


def changes(job: Job, other: Job) -> list[str]:
    """Return "key=value" of what `other` has differently, as overrides of a recipe."""
    said = {f"mesh.{axis}": size for axis, size in other.mesh.model_dump().items()}
    said |= {"compute.remat": other.compute.remat, "step.accumulate": other.step.accumulate}
    ours = {f"mesh.{axis}": size for axis, size in job.mesh.model_dump().items()}
    ours |= {"compute.remat": job.compute.remat, "step.accumulate": job.step.accumulate}
    return [f"{key}={value}" for key, value in said.items() if value != ours[key]]
