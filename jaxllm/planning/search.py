"""The best layout of a step: of its candidates, the most promising are compiled and ranked by their schedule."""

import collections
import contextlib
import math
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, Future, ProcessPoolExecutor, wait

from jaxllm.planning import memory, topology
from jaxllm.planning.aot import Compiled, Job, abstract, compile_step
from jaxllm.planning.candidates import Candidate, Check, candidates
from jaxllm.planning.report import Plan, line, plan_of
from jaxllm.planning.topology import Topology
from jaxllm.sharding.config import MeshConfig, axis_sizes


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

    What a compiler refuses is said, and left out. Ctrl-C, and the death of a process, end it with what is compiled by
    then; as that is kept, the same search goes on from there.

    Raises:
      ValueError: nothing can fit, by the shapes alone, or everything is refused.
      KeyboardInterrupt, BrokenExecutor: it ended before anything was found that fits.
    """
    possible, refused = candidates(job, place, topology.devices(place), check)
    if not possible:
        why = f"{len(refused)} layouts are refused, the last because {refused[-1]}" if refused else least(job, place)
        raise ValueError(
            f"no layout of {place} can be had for this model and batch of {job.rows} rows: {why}"
            f"{'; others take more memory than there is' * bool(refused)}"
        )
    tries, found, start = min(tries, len(possible)), [], time.perf_counter()
    say(f"{len(possible)} layouts may fit; {tries} are compiled, {workers} at a time")
    order = _Order(possible, _own(job, place, possible))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin) as pool:
        submit = lambda each: pool.submit(make_plan, each.job, place)
        try:
            for number, (each, future) in enumerate(_compiled(order, submit, tries, workers), 1):
                where = f"{number} of {tries}, after {time.perf_counter() - start:.0f} s"
                name = " ".join(changes(job, each.job)) or "as it is"
                if error := future.exception():  # one that fails, or a dead worker, may not cost the other plans
                    say(f"{where}: {name}: failed, {type(error).__name__}: {error}")
                else:
                    plan = future.result()
                    say(f"{where}: {name}: {line(plan)}{', compiled earlier' * plan.cached}")
                    found += [(plan.time.step if plan.time else each.seconds, each.job, plan)] * plan.fits
        except (KeyboardInterrupt, BrokenExecutor) as stop:
            for child in multiprocessing.active_children():
                child.kill()
            dead = "a process was killed, for want of memory perhaps, of which --jobs=1 needs least"
            why = dead if isinstance(stop, BrokenExecutor) else "interrupted"
            say(f"{why}; what is compiled is kept, so that the same command goes on from there")
            if not found:
                raise
    if place.chip.kind == "gpu":
        say("ranked by what the shapes let expect, as the compiler of GPUs estimates no times")
    return [(own, plan) for _, own, plan in sorted(found, key=lambda each: each[0])]


def _own(job: Job, place: Topology, possible: list[Candidate]) -> Candidate | None:
    """Return the candidate that is the job as it stands."""
    layout = lambda each: (
        axis_sizes(each.mesh, place.size), each.compute.resolve(place.chip.kind, each.model.n_layers).remat,
        each.step.accumulate,
    )  # fmt: skip
    with contextlib.suppress(ValueError):  # its mesh is not of so many devices
        return next((each for each in possible if layout(each.job) == layout(job)), None)


def _begin() -> None:
    """Prepare a process that compiles; Ctrl-C is for the one that started it."""
    topology.without_hardware()
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _compiled(
    order: "_Order", submit: Callable[[Candidate], Future], tries: int, workers: int
) -> Iterator[tuple[Candidate, Future]]:
    """Yield candidates with what became of them, as each is finished."""
    running: dict[Future, Candidate] = {}
    while True:
        while tries and len(running) < workers and order.left:
            each, tries = order.take(), tries - 1
            running[submit(each)] = each
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            each = running.pop(future)
            order.learn(each, None if future.exception() else future.result())
            yield each, future


class _Order:
    """Which candidate is compiled next: what plans find of a policy corrects what is expected of its other layouts.

    Of each mesh and policy the fastest cut comes first, and others after all such; of a policy without a plan yet only
    one is compiled at a time. What needs no less memory than one that does not fit is left out. The recipe's own, if it
    is a candidate, is the first of all, so that what is found is no worse.
    """

    def __init__(self, possible: list[Candidate], own: Candidate | None = None):
        self.own = own
        self.left, self.turns, self.waiting = list(possible), collections.Counter(), set()
        self.factors: dict[str, float] = {}  # of a policy: seconds of the best plan / what was expected of it

    def take(self) -> Candidate:
        """Return the most promising one, which is left no longer."""
        found = self.own if self.own in self.left else min(self.left, key=self._turn)
        self.left.remove(found)
        self.turns[found.job.mesh, found.job.compute] += 1
        self.waiting.add(found.job.compute.remat)
        return found

    def _turn(self, each: Candidate) -> tuple[int, bool, float]:
        remat = each.job.compute.remat
        unknown = remat not in self.factors and remat in self.waiting
        return self.turns[each.job.mesh, each.job.compute], unknown, each.seconds * self.factors.get(remat, 1.0)

    def learn(self, tried: Candidate, plan: Plan | None) -> None:
        """Take into account what became of a candidate; None: it failed."""
        remat, kind = tried.job.compute.remat, lambda job: (job.compute, job.mesh.context, job.mesh.tensor)
        self.waiting.discard(remat)
        if plan is not None and plan.fits:
            factor = plan.time.step / tried.seconds if plan.time else 1.0
            self.factors[remat] = min(factor, self.factors.get(remat, math.inf))
        elif plan is not None:
            more = lambda each: kind(each.job) == kind(tried.job) and each.bytes >= tried.bytes
            self.left = [each for each in self.left if not more(each)]


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
