"""Packed rows as a person reads them: which documents, from where, and which tokens are learned."""

import re
from collections.abc import Iterator
from itertools import accumulate, groupby
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from jaxllm.core.wording import count
from jaxllm.data.loader import AnyBatch
from jaxllm.data.packing import Plan
from jaxllm.data.pairs import LabelPlan, PairPlan
from jaxllm.data.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console


N_HARDEST = 8  # tokens of a segment
# Colours by loss: at 3 nats a token had a probability of 5 %, at 6 of 0.25 %.
HEAT = (1.0, "green"), (3.0, "yellow"), (6.0, "red"), (float("inf"), "bold white on red")
BRACKETS = "\N{MATHEMATICAL LEFT WHITE SQUARE BRACKET}", "\N{MATHEMATICAL RIGHT WHITE SQUARE BRACKET}"


class Token(NamedTuple):
    """What a token adds to the text: "" while a character is unfinished; a special token has its name.

    Attributes:
      learned: whether it has a weight in the loss.
      nats: -ln of the probability that a model gave it, where one was asked; of the first token there is none.
    """

    text: str
    learned: bool
    nats: float | None


class Segment(NamedTuple):
    """One document, or the part of it that lies in a row: `n_tokens` positions, `tokens` one more."""

    document: int
    origin: dict[str, str | int]
    n_tokens: int
    tokens: tuple[Token, ...]

    @property
    def place(self) -> str:
        """Which document, for a person to find it again."""
        name = f", id {self.origin['id']}" if "id" in self.origin else ""
        return f"document {self.document}, {self.origin['source']}, {self.origin['location']}{name}"

    @property
    def nats(self) -> float | None:
        """Mean over the learned tokens, where a model was asked and something is learned."""
        found = [token.nats for token in self.tokens if token.learned and token.nats is not None]
        return sum(found) / len(found) if found else None

    def as_json(self) -> dict:
        """Everything, for a program: `tokens` as [text, learned, nats]."""
        return {"document": self.document, **self.origin, "nats": self.nats, "tokens": self.tokens}


def segments(
    plan: Plan,
    index: int,
    tokenizer: Tokenizer,
    row: AnyBatch | None = None,
    nats: np.ndarray | None = None,
    *,
    mark: bool = False,
) -> Iterator[Segment]:
    """Yield the segments of row `index`: of each what is only read first, then the targets with their weights.

    Args:
      row: the row as the loader gives it, with hidden tokens; None: as the plan does.
      nats: [T] of the row's targets, by some model that predicts the next token.
      mark: whether text that spells a special token is told apart from it by a backslash: <\\|user|>.
    """
    row = plan.row(index) if row is None else row
    for number, document in enumerate(plan.documents(index).tolist(), start=1):
        [where] = np.nonzero(row.segments == number)
        if isinstance(plan, PairPlan | LabelPlan):
            source, target = plan.sides.of(document)
            ids, trained = [*source.tolist(), *target.tolist()], [False] * len(source) + [True] * len(target)
        else:
            first = row.tokens[where[: plan.shift]].tolist()  # hidden tokens are targets where they stand
            ids = [*first, *row.targets[where].tolist()]
            trained = [*[False] * len(first), *(row.weights[where] > 0).tolist()]
        losses = [None] * len(ids) if nats is None else [None, *nats[where].tolist()]
        pieces = list(_pieces(ids, tokenizer))
        tokens = map(Token, _mark(pieces, ids, tokenizer.special) if mark else pieces, trained, losses)
        yield Segment(document, plan.dataset.origin(document), len(where), tuple(tokens))


def _pieces(ids: list[int], tokenizer: Tokenizer) -> Iterator[str]:
    names, stream = {token: name for name, token in tokenizer.special.items()}, tokenizer.stream()
    for token in ids[:-1]:
        yield stream.flush() + names[token] if token in names else stream.push(token)
    last = ids[-1]
    yield stream.flush() + names[last] if last in names else stream.push(last) + stream.flush()


def _mark(pieces: list[str], ids: list[int], special: dict[str, int]) -> Iterator[str]:
    spelled = re.compile("|".join(map(re.escape, special)) or "(?!)")
    own = {*special.values()}
    for is_special, group in groupby(zip(pieces, ids, strict=True), lambda pair: pair[1] in own):
        texts = [text for text, _ in group]
        cuts = set() if is_special else {found.start() + 1 for found in spelled.finditer("".join(texts))}
        for start, text in zip(accumulate(map(len, texts), initial=0), texts, strict=False):
            yield "".join("\\" * (place in cuts) + char for place, char in enumerate(text, start))


def show(
    plan: Plan,
    index: int,
    tokenizer: Tokenizer,
    title: str,
    console: "Console",
    row: AnyBatch | None = None,
    nats: np.ndarray | None = None,
) -> None:
    """Print a row: learned tokens green (in brackets without colour), context dim, the provenance before each segment.

    With `nats` [T], learned tokens are coloured by their loss, and the hardest are listed.
    The text's own line ends are the only ones (`soft_wrap`): a terminal may wrap, a file shows what is trained on.
    Text that spells a special token has a backslash in it.
    """
    from rich.markup import escape
    from rich.text import Text

    before, after = ("", "") if _has_colors(console) else BRACKETS
    console.rule(f"[bold]{escape(title)}: {escape(str(plan.dataset.directory))}, row {index}", align="left")
    padding = plan.seq_len
    for number, segment in enumerate(segments(plan, index, tokenizer, row, nats, mark=True), start=1):
        padding -= segment.n_tokens
        loss = "" if segment.nats is None else f", {segment.nats:.2f} nats per token"
        origin = f"-- segment {number}, {count(segment.n_tokens, 'token')}{loss}: {segment.place}"
        console.print(Text(origin, style="cyan"), soft_wrap=True)
        text = Text()
        for style, group in groupby(segment.tokens, _style):
            words = "".join(token.text for token in group)
            text.append(words if style == "dim" else f"{before}{words}{after}", style=style)
        console.print(text, soft_wrap=True)
        if segment.nats is not None:
            worst = sorted((token for token in segment.tokens if token.learned), key=lambda token: -token.nats)
            hardest = "  ".join(f"{token.text!r} {token.nats:.1f}" for token in worst[:N_HARDEST] if token.nats >= 0.05)
            console.print(Text(f"   hardest: {hardest}", style="cyan"), soft_wrap=True)
    if padding:
        console.print(Text(f"-- {count(padding, 'position')} of padding", style="cyan"))


def _style(token: Token) -> str:
    if not token.learned:
        return "dim"
    return "green" if token.nats is None else next(style for bound, style in HEAT if token.nats <= bound)


def show_legend(console: "Console", losses: bool = False) -> None:
    """Say in a line how learned tokens are marked."""
    if _has_colors(console):
        heat = [f"[{style}]up to {bound:g} nats[/]" for bound, style in HEAT[:-1]] + [f"[{HEAT[-1][1]}]above[/]"]
        trained = f"trained: {', '.join(heat)}" if losses else "[green]green: trained[/]"
        console.print(f"{trained}, [dim]dim: only read[/]")
    else:
        console.print(f"{BRACKETS[0]} {BRACKETS[1]}: trained, the rest is only read")


def _has_colors(console: "Console") -> bool:
    return console.color_system is not None and not console.no_color
