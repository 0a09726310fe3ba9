"""What `prepare` did, as data (report.json) and as tables for a person."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jaxllm.core.config import Record
from jaxllm.core.wording import count
from jaxllm.data.clean import RuleCount

if TYPE_CHECKING:
    from rich.console import Console


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


class PrepareReport(Record):
    """The account of one `prepare`: everything that was read is either stored or counted here as left out."""

    directory: str
    kind: str
    documents_read: int
    documents_kept: int
    bytes_read: int
    bytes_kept: int
    problems: int
    problem_examples: tuple[str, ...]
    rules: dict[str, RuleCount]
    tokenizer: str
    vocab_size: int
    bytes_per_token: float
    splits: dict[str, SplitReport]
    packing: PackingReport
    seconds: float
    notes: tuple[str, ...]


def show(report: PrepareReport, console: "Console") -> None:
    """Print the report as tables."""
    from rich.markup import escape
    from rich.table import Table

    unit = "conversation" if report.kind == "chat" else "document"
    table = Table(title=escape(report.directory), show_header=False, title_justify="left")
    for name, value in _facts(report, unit):
        table.add_row(name, escape(value))
    console.print(table)
    losses = [("unreadable", 0, report.problems, report.problem_examples)]
    losses += [(name, rule.changed, rule.dropped, rule.examples) for name, rule in report.rules.items()]
    if any(changed or dropped for _, changed, dropped, _ in losses):
        table = Table("rule", "changed", f"{unit}s dropped", "examples", title="left out", title_justify="left")
        for name, changed, dropped, examples in losses:
            table.add_row(name, f"{changed:,}", f"{dropped:,}", escape("\n".join(examples)))
        console.print(table)
    else:
        console.print("nothing was left out or changed")
    for note in report.notes:
        console.print(f"note: {escape(note)}")


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
