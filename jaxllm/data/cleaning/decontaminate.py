"""Decontamination: training documents that share long n-grams with the texts that a model will be evaluated on.

As in GPT-3 (Brown et al. 2020, appendix C): an overlap is a common n-gram of 13 units, which `ngrams` defines (words,
or Chinese characters; no case, no punctuation); an evaluation text of 8 to 12 units must occur as a whole. Shorter
ones are too common to look for, and are counted. Unlike there, either the document goes or the lines that the overlap
touches.
"""

import pickle
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import compress
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from jaxllm.core.config import Config
from jaxllm.data.cleaning.ngrams import Units, units, windows
from jaxllm.data.problems import Problems
from jaxllm.data.reading.sources import Input, documents, name_of

FILTER_BITS = 22  # most n-grams are ruled out by one look into a table of 4 MiB
_MASK = np.uint64((1 << FILTER_BITS) - 1)


class DecontaminateConfig(Config):
    """Evaluation texts to keep out of the training data."""

    against: tuple[Input, ...] = Field((), description="where the evaluation texts are read from")
    ngram: int = Field(13, ge=1, description="words (of Chinese: characters) in a row that make an overlap")
    min_ngram: int = Field(8, ge=1, description="evaluation texts shorter than this are not looked for")
    action: Literal["drop", "cut"] = Field("drop", description="drop the document, or cut the lines of the overlap")


class Evaluation:
    """The n-grams of evaluation texts, 12 bytes each, and 4 MiB for each length; can be pickled for workers.

    Args:
      texts: (source, text); where two sources have the same n-gram, the first one is named.

    Attributes:
      n_texts: by source, texts that are looked for.
      n_short: by source, texts of fewer than `min_ngram` units, which are not.
    """

    def __init__(self, texts: Iterable[tuple[str, str]], config: DecontaminateConfig):
        self.config, pairs = config, list(texts)
        self._sources = list(dict.fromkeys(source for source, _ in pairs))
        of_text = np.array([self._sources.index(source) for source, _ in pairs], np.int32)
        collected: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}
        looked_for = np.zeros(len(pairs), bool)
        least, begins = min(config.min_ngram, config.ngram), []
        for found in units([text for _, text in pairs]):
            sizes = np.minimum(np.diff(found.bounds), config.ngram)
            long = sizes >= least
            begins.append(windows(found, least)[0])
            looked_for[found.owners[long]] = True
            for size in np.unique(sizes[long]).tolist():
                hashes, bounds = windows(found, size)
                part = np.repeat(np.arange(len(sizes)), np.diff(bounds))
                wanted = sizes[part] == size
                collected.setdefault(size, []).append((hashes[wanted], of_text[found.owners[part[wanted]]]))
        self._tables = {size: _table(*map(np.concatenate, zip(*collected[size], strict=True))) for size in collected}
        found = np.concatenate([np.zeros(0, np.uint64), *begins])
        self._begins = least, _table(found, np.zeros(len(found), np.int32))  # few texts have any
        self.n_texts = Counter(source for source, _ in compress(pairs, looked_for))
        self.n_short = Counter(source for source, _ in compress(pairs, ~looked_for))

    def leave(self, text: str) -> str | tuple[str]:
        """Return what is left of a text, or the names of the evaluation sources for which nothing of it may be.

        Without an overlap that is all of it; with one, under "cut", what is not in the lines that it touches.
        """
        spans: list[tuple[int, int]] = []  # of characters
        met: set[int] = set()
        for found in units([text]):
            begun = any(True for _ in _overlaps(found, *self._begins))
            for size, table in self._tables.items() if begun else ():
                for begin, end, source in _overlaps(found, size, table):
                    spans.append((begin, end))
                    met.add(source)
        if not spans:
            return text
        left = _cut(text, spans) if self.config.action == "cut" else ""
        return left if left.strip() else (", ".join(self._sources[source] for source in sorted(met)),)

    def notes(self) -> list[str]:
        """Say of each source how many of its texts are not looked for."""
        few = f"have fewer than {self._begins[0]} words (of Chinese: characters) and are not looked for"
        return [
            f"{short:,} of {short + self.n_texts[source]:,} evaluation texts of {source} {few}"
            for source, short in self.n_short.items()
        ]


def write(config: DecontaminateConfig, mend: Callable[[str], str], directory: Path) -> None:
    """Read the evaluation texts, treat them as documents are with `mend`, and write their n-grams."""
    read = ((name_of(each), mend(found.text)) for each in config.against for found in documents(each, Problems()))
    (directory / "evaluation.pickle").write_bytes(pickle.dumps(Evaluation(read, config)))


@lru_cache(maxsize=1)
def read(directory: Path) -> Evaluation:
    """Return what `write` wrote."""
    return pickle.loads((directory / "evaluation.pickle").read_bytes())  # of our own work directory


def _table(keys: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the sorted distinct keys, the first owner of each, and a filter by the lowest bits."""
    distinct, first = np.unique(keys, return_index=True)
    filled = np.zeros(1 << FILTER_BITS, bool)
    filled[distinct & _MASK] = True
    return distinct, owners[first], filled


def _overlaps(found: Units, size: int, table: tuple[np.ndarray, ...]) -> Iterable[tuple[int, int, int]]:
    """Yield (character where an overlap begins, character where its last unit begins, evaluation source)."""
    distinct, owners, filled = table
    hashes, bounds = windows(found, size)
    maybe = np.flatnonzero(filled[hashes & _MASK])
    place = np.minimum(np.searchsorted(distinct, hashes[maybe]), len(distinct) - 1)
    part = np.searchsorted(bounds, maybe, side="right") - 1
    unit = found.bounds[part] + maybe - bounds[part]
    same = (distinct[place] == hashes[maybe]) & (unit + size <= found.bounds[part + 1])
    for i in np.flatnonzero(same):
        yield int(found.begins[unit[i]]), int(found.begins[unit[i] + size - 1]), int(owners[place[i]])


def _cut(text: str, spans: Iterable[tuple[int, int]]) -> str:
    lines = text.split("\n")
    starts = np.cumsum([0, *(len(line) + 1 for line in lines)]).tolist()
    touched: set[int] = set()
    for begin, end in spans:
        touched.update(range(bisect_right(starts, begin) - 1, bisect_right(starts, end)))
    return "\n".join(line for number, line in enumerate(lines) if number not in touched).strip("\n")
