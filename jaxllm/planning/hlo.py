"""The text of a scheduled HLO module, as XLA prints it after compilation, as instructions in their order."""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
_HEAD = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")


class Instruction(NamedTuple):
    """`name = type op(operands), attributes`.

    Attributes:
      inside: the text between the parentheses, which is the value of a constant.
    """

    name: str
    root: bool
    type: str
    op: str
    operands: tuple[str, ...]
    inside: str
    attributes: str

    def attribute(self, pattern: str) -> str | None:
        """Return the first group of `pattern` in the attributes."""
        match = re.search(pattern, self.attributes)
        return None if match is None else match[1]


class Module(NamedTuple):
    """Computations by name, each in the order of its schedule; `entry` is where the program begins.

    Attributes:
      partitions: how many devices run it (of several slices: those of one, each of which runs the like); 0 = not said.
    """

    computations: dict[str, list[Instruction]]
    entry: str
    partitions: int


def read(text: str) -> Module:
    """Parse the text of a compiled module (`compiled.as_text()`).

    Raises:
      ValueError: it has no entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in _joined(text):
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.rstrip() == "}":
            current = None
        elif current is not None and (match := _INSTRUCTION.match(line)) and (found := _instruction(match)):
            current.append(found)
    if not entry:
        raise ValueError(f"no ENTRY in the text of an HLO module of {len(text)} characters")
    said = re.search(r"num_partitions=(\d+)", text[: text.index("\n")])
    return Module(computations, entry, int(said[1]) if said else 0)


def _joined(text: str) -> Iterator[str]:
    """Yield lines, those that go on (metadata of kernels) joined."""
    held = ""
    for line in text.splitlines():
        starts = not line or line[0] in "%EH" or line.rstrip() == "}" or _INSTRUCTION.match(line)
        if starts and held:
            yield held
            held = ""
        held = line if starts else held + line
    yield held


def _instruction(match: re.Match) -> Instruction | None:
    rest = match[3]
    size = _closed(rest, 0) if rest.startswith("(") else rest.index(" ")
    type_, rest = rest[:size], rest[size:].lstrip()
    op = re.match(r"[\w\-]+", rest)
    if op is None or not rest.startswith("(", op.end()):
        return None
    end = _closed(rest, op.end())
    inside = rest[op.end() + 1 : end - 1]
    operands = tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(match[2], bool(match[1]), type_, op[0], operands, inside, rest[end:])


def _closed(text: str, start: int) -> int:
    """Return the end of the parenthesis that opens at `start`."""
    depth = 0
    for place in re.finditer(r"[()]", text[start:]):
        depth += 1 if place[0] == "(" else -1
        if depth == 0:
            return start + place.end()
    return len(text)


def shapes(type_: str) -> list[tuple[str, tuple[int, ...]]]:
    """Return (element type, dimensions) of each array of a type; "(f32[2,3], s32[])" has two."""
    found = re.findall(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]", type_)
    return [(kind, tuple(int(size) for size in sizes.split(",") if size)) for kind, sizes in found if kind in BYTES]


def n_bytes(type_: str) -> float:
    """Return the bytes of all arrays of a type."""
    return sum(BYTES[kind] * math.prod(sizes) for kind, sizes in shapes(type_))


def trips(module: Module, loop: Instruction) -> tuple[str, int]:
    """Return (body, how often it runs) of a `while` that counts up to a constant; an unknown count is 1."""
    body, condition = loop.attribute(r"body=%?([\w.\-]+)"), loop.attribute(r"condition=%?([\w.\-]+)")
    if known := loop.attribute(r'known_trip_count":?\s*\{"?n"?:"?(\d+)'):
        return body, int(known)
    tests = {each.name: each for each in module.computations[condition]}
    root = next(each for each in tests.values() if each.root)
    limits = [tests[name] for name in root.operands if name in tests and tests[name].op == "constant"]
    if not limits:  # the comparison is fused
        limits = [each for each in tests.values() if each.op == "constant"]
    numbers = [int(each.inside) for each in limits if re.fullmatch(r"-?\d+", each.inside)]
    if not numbers:
        return body, 1
    counter = next((tests[name] for name in root.operands if name in tests and tests[name].op != "constant"), None)
    index = None if counter is None else counter.attribute(r"index=(\d+)")
    stride = 1 if index is None else _stride(module.computations[body], int(index))
    return body, max(1, math.ceil(max(numbers) / stride))


def _stride(body: list[Instruction], index: int) -> int:
    """Return what the body adds to element `index` of its tuple."""
    by_name = {each.name: each for each in body}
    root = next(each for each in body if each.root)
    found = by_name.get(root.operands[index]) if index < len(root.operands) else None
    while found is not None and found.op in ("copy", "bitcast", "copy-done", "copy-start"):
        found = by_name.get(found.operands[0])
    if found is None or found.op != "add":
        return 1
    steps = [by_name[name].inside for name in found.operands if name in by_name and by_name[name].op == "constant"]
    return max(1, int(steps[0])) if steps and re.fullmatch(r"\d+", steps[0]) else 1
