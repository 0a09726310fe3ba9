"""Packed rows as a person reads them: which documents, from where, and which tokens are learned."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.core.wording import count
from jaxllm.data.loader import Loader
from jaxllm.data.packing import Plan
from jaxllm.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console


BRACKETS = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of one kind, decoded; special tokens appear by name."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class SegmentDescription:
    """One document (or the part of it that lies in the row): `n_tokens` positions."""

    document: int
    source: str
    location: str
    n_tokens: int
    spans: tuple[Span, ...]


@dataclass(frozen=True, slots=True)
class RowDescription:
    """One row: which row of which dataset, its segments, and how many positions are padding."""

    dataset: str
    row: int
    n_padding: int
    segments: tuple[SegmentDescription, ...]


def describe_row(plan: Plan, index: int, tokenizer: Tokenizer) -> RowDescription:
    """Describe row `index` of a plan: for each segment its first input, then the targets with their weights."""
    batch = plan.row(index)
    segments = []
    for number, document in enumerate(plan.documents(index).tolist(), start=1):
        [where] = np.nonzero(batch.segments == number)
        ids = [int(batch.tokens[where[0]]), *batch.targets[where].tolist()]
        trained = [False, *(batch.weights[where] > 0).tolist()]
        origin = plan.dataset.origin(document)
        spans = tuple(_spans(ids, trained, tokenizer))
        segments.append(SegmentDescription(document, origin["source"], origin["location"], len(where), spans))
    return RowDescription(str(plan.dataset.directory), index, int((batch.segments == 0).sum()), tuple(segments))


def describe_samples(loader: Loader, samples: range, tokenizer: Tokenizer) -> Iterator[RowDescription]:
    """Describe global samples of a loader; step s of a run is range(s * batch_size, (s + 1) * batch_size)."""
    for sample in samples:
        source, row = loader.locate(sample)
        yield describe_row(loader.plans[source], row, tokenizer)


def show(row: RowDescription, title: str, console: "Console") -> None:
    """Print a row: learned tokens green (in brackets without colour), context dim, the provenance before each segment.

    The text's own line ends are the only ones (`soft_wrap`): a terminal may wrap, a file shows what is trained on.
    """
    from rich.markup import escape
    from rich.text import Text

    before, after = ("", "") if _has_colors(console) else BRACKETS
    console.rule(f"[bold]{escape(title)}: {escape(row.dataset)}, row {row.row}", align="left")
    for number, segment in enumerate(row.segments, start=1):
        place = f"document {segment.document}, {segment.source}, {segment.location}"
        origin = f"-- segment {number}, {count(segment.n_tokens, 'token')}: {place}"
        console.print(Text(origin, style="cyan"), soft_wrap=True)
        text = Text()
        for span in segment.spans:
            marked = f"{before}{span.text}{after}" if span.trained else span.text
            text.append(marked, style="green" if span.trained else "dim")
        console.print(text, soft_wrap=True)
    if row.n_padding:
        console.print(Text(f"-- {count(row.n_padding, 'position')} of padding", style="cyan"))


def show_legend(console: "Console") -> None:
    """Say in a line how learned tokens are marked."""
    if _has_colors(console):
        console.print("[green]green: trained[/], [dim]dim: only read[/]")
    else:
        console.print(f"{BRACKETS[0]} {BRACKETS[1]}: trained, the rest is only read")


def _has_colors(console: "Console") -> bool:
    return console.color_system is not None and not console.no_color


def _spans(ids: list[int], trained: list[bool], tokenizer: Tokenizer) -> Iterator[Span]:
    names = {token: name for name, token in tokenizer.special.items()}
    for learn, group in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        stream = tokenizer.stream()
        parts = [stream.flush() + names[token] if token in names else stream.push(token) for token, _ in group]
        yield Span("".join(parts) + stream.flush(), learn)
