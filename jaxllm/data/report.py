"""What `prepare` does, as a line that moves, and what it did, as data (report.json) and as tables for a person."""

import math
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from jaxllm.core import files, page
from jaxllm.core.config import Record
from jaxllm.core.wording import count
from jaxllm.data.cleaning.clean import RuleCount

if TYPE_CHECKING:
    from rich.console import Console

    from jaxllm.data.shards import Dataset

LIVE_S, LINE_S = 0.2, 10.0  # seconds between two words of progress, on a terminal and elsewhere


class SplitReport(Record):
    """Sizes of one split; `trained` tokens are learned."""

    documents: int
    tokens: int
    trained: int


class PackingReport(Record):
    """The training split in rows of `seq_len`; `waste` is the share of padding, `dropped` what is longer than a row."""

    seq_len: int
    rows: int
    waste: float
    dropped: int


class InputReport(Record):
    """One input: what was read, and what was kept of it."""

    name: str
    documents_read: int
    bytes_read: int
    documents_kept: int
    bytes_kept: int


class LanguageReport(Record):
    """What was kept in one language."""

    documents: int
    bytes: int


class Cluster(Record):
    """A group of near duplicates: how many, and some of them; the first was kept."""

    size: int
    examples: tuple[str, ...]


class LengthReport(Record):
    """Documents of `low` to `high` tokens, for training."""

    low: int
    high: int
    documents: int
    tokens: int


class PrepareReport(Record):
    """The account of one `prepare`: everything that was read is either stored or counted here as left out."""

    directory: str
    kind: str
    documents_read: int
    bytes_read: int
    documents_kept: int
    bytes_kept: int
    problems: int
    replaced: int
    problem_examples: tuple[str, ...]
    rules: dict[str, RuleCount]
    tokenizer: str
    vocab_size: int
    bytes_per_token: float
    splits: dict[str, SplitReport]
    packing: PackingReport
    seconds: float
    notes: tuple[str, ...]
    inputs: tuple[InputReport, ...] = ()
    languages: dict[str, LanguageReport] = Field(default_factory=dict)
    clusters: tuple[Cluster, ...] = ()
    lengths: tuple[LengthReport, ...] = ()
    stages: dict[str, float] = Field(default_factory=dict)


class Progress:
    """Context manager that says how far the work is: a live line on a terminal, elsewhere a line every ten seconds.

    Args:
      console: where to; None: nowhere.
    """

    def __init__(self, console: "Console | None" = None):
        self._console = console
        self._status = console.status("") if console is not None and console.is_terminal else None
        self._interval = math.inf if console is None else LIVE_S if self._status else LINE_S
        self._spoken = False
        self.seconds: dict[str, float] = {}  # that each stage took, in order
        self._stage = ""

    def __enter__(self) -> "Progress":
        if self._status:
            self._status.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._status:
            self._status.stop()

    def begin(self, stage: str) -> None:
        """Start a stage; its rates are its own."""
        self.end()
        self._stage, self._start, self._documents, self._bytes = stage, time.perf_counter(), 0, 0
        self._due = self._start + self._interval
        if self._status or self._spoken:
            self._say(stage, spinner="dots")  # shown at once: training may hold the interpreter

    def end(self) -> None:
        """Say that the stage is over."""
        if self._stage:
            self.seconds[self._stage] = self.seconds.get(self._stage, 0.0) + time.perf_counter() - self._start
        self._stage = ""

    def note(self, text: str) -> None:
        """Say what is no progress, and stays on a terminal."""
        if self._console is not None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def advance(self, documents: int, size_bytes: int) -> None:
        """Add what of this stage is done, and say how much that is in all, if it is time to."""
        self._documents += documents
        self._bytes += size_bytes
        now = time.perf_counter()
        if now >= self._due:
            self._due, megabytes = now + self._interval, self._bytes / 1e6
            rate = megabytes / max(now - self._start, 1e-9)
            self._say(f"{self._stage}: {count(self._documents, 'document')}, {megabytes:,.1f} MB, {rate:,.2f} MB/s")

    def _say(self, text: str, spinner: str | None = None) -> None:
        self._spoken = True
        if self._status:
            self._status.update(text, spinner=spinner)
        else:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
            sys.stdout.flush()


