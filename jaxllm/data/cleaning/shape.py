"""What can be measured of a text: its words, lines and repetitions, for spaced scripts and Chinese alike.

Words are runs of characters between spaces; of Chinese and Japanese text, whose words have no spaces between them, each
character is a unit, and 0.6 of a word (Chinese words have 1.6 to 1.7 characters on average). Lengths are bytes of
UTF-8, in which a Chinese character has three: about as many as the English letters that say the same.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np

CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_MARKS = "\u3000-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"  # of CJK: not part of a word
UNIT = re.compile(f"[{CJK}]|[^\\s{CJK}{_MARKS}]+")
_CJK = re.compile(f"[{CJK}]")
_SENTENCE = re.compile("[.!?](?=[\\s\"'\u201d\u2019)]|$)|[\u3002\uff01\uff0e\uff1f]")
END = tuple(".!?\"'\u201d\u2019\u2026\u3002\uff01\uff0e\uff1f\u300d\u300f\uff09)")
_BULLET = re.compile(r"\s*(?:[-*\u2022\u25cf\u25aa\u25e6\u2023\u00b7\u2013]\s|\d+[.)]\s)")
_SYMBOL = re.compile("#|\\.\\.\\.|\u2026")
CJK_WORD = 0.6
# Rae et al. 2021 have the English ones; those of Chinese are as common in any running text.
STOP_WORDS = {
    "en": frozenset(["the", "be", "to", "of", "and", "that", "have", "with"]),
    "zh": frozenset("的是不了在有人这一之也而为与其"),
}


class Shape:
    """One text and what its measures need; each part is computed when it is asked for."""

    def __init__(self, text: str, language: str | None = None):
        self.text = text
        self._language = language
        self._found: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    @cached_property
    def units(self) -> list[str]:
        """Words, and single characters of Chinese and Japanese."""
        return UNIT.findall(self.text)

    @cached_property
    def counts(self) -> Counter[str]:
        """How often each unit occurs."""
        return Counter(self.units)

    @cached_property
    def _n_cjk(self) -> int:
        return sum(count for unit, count in self.counts.items() if _CJK.match(unit))

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not empty."""
        return [line.strip() for line in self.text.split("\n") if line.strip()]

    @cached_property
    def words(self) -> float:
        """Number of words."""
        return len(self.units) - (1 - CJK_WORD) * self._n_cjk

    @property
    def word_length(self) -> float | None:
        """Mean letters of a word; None if the text is mostly Chinese."""
        spaced = len(self.units) - self._n_cjk
        if spaced <= self._n_cjk:
            return None
        return (sum(map(len, self.units)) - self._n_cjk) / spaced

    @property
    def alphabetic(self) -> float:
        """Share of units with a letter."""
        found = sum(count for unit, count in self.counts.items() if unit.isalpha() or any(map(str.isalpha, unit)))
        return found / max(len(self.units), 1)

    @property
    def stop_words(self) -> int | None:
        """How many of the commonest words of its language there are; None if these are not known."""
        language = self._language or ("zh" if 2 * self._n_cjk > len(self.units) else "en")
        known = STOP_WORDS.get(language)
        return None if known is None else len(known.intersection(map(str.lower, self.counts)))

    @cached_property
    def paragraphs(self) -> list[str]:
        """Paragraphs that are not empty; a blank line ends one."""
        return [part.strip() for part in self.text.split("\n\n") if part.strip()]

    @cached_property
    def _lengths(self) -> np.ndarray:
        """Characters of each unit, int64[n]."""
        return np.array([*map(len, self.units)], np.int64)

    def _ngrams(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """(positions, in order, of the n-grams that occur twice or more, the number of the n-gram that stands there).

        An n-gram is the same as another if its first and its last `half` units are, and occurs twice only if they do:
        what is left to compare shrinks fast.
        """
        if size not in self._found:
            if size == 1:
                numbers = {unit: number for number, unit in enumerate(self.counts)}
                ids = np.array([*map(numbers.__getitem__, self.units)], np.int64)
                self._found[size] = np.arange(len(ids)), ids
                return self._found[size]
            half = (size + 1) // 2
            at, which = self._ngrams(half)
            last = np.full(len(self.units) + size, -1, np.int64)
            last[at] = which
            last = last[at + size - half]
            at, keys = at[last >= 0], (which * len(self.units) + last)[last >= 0]
            _, which, counts = np.unique(keys, return_inverse=True, return_counts=True)
            again = counts[which] > 1
            self._found[size] = at[again], which[again]
        return self._found[size]

    def top_ngram(self, size: int) -> float:
        """Share of the text's characters, spaces apart, that the commonest n-gram takes, if it occurs twice."""
        at, which = self._ngrams(size)
        if size == 1 or not len(at):
            return 0.0
        counts = np.bincount(which)
        first = at[np.argmax(which == counts.argmax())]
        return min(1.0, float(self._lengths[first : first + size].sum() * counts.max() / self._lengths.sum()))

    def repeated_ngrams(self, size: int) -> float:
        """Share of the text's characters, spaces apart, in n-grams that it has had before; each counts once.

        It falls with `size`.
        """
        at, which = self._ngrams(size)
        if not len(at):
            return 0.0
        first = np.empty(which.max() + 1, np.int64)
        first[which[::-1]] = at[::-1]
        again = at[at > first[which]]
        edges = np.bincount(again, minlength=len(self.units) + 1) - np.bincount(
            again + size, minlength=len(self.units) + 1
        )
        return float(self._lengths[np.cumsum(edges)[:-1] > 0].sum() / self._lengths.sum())

    def ngram(self, words: int) -> int:
        """How many units `words` words are: as many, and in a text that is mostly Chinese, 1 / 0.6 of them."""
        return round(words / CJK_WORD) if 2 * self._n_cjk > len(self.units) else words


def n_words(units: Iterable[str]) -> float:
    return sum(CJK_WORD if _CJK.match(unit) else 1 for unit in units)


def _share(lines: Sequence[str], test: Callable[[str], object]) -> float:
    return sum(1 for line in lines if test(line)) / max(len(lines), 1)


def _repeated(parts: list[str]) -> tuple[float, float]:
    """Share of parts that were there before, and their share of all bytes."""
    repeats = Counter(parts)
    again = sum(repeats.values()) - len(repeats)
    if not again:
        return 0.0, 0.0
    size = sum(_size(part) * (number - 1) for part, number in repeats.items())
    return again / len(parts), size / sum(map(_size, parts))


def _size(text: str) -> int:
    return len(text.encode("utf-8", "surrogatepass"))


# What a text measures; None: this has no meaning for it.
MEASURES: Mapping[str, Callable[[Shape], float | None]] = {
    "words": lambda shape: shape.words,
    "word_length": lambda shape: shape.word_length,
    "symbols": lambda shape: len(_SYMBOL.findall(shape.text)) / max(shape.words, 1),
    "bullet_lines": lambda shape: _share(shape.lines, _BULLET.match),
    "ellipsis_lines": lambda shape: _share(shape.lines, lambda line: line.endswith(("...", "\u2026"))),
    "alphabetic": lambda shape: shape.alphabetic,
    "stop_words": lambda shape: shape.stop_words,
    "sentences": lambda shape: len(_SENTENCE.findall(shape.text)),
    "braces": lambda shape: shape.text.count("{") + shape.text.count("}"),
    "lorem_ipsum": lambda shape: shape.text.lower().count("lorem ipsum"),
    "ended_lines": lambda shape: _share(shape.lines, lambda line: line.endswith(END)),
    "short_lines": lambda shape: _share(shape.lines, lambda line: len(line) < 30 and _size(line) < 30),
    "repeated_lines": lambda shape: _repeated(shape.lines)[0],
    "repeated_line_bytes": lambda shape: _repeated(shape.lines)[1],
    "repeated_paragraphs": lambda shape: _repeated(shape.paragraphs)[0],
    "repeated_paragraph_bytes": lambda shape: _repeated(shape.paragraphs)[1],
}
