"""Packing: which tokens make up row i of T positions, planned from document lengths alone.

A position holds an input token and its target, the next token of the same document: n tokens fill n - 1 positions.
Where tokens are hidden and guessed, the target is the token itself, and n tokens fill n. Text is cut wherever a row
ends, unless it is to stay whole; conversations are never cut. Segments and positions restart in every row.
"""

from typing import Literal

import numpy as np
from jaxtyping import Int
from pydantic import Field

from jaxllm.core.batch import Batch
from jaxllm.core.config import Config
from jaxllm.data.shards import Dataset


class PackingConfig(Config):
    """How documents become rows."""

    seq_len: int = Field(1024, ge=2, description="positions per row (tokens)")
    long: Literal["error", "drop"] = Field(
        "error",
        description="a conversation longer than seq_len: stop with an error, or drop it and count it; it is never cut",
    )
    whole: bool = Field(False, description="do not cut texts where a row ends either (a VAE learns whole ones)")


def _waste(plan: "Plan") -> float:
    """Share of positions that are padding."""
    return 1 - plan.n_targets / (len(plan) * plan.seq_len) if len(plan) else 0.0


class TextPlan:
    """Concatenate and chunk: every token of the split is a target exactly once, except the first of each document.

    Example, documents (1 7 8 2) and (1 9 2) at T = 4; 0 is padding:

        row 0  tokens 1 7 8 1   targets 7 8 2 9   segments 1 1 1 2   positions 0 1 2 0
        row 1  tokens 9 0 0 0   targets 2 0 0 0   segments 1 0 0 0   positions 0 0 0 0
    """

    dropped, texts_per_row = 0, 1  # rows cut texts, so whole ones are not counted
    waste = property(_waste)

    def __init__(self, dataset: Dataset, seq_len: int, shift: int = 1):
        self.dataset = dataset
        self.seq_len = seq_len
        self.shift = shift
        self._ends = np.cumsum(dataset.lengths - shift)  # positions used up to and with each document
        self.n_targets = int(self._ends[-1]) if len(self._ends) else 0

    def __len__(self) -> int:
        return (self.n_targets + self.seq_len - 1) // self.seq_len

    def row(self, index: int) -> Batch:
        """Return row `index` as a Batch of arrays [T]."""
        start, stop, first, last = self._bounds(index)
        n = stop - start
        ends = np.minimum(self._ends[first : last + 1], stop) - start
        counts = np.diff(ends, prepend=0)
        local = np.repeat(np.arange(last - first + 1), counts)  # which of the row's documents, [n]
        # The last token of each document is no input, so the stream runs ahead by one with every document.
        where = np.arange(n) + local * self.shift
        tokens = self.dataset.stream(start + int(first) * self.shift, stop + (int(last) + 1) * self.shift)
        batch = _blank(self.seq_len)
        batch.tokens[:n] = tokens[where]
        batch.targets[:n] = tokens[where + self.shift]
        batch.weights[:n] = 1
        batch.segments[:n] = local + 1
        batch.positions[:n] = np.arange(n) - np.repeat(ends - counts, counts)
        return batch

    def documents(self, index: int) -> Int[np.ndarray, "n"]:
        """Documents of row `index`, in the order of their segments."""
        _, _, first, last = self._bounds(index)
        return np.arange(first, last + 1)

    def _bounds(self, index: int) -> tuple[int, int, int, int]:
        """(first position, end, first document, last document) of a row."""
        start, stop = index * self.seq_len, min((index + 1) * self.seq_len, self.n_targets)
        first, last = np.searchsorted(self._ends, (start, stop - 1), side="right")
        return start, stop, int(first), int(last)