def lengths_of(lengths: np.ndarray) -> Iterator[LengthReport]:
    """Yield a histogram of document lengths, int64[n] in tokens, by powers of two."""
    exponents = np.frexp(np.maximum(lengths - 1, 0))[1]  # 2 ** (e - 1) < length <= 2 ** e
    for exponent in range(exponents.min(), exponents.max() + 1) if len(exponents) else ():
        found = lengths[exponents == exponent]
        low = 2 ** (exponent - 1) + 1 if exponent else 1
        yield LengthReport(low=low, high=2**exponent, documents=len(found), tokens=int(found.sum()))


def write_page(path: Path, report: PrepareReport, recipe: str) -> None:
    """Write the report as a page that needs no other file."""
    text = page.render(__package__, "report.html.j2", report=report, recipe=recipe, size=_bytes, nothing=RuleCount())
    files.write_bytes(path, text.encode("utf-8", "replace"))


def _bytes(number: float) -> str:
    size, unit = next(
        (size, unit) for size, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")) if number >= size or size == 1
    )
    return f"{number / size:.3g} {unit}"


def show(report: PrepareReport, console: "Console") -> None:
    """Print the report as tables."""
    from rich.markup import escape
    from rich.table import Column, Table

    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    unit = "conversation" if report.kind == "chat" else "document"
    table = Table(
        Column(), Column(overflow="fold"), title=escape(report.directory), show_header=False, title_justify="left"
    )
    for name, value in _facts(report, unit):
        table.add_row(name, escape(value))
    console.print(table)
    losses = [("unreadable", report.replaced, report.problems - report.replaced, report.problem_examples)]
    losses += [(name, rule.changed, rule.dropped, rule.examples[:1]) for name, rule in report.rules.items()]
    if losses := [each for each in losses if any(each[1:3])]:
        numbers = (Column(name, justify="right") for name in ("changed", f"{unit}s dropped"))
        table = Table("rule", *numbers, title="left out or changed", title_justify="left")
        for name, changed, dropped, _ in losses:
            table.add_row(name, f"{changed:,}", f"{dropped:,}")
        console.print(table)
        for name, _, _, examples in losses:
            for text in examples:
                say(f"{name}: {text}")
    else:
        say("nothing was left out or changed")
    for note in report.notes:
        say(f"note: {note}")
    if losses:
        say(f"more examples, lengths and clusters: {report.directory}/report.html")


def _facts(report: PrepareReport, unit: str) -> Iterator[tuple[str, str]]:
    packing = report.packing
    yield f"{unit}s", f"{report.documents_read:,} read, {report.documents_kept:,} kept"
    yield "text", f"{count(report.bytes_read, 'byte')} read, {report.bytes_kept:,} kept"
    yield "tokenizer", f"{report.tokenizer}, {report.vocab_size:,} ids, {report.bytes_per_token:.2f} bytes per token"
    for name, split in report.splits.items():
        yield name, f"{count(split.documents, unit)}, {count(split.tokens, 'token')}, {split.trained:,} trained"
    rows = f"{count(packing.rows, 'row')} of {packing.seq_len}, {packing.waste:.1%} padding"
    rows += f", {count(packing.dropped, unit)} too long" if packing.dropped else ""
    yield "packing", f"{rows} (if trained at this row length; --seq-len asks for another)"
    yield "time", f"{report.seconds:.1f} s, {report.bytes_read / 1e6 / max(report.seconds, 1e-9):.2f} MB/s"


def held_out_notes(datasets: "Mapping[str, Dataset]", validation: float, can_cut: bool) -> Iterator[str]:
    """Say where much less is held out than was asked for, and what helps.

    Args:
      validation: as in a recipe; can_cut: whether the documents could be smaller (--split paragraph).
    """
    n_train, n_held = (len(datasets[split]) for split in ("train", "validation"))
    tokens, held = (int(datasets[split].starts[-1]) for split in ("train", "validation"))
    cut = "cut finer (--split paragraph) or " * can_cut
    asked = validation if validation < 1 else validation / (n_train + n_held)
    share = held / (tokens + held)
    if validation and not n_held:
        yield (
            f"no document is held out: there are {n_train}; {cut}use --validation 1"
            if n_train > 1
            else f"no document is held out: there is only 1, so training has no validation loss; {cut}add documents "
            "to get one"
        )
    elif 3 * share < asked:
        yield (
            f"{count(held, 'token')} of {tokens + held:,} are held out, {share:.2%}, where {asked:.2%} of the "
            f"documents were asked for: the long ones are not among them; {cut}raise --validation"
        )
