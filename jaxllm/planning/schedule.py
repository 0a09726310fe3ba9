"""A model estimate of a step's time: the compiled program, replayed in the order in which the compiler scheduled it.

Sums of the compiler's own estimates (cycles / clock) for what computes; collectives by `network`; copies between memory
and the chip by its bandwidth. What is started runs beside what follows, and is waited for where it is used. It is no
measurement: no program of ours was timed on a TPU pod.
"""

import collections
import math
import re
from typing import NamedTuple

from jaxllm.core.config import Record
from jaxllm.planning import hlo
from jaxllm.planning.hlo import Instruction, Module, n_bytes
from jaxllm.planning.network import COLLECTIVES, Network, group_of

# Kernels carry no estimate: those that tell no FLOPs are attention, and take so many for each query, key and width of
# a head (products of the pass), half of the square being hidden. All are taken to reach this share of the peak.
KERNEL_SHARE = 0.5
PRODUCTS = {"splash_mha_fwd": 4, "splash_mha_dq": 6, "splash_mha_dkv": 8}
GROUPED = ("ragged-dot-none", "gmm", "tgmm")  # names of the kernels of grouped products
RENDEZVOUS = r'_xla_host_transfer_rendezvous="([^"]+)"'  # what a host hands over between slices
FUSED_START, FUSED_DONE = "async-collective-start", "async-collective-done"  # fusions; what lies between carries it on
HOST = "S(5)"  # in a type: the memory of the host
FREE = frozenset({
    "parameter", "constant", "get-tuple-element", "tuple", "bitcast", "partition-id", "replica-id", "after-all",
    "add-dependency", "opt-barrier", "iota",
})  # fmt: skip


class Collective(Record):
    """All runs of collectives of one kind between groups of one size in a step.

    Attributes:
      bytes: that a device gives, in all. seconds: as if each was alone; exposed: of them those that nothing hides.
    """

    kind: str
    group: int
    count: int
    bytes: float
    seconds: float
    exposed: float


class Estimate(NamedTuple):
    """Seconds of a step, by a model of the chip.

    Attributes:
      kernels: of `computing`, what kernels without an estimate of the compiler take (FLOPs / half of the peak).
      guessed: of `computing`, instructions without an estimate, by the bytes that they read and write.
      waiting: for copies between memory and the chip.
    """

    seconds: float
    computing: float
    kernels: float
    guessed: float
    waiting: float
    collectives: list[Collective]

    @property
    def exposed(self) -> float:
        """Seconds of collectives during which nothing computes."""
        return sum(each.exposed for each in self.collectives)

    @property
    def communicating(self) -> float:
        """Seconds of all collectives, hidden ones included."""
        return sum(each.seconds for each in self.collectives)


def estimate(text: str, network: Network, grouped: float = 1.0) -> Estimate:
    """Replay the text of a module that was compiled for the chips of `network`.

    Args:
      grouped: share of the rows of a grouped product that are in a group of the chip, which alone its kernel computes.
    """
    module = hlo.read(text)
    replay = _Replay(module, network.inside(module.partitions), grouped)
    seconds = replay.run(replay.module.entry, 1)
    spent = (replay.spent[key] for key in ("computing", "kernels", "guessed", "waiting"))
    return Estimate(seconds, *spent, _listed(replay.collectives))


def count(text: str, n_devices: int) -> list[Collective]:
    """Return the collectives of a module without times, as of compilers that estimate none."""
    module, found = hlo.read(text), collections.defaultdict(lambda: [0, 0.0, 0.0, 0.0])

    def visit(name: str, times: int) -> None:
        table = {each.name: each for each in module.computations[name]}
        for each in module.computations[name]:
            if each.op == "while":
                body, trips = hlo.trips(module, each)
                visit(body, times * trips)
            elif each.op == "call":
                visit(each.attribute(r"to_apply=%?([\w.\-]+)"), times)
            elif (op := each.op.removesuffix("-start")) in COLLECTIVES:
                given = sum(n_bytes(table[operand].type) for operand in each.operands if operand in table)
                entry = found[op, len(group_of(each, n_devices))]
                entry[0] += times
                entry[1] += times * given

    visit(module.entry, 1)
    return _listed(found)


