"""A plan: what a step needs and how long it may take, as a record, a table and sentences."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from jaxllm.core.config import Record
from jaxllm.core.wording import count, short
from jaxllm.models import accounting
from jaxllm.planning import memory, schedule
from jaxllm.planning.aot import Abstract, Compiled, Job, shortage
from jaxllm.planning.network import Network
from jaxllm.planning.topology import Topology
from jaxllm.sharding.config import batch_parts

GIB = 2**30
# What takes less of each kind of memory.
_STATE = "which more chips share with a larger mesh.fsdp"
LESS = dict.fromkeys((*memory.EXACT, "gradients"), _STATE) | {
    "activations": "which compute.remat and a larger step.accumulate make less, and chips share with mesh.context",
    "logits": "which a smaller compute.loss_chunk makes less",
}
SENT = {  # of what a chip gives to a collective, by the size of its group
    "all-gather": lambda group: group - 1, "reduce-scatter": lambda group: 1 - 1 / group,
    "all-reduce": lambda group: 2 - 2 / group, "all-to-all": lambda group: 1 - 1 / group,
}  # fmt: skip
BASIS = "model estimate: the compiler's cycles and schedule replayed, collectives by link bandwidth; no chip was timed"


class Time(Record):
    """A model estimate of a step, seconds; what its basis is, `basis` says.

    Attributes:
      grouped: share of the rows of grouped products that are counted, those that a balanced router sends to the experts
        of a chip.
    """

    basis: str = BASIS
    step: float
    computing: float
    kernels: float
    guessed: float
    waiting: float
    collectives: float
    exposed: float
    grouped: float
    mfu: float
    tokens_per_second_per_chip: float
    formula: str = "6 N + 3 L T N_heads (H + U) FLOPs per token, causal attention counted half; dense bfloat16 peak"
    peak: float


class Plan(Record):
    """What is known of a training step on a topology.

    Attributes:
      memory: GiB of a device by category; where it fits, the sum is `needed`, the compiler's figure (None: it gave
        none).
      buffers: the largest, (GiB, what), where it does not fit.
      time: None where it does not fit, or for GPUs, whose compiler estimates nothing.
    """

    topology: str
    devices: int
    mesh: dict[str, int]
    remat: str
    accumulate: int
    rows: int
    seq_len: int
    parameters: int
    fits: bool
    needed: float | None
    available: float
    memory: dict[str, float]
    buffers: list[tuple[float, str]]
    time: Time | None
    collectives: list[schedule.Collective]
    compile_seconds: float
    cached: bool


def plan_of(job: Job, topology: Topology, parts: Abstract, compiled: Compiled) -> Plan:
    """Put together what was found."""
    sizes, chip = memory.expected(job, parts, topology.chip.kind), topology.chip
    available, needed, buffers, time, traffic = chip.hbm_bytes, None, [], None, []
    if compiled.problem:
        short_of = shortage(compiled.problem)
        available, buffers = short_of.available or available, short_of.buffers
        needed = short_of.needed or None
    else:
        needed = compiled.total
        sizes = memory.by_category(sizes, needed)
    if compiled.text and chip.kind == "gpu":
        traffic = schedule.count(compiled.text, topology.size)
    elif compiled.text:
        grouped, network = _grouped(job, parts), Network.of(topology, list(parts.mesh.devices.flat))
        found = schedule.estimate(compiled.text, network, grouped)
        time, traffic = _time(job, topology, found, grouped), found.collectives
    return Plan(
        topology=str(topology), devices=topology.size, mesh=dict(parts.mesh.shape), remat=job.compute.remat,
        accumulate=job.step.accumulate, rows=job.rows, seq_len=job.seq_len,
        parameters=accounting.param_count(job.model),
        fits=not compiled.problem and (chip.kind == "tpu" or needed <= available),
        needed=None if needed is None else needed / GIB, available=available / GIB,
        memory={name: size / GIB for name, size in sizes.items()},
        buffers=[(size / GIB, what) for size, what in buffers[:5]], time=time,
        collectives=traffic,
        compile_seconds=compiled.seconds, cached=compiled.cached,
    )  # fmt: skip


def _grouped(job: Job, parts: Abstract) -> float:
    holders, experts = parts.mesh.shape["expert"], getattr(job.model.ffn, "number", 1)
    return 1 / holders if experts % holders == 0 else 1.0


def _time(job: Job, topology: Topology, found: schedule.Estimate, grouped: float) -> Time:
    tokens = job.rows * job.seq_len
    flops = accounting.flops_per_token(job.model, job.seq_len) * tokens
    per_chip = 1 / found.seconds / topology.size
    return Time(
        step=found.seconds, computing=found.computing, kernels=found.kernels, guessed=found.guessed,
        waiting=found.waiting, collectives=found.communicating, exposed=found.exposed, grouped=grouped,
        mfu=flops * per_chip / topology.chip.peak, tokens_per_second_per_chip=tokens * per_chip,
        peak=topology.chip.peak,
    )  # fmt: skip


def show(plan: Plan, console: Console) -> None:
    """Print a plan: two tables, and what they mean."""
    say = lambda text: console.print(escape(text), highlight=False, soft_wrap=True)
    say(
        f"{plan.topology}: {count(plan.devices, 'chip')} as {_mesh(plan)}; {short(plan.parameters)} parameters, "
        f"{plan.rows:,} rows of {plan.seq_len:,} tokens a step in {count(plan.accumulate, 'microbatch')[:-1]}"
        f"{'es' if plan.accumulate > 1 else 'h'}, remat={plan.remat}"
    )
    table = Table("memory of a chip", "GiB", box=None, pad_edge=False)
    table.columns[1].justify = "right"
    for name, size in plan.memory.items():
        table.add_row(name, _figure(size))
    table.add_row("all", f"{_figure(sum(plan.memory.values()))} of {plan.available:,.2f}")
    console.print(table)
    for kind in plan.collectives:
        times = f", {_figure(kind.seconds)} s, of them {_figure(kind.exposed)} s exposed" if plan.time else ""
        sent = kind.bytes * SENT.get(kind.kind, lambda group: 1)(kind.group)
        say(f"{kind.count:>6} {kind.kind} among {kind.group}: a chip sends {_figure(sent / 1e9)} GB{times}")
    for sentence in sentences(plan):
        say(sentence)


def line(plan: Plan) -> str:
    """Return a plan in a few words."""
    if not plan.fits:
        return "does not fit"
    if plan.time is None:
        return f"fits, {plan.needed:.1f} GiB"
    time = plan.time
    return (
        f"{time.step:.3f} s a step, MFU {time.mfu:.1%} (model estimate), {time.exposed:.3f} s of collectives exposed, "
        f"{plan.needed:.1f} GiB"
    )


def show_ranking(plans: list[Plan], console: Console) -> None:
    """Print what fits, the best first."""
    table = Table("mesh", "remat", "microbatches", "GiB", "s/step", "MFU", "exposed s", "compiled s", box=None)
    for plan in plans:
        time = plan.time
        times = [f"{time.step:.3f}", f"{time.mfu:.1%}", f"{time.exposed:.3f}"] if time else ["", "", ""]
        table.add_row(
            _mesh(plan), plan.remat, str(plan.accumulate), f"{plan.needed:.1f}", *times, f"{plan.compile_seconds:.0f}"
        )
    console.print(table)
    if plans and plans[0].time:
        console.print(f"times are a {plans[0].time.basis}")


def _figure(value: float) -> str:
    """Return a number of GiB, GB or seconds with what is to be seen of it, of tiny models too."""
    return f"{value:,.2f}" if value >= 10 else f"{value:.3f}" if value >= 0.01 or not value else f"{value:.2g}"


def _mesh(plan: Plan) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in plan.mesh.items() if size > 1) or "one device"


def sentences(plan: Plan) -> list[str]:
    """Say in words what the plan found."""
    said = []
    where = "an earlier plan's compilation, which took" if plan.cached else "compiled in"
    verb = "fits" if plan.fits else "does not fit"
    needed = "more" if plan.needed is None else f"{plan.needed:.2f} GiB by the compiler's figure"
    said.append(f"it {verb}: {needed}, of {plan.available:.2f} GiB")
    if plan.fits and plan.needed > plan.available:
        said.append("  the figure counts some arrays twice: the compiler, which refuses what is too large, accepts it")
    if not plan.fits:
        said.append(_too_large(plan))
        said += [f"  {size:.2f} GiB: {what}" for size, what in plan.buffers]
    if plan.time is not None:
        time = plan.time
        said.append(
            f"step {_figure(time.step)} s, {time.tokens_per_second_per_chip:,.0f} tokens/s/chip, MFU {time.mfu:.1%} of "
            f"{time.peak / 1e12:.0f} TFLOP/s ({time.basis})"
        )
        said.append(
            f"  computing {_figure(time.computing)} s ({_figure(time.kernels)} s kernels at "
            f"{schedule.KERNEL_SHARE:.0%} of peak, {_figure(time.guessed)} s by bytes alone), collectives "
            f"{_figure(time.collectives)} s of which {_figure(time.exposed)} s are exposed, waiting for copies "
            f"{_figure(time.waiting)} s"
        )
        said.append(f"  MFU counts {time.formula}")
        if time.grouped < 1:
            said.append(
                f"  products of experts are counted for a balanced router, which sends a chip {time.grouped:.3g} of "
                "the rows that it holds room for; the busiest chip of a router that is not takes longer"
            )
    elif plan.fits:
        said.append(
            "no times for GPUs, whose compiler estimates none; attention is planned as XLA computes it, not cuDNN, and "
            "what is offloaded as if it lay on the chip"
        )
    said.append(f"{where} {plan.compile_seconds:.0f} s" if plan.compile_seconds else "nothing was compiled for this")
    return said


def _too_large(plan: Plan) -> str:
    largest = max(plan.memory, key=plan.memory.get)
    cure = LESS.get(largest, "which a larger step.accumulate makes less")
    rows = count(plan.rows // plan.accumulate // batch_parts(plan.mesh), "row")
    holders = count(plan.mesh["context"] * plan.mesh["tensor"], "chip")
    return (
        f"  by the shapes {sum(plan.memory.values()):.2f} GiB, most of them for {largest} "
        f"({plan.memory[largest]:.2f} GiB), {cure}; {holders} at a time work on {rows} of {plan.seq_len:,} tokens, "
        f"remat={plan.remat}"
    )