class WholePlan:
    """Best-fit decreasing: whole documents, each into the fullest row that still has room for it.

    Args:
      sizes: positions that each document fills. what: a document is called.
    Attributes:
      dropped: those longer than seq_len, left out.
    Raises:
      ValueError: there are such documents and `config.long` is "error", or nothing fits.
    """

    waste = property(_waste)

    def __init__(self, dataset: Dataset, config: PackingConfig, sizes: Int[np.ndarray, "n"], what: str):
        self.dataset = dataset
        self.seq_len = config.seq_len
        self.what = what
        long = sizes > self.seq_len
        self.dropped = int(long.sum())
        if self.dropped and config.long == "error":
            raise ValueError(
                f"{dataset.directory}: {self.dropped} of {len(dataset)} {dataset.split} {what}s do not fit "
                f"into seq_len={self.seq_len}; the longest needs {sizes.max()}; raise seq_len, or set long=drop"
            )
        kept = np.flatnonzero(~long)
        if len(dataset) and not len(kept):
            raise ValueError(f"{dataset.directory}: no {what} fits into seq_len={self.seq_len}; raise seq_len")
        by_size = kept[np.argsort(-sizes[kept], kind="stable")]
        rows = np.array(best_fit(sizes[by_size].tolist(), self.seq_len), np.int64)
        order = np.argsort(rows, kind="stable")
        self._documents = by_size[order]
        n_rows = int(rows.max()) + 1 if len(rows) else 0
        self._starts = np.searchsorted(rows[order], np.arange(n_rows + 1))
        self.n_targets = int(sizes[kept].sum())

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def texts_per_row(self) -> int:
        """Documents of the row that has most of them."""
        return int(np.diff(self._starts).max())

    def documents(self, index: int) -> Int[np.ndarray, "n"]:
        """Documents of row `index`, in the order of their segments."""
        return self._documents[self._starts[index] : self._starts[index + 1]]


class ChatPlan(WholePlan):
    """Whole conversations, or texts; `shift` places from an input to its target."""

    def __init__(self, dataset: Dataset, config: PackingConfig, shift: int = 1):
        self.shift = shift
        what = "conversation" if dataset.kind == "chat" else "text"
        super().__init__(dataset, config, dataset.lengths - shift, what)

    def row(self, index: int) -> Batch:
        """Return row `index` as a Batch of arrays [T]; weight 1 exactly on the answers' tokens.

        Raises:
          ValueError: no token of the row is trained.
        """
        batch = _blank(self.seq_len)
        at = 0
        for segment, document in enumerate(self.documents(index).tolist(), start=1):
            tokens, trained = self.dataset.tokens(document), self.dataset.trained(document)
            end = at + len(tokens) - self.shift
            batch.tokens[at:end] = tokens[: end - at]
            batch.targets[at:end] = tokens[self.shift :]
            batch.weights[at:end] = trained[self.shift :]
            batch.segments[at:end] = segment
            batch.positions[at:end] = np.arange(end - at)
            at = end
        if not batch.weights.any():
            raise ValueError(
                f"{self.dataset.directory}: row {index} has no trained token; the data was not written by this version"
            )
        return batch


Plan = TextPlan | WholePlan


def plan(dataset: Dataset, config: PackingConfig, shift: int = 1) -> Plan:
    """Return the packing that the dataset's kind asks for: the same dataset and config give the same rows."""
    if config.whole or dataset.kind == "chat":
        return ChatPlan(dataset, config, shift)
    return TextPlan(dataset, config.seq_len, shift)


def best_fit(sizes: list[int], capacity: int) -> list[int]:
    """Return the row of each item: the fullest row with room for it, else a new one.

    The set of free spaces that occur is one integer, bit f for "some row has f free", so the best fit is its lowest set
    bit from `size` up: about a microsecond per item, a million items in a second or two.

    Args:
      sizes: each <= capacity, in decreasing order for a good packing.

    Example: sizes 4 3 2 1 with capacity 5 go to rows 0 1 1 0.
    """
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # rows by free space
    spaces = 0
    rows = []
    n_rows = 0
    for size in sizes:
        fitting = spaces >> size
        if fitting:
            free = size + (fitting & -fitting).bit_length() - 1
            row = open_rows[free].pop()
            if not open_rows[free]:
                spaces ^= 1 << free
        else:
            free, row = capacity, n_rows
            n_rows += 1
        rows.append(row)
        open_rows[free - size].append(row)
        spaces |= 1 << (free - size)
    return rows


def _blank(seq_len: int) -> Batch:
    integers = np.zeros((4, seq_len), np.int32)
    return Batch(integers[0], integers[1], np.zeros(seq_len, np.float32), integers[2], integers[3])
