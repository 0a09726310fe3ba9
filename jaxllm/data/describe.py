"""Packed rows as a person reads them: which documents, from where, and which tokens are learned."""

from collections.abc import Iterator
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxllm.core.wording import count
from jaxllm.data.packing import Plan
from jaxllm.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console


BRACKETS = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"


class Segment(NamedTuple):
    """One document, or the part of it that lies in a row: `n_tokens` positions.

    Attributes:
      spans: (text, whether it is learned) of consecutive tokens of one kind; special tokens appear by name.
    """

    document: int
    source: str
    location: str
    n_tokens: int
    spans: tuple[tuple[str, bool], ...]
    offset: int | None = None
    id: str | None = None


def segments(plan: Plan, index: int, tokenizer: Tokenizer) -> Iterator[Segment]:
    """Yield the segments of row `index`: of each its first input, then the targets with their weights."""
    batch = plan.row(index)
    for number, document in enumerate(plan.documents(index).tolist(), start=1):
        [where] = np.nonzero(batch.segments == number)
        ids = [int(batch.tokens[where[0]]), *batch.targets[where].tolist()]
        trained = [False, *(batch.weights[where] > 0).tolist()]
        yield Segment(
            document, **plan.dataset.origin(document), n_tokens=len(where), spans=tuple(_spans(ids, trained, tokenizer))
        )


def _spans(ids: list[int], trained: list[bool], tokenizer: Tokenizer) -> Iterator[tuple[str, bool]]:
    names = {token: name for name, token in tokenizer.special.items()}
    for learn, group in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1]):
        stream = tokenizer.stream()
        parts = [stream.flush() + names[token] if token in names else stream.push(token) for token, _ in group]
        yield "".join(parts) + stream.flush(), learn


def show(plan: Plan, index: int, tokenizer: Tokenizer, title: str, console: "Console") -> None:
    """Print a row: learned tokens green (in brackets without colour), context dim, the provenance before each segment.

    The text's own line ends are the only ones (`soft_wrap`): a terminal may wrap, a file shows what is trained on.
    """
    from rich.markup import escape
    from rich.text import Text

    before, after = ("", "") if _has_colors(console) else BRACKETS
    console.rule(f"[bold]{escape(title)}: {escape(str(plan.dataset.directory))}, row {index}", align="left")
    padding = plan.seq_len
    for number, segment in enumerate(segments(plan, index, tokenizer), start=1):
        padding -= segment.n_tokens
        place = f"document {segment.document}, {segment.source}, {segment.location}"
        place += f", id {segment.id}" if segment.id else ""
        origin = f"-- segment {number}, {count(segment.n_tokens, 'token')}: {place}"
        console.print(Text(origin, style="cyan"), soft_wrap=True)
        text = Text()
        for words, learned in segment.spans:
            text.append(f"{before}{words}{after}" if learned else words, style="green" if learned else "dim")
        console.print(text, soft_wrap=True)
    if padding:
        console.print(Text(f"-- {count(padding, 'position')} of padding", style="cyan"))


def show_legend(console: "Console") -> None:
    """Say in a line how learned tokens are marked."""
    if _has_colors(console):
        console.print("[green]green: trained[/], [dim]dim: only read[/]")
    else:
        console.print(f"{BRACKETS[0]} {BRACKETS[1]}: trained, the rest is only read")


def _has_colors(console: "Console") -> bool:
    return console.color_system is not None and not console.no_color