def _listed(found: dict[tuple[str, int], list]) -> list[Collective]:
    rows = ((*key, *values) for key, values in sorted(found.items()))
    return [Collective(**dict(zip(Collective.model_fields, row, strict=True))) for row in rows]


class _Replay:
    """The clock, and what was spent on what. `times` multiplies what is inside of loops."""

    def __init__(self, module: Module, network: Network, grouped: float):
        self.module, self.network, self.chip, self.grouped = module, network, network.topology.chip, grouped
        self.spent: dict[str, float] = collections.defaultdict(float)
        self.collectives: dict[tuple[str, int], list] = {}

    def run(self, name: str, times: int) -> float:
        """Return the seconds of one run of a computation, which runs `times` times in the step."""
        now, ready = 0.0, {}  # ready: when what was started is finished, and which collective it is
        free: dict[str, float] = collections.defaultdict(float)  # when the links, and the copy engine, are
        table = {each.name: each for each in self.module.computations[name]}
        for each in self.module.computations[name]:
            given = sum(n_bytes(table[operand].type) for operand in each.operands if operand in table)
            if each.op == "while":
                body, count = hlo.trips(self.module, each)
                now += self.run(body, times * count) * count
            elif each.op == "conditional":
                branches = re.findall(r"%([\w.\-]+)", each.attribute(r"branch_computations=\{([^}]*)\}") or "")
                now += max((self.run(branch, times) for branch in branches), default=0.0)
            elif each.op == "call":
                now += self.run(each.attribute(r"to_apply=%?([\w.\-]+)"), times)
            elif each.op in ("send", "recv"):
                if each.op == "send":  # what comes back is waited for by its name, where it is received
                    queue, seconds, key = self._sent(each, given, times)
                    free[queue] = max(now, free[queue]) + seconds
                    ready[each.attribute(RENDEZVOUS)] = free[queue], key
            elif each.op.endswith("-start") or each.name.startswith(FUSED_START):
                queue, seconds, key = self._started(each, given, times)
                free[queue] = max(now, free[queue]) + seconds
                ready[each.name] = free[queue], key
            elif each.op.endswith(("-done", "-update")) or each.name.startswith(FUSED_DONE):
                source = each.operands[0] if each.op != "fusion" else each.name.replace(FUSED_DONE, FUSED_START)
                source = table[source].attribute(RENDEZVOUS) if each.op == "recv-done" else source
                until, key = ready[each.name] = ready.get(source, (now, None))
                if not each.op.endswith("-update"):
                    self._waited(max(0.0, until - now) * times, key)
                    now = max(now, until)
            else:
                now += self._computed(each, given, times)
        return now

    def _started(self, each: Instruction, given: float, times: int) -> tuple[str, float, tuple | None]:
        """Return (what is busy with it, for how long, which collective it is) of an asynchronous start."""
        inner = self._collective(each)
        if inner is None:
            host, arrays = HOST in each.type, [sizes for sizes in hlo.shapes(each.type) if sizes[1]]
            moved = min((hlo.BYTES[kind] * math.prod(sizes) for kind, sizes in arrays), default=0.0)  # of slices, those
            speed = self.chip.host_bandwidth if host else self.chip.hbm_bandwidth
            return "host" if host else "copies", moved / speed, None
        seconds = self.network.of_instruction(inner, given)
        return "links", seconds, self._count(inner, given, seconds, times)

    def _sent(self, each: Instruction, given: float, times: int) -> tuple[str, float, tuple]:
        """Return the like of what a chip sends to its partners in other slices, through the hosts."""
        op = each.attribute(r'transfer_type="(\w+)"').lower().replace("_", "-")
        slices = self.network.topology.slices
        seconds = self.network.between(op, given, given * slices, slices)
        return "slices", seconds, self._tally((f"{op} between slices", slices), given, seconds, times)

    def _collective(self, each: Instruction) -> Instruction | None:
        """Return the collective that an instruction is, or wraps."""
        if each.op.removesuffix("-start") in COLLECTIVES:
            return each
        called = each.attribute(r"(?:calls|called_computation)=%?([\w.\-]+)")
        scatter = (called or "").startswith("all-reduce-scatter")
        wraps = scatter or each.op == "async-start" or each.name.startswith(FUSED_START)
        inside = self.module.computations.get(called, []) if wraps else []
        return next((inner for inner in inside if inner.op in COLLECTIVES), None)

    def _count(self, each: Instruction, given: float, seconds: float, times: int) -> tuple[str, int]:
        key = each.op.removesuffix("-start"), len(group_of(each, len(self.network.places)))
        return self._tally(key, given, seconds, times)

    def _tally(self, key: tuple[str, int], given: float, seconds: float, times: int) -> tuple[str, int]:
        count, total, spent, exposed = self.collectives.get(key, (0, 0.0, 0.0, 0.0))
        self.collectives[key] = [count + times, total + given * times, spent + seconds * times, exposed]
        return key

    def _waited(self, seconds: float, key: tuple | None) -> None:
        if key is None:
            self.spent["waiting"] += seconds
        else:
            self.collectives[key][-1] += seconds

    def _computed(self, each: Instruction, given: float, times: int) -> float:
        """Return the seconds of an instruction during which nothing else of the program computes."""
        if (inner := self._collective(each)) is not None:
            op = "reduce-scatter" if each.op == "fusion" else inner.op
            inner = inner._replace(op=op)
            group = group_of(inner, len(self.network.places))
            seconds = self.network.seconds(op, given, n_bytes(each.type), group)
            self._waited(seconds * times, self._count(inner, given, seconds, times))
            return seconds
        kind, seconds = self._cost(each, given)
        if kind is not None:
            self.spent["computing"] += seconds * times
            self.spent[kind] += seconds * times
        return seconds

    def _cost(self, each: Instruction, given: float) -> tuple[str | None, float]:
        if (cycles := each.attribute(r'"estimated_cycles":"(\d+)"')) is not None:
            return "estimated", int(cycles) / self.chip.clock
        if each.op in FREE:
            return None, 0.0
        moved = (given + n_bytes(each.type)) / self.chip.hbm_bandwidth
        if each.op != "custom-call":
            return "guessed", moved
        if each.attribute(r'custom_call_target="([^"]+)"') != "tpu_custom_call":
            return None, 0.0  # markers of the compiler: buffers, bounds of indices
        flops = float(each.attribute(r'"flops":"?([\d.e+]+)') or 0) or self._attention(each)
        share = self.grouped if each.name.startswith(GROUPED) else 1.0  # of all rows, which the kernel tells
        return "kernels", share * max(moved, flops / (KERNEL_SHARE * self.chip.peak))

    @staticmethod
    def _attention(each: Instruction) -> float:
        """Return the FLOPs of an attention kernel, by its name; 0 of others.

        Its first operands of bfloat16 are queries and keys, [B, N, T, H] (one row: [N, T, H]); where devices share a
        row, T is of the share, which sees half of all keys as well.
        """
        products = next((count for name, count in PRODUCTS.items() if each.name.startswith(name)), 0)
        constraints = hlo.shapes(each.attributes)  # of the layouts of operands
        arrays = [sizes for kind, sizes in constraints if kind == "bf16" and len(sizes) in (3, 4)]
        return products * math.prod(arrays[0]) * arrays[1][-2] / 2 if products and len(arrays) > 1 else 0.0
