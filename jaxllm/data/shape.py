"""What can be measured of a text: its words, lines and repetitions, for spaced scripts and Chinese alike.

Words are runs of characters between spaces; of Chinese and Japanese text, whose words have no spaces between them, each
character is a unit, and 0.6 of a word (Chinese words have 1.6 to 1.7 characters on average). Lengths are bytes of
UTF-8, in which a Chinese character has three: about as many as the English letters that say the same.
"""

import re
from collections import Counter
from collections.abc import Iterable
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
    """The measures of one text; each is computed when it is asked for. None: it has no meaning for this text."""

    def __init__(self, text: str, language: str | None = None):
        self.text = text
        self._language = language
        self._found: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray]] = {}

    @cached_property
    def units(self) -> list[str]:
        """Words, and single characters of Chinese and Japanese."""
        return UNIT.findall(self.text)

    @cached_property
    def _n_cjk(self) -> int:
        return len(_CJK.findall(self.text))

    @cached_property
    def lines(self) -> list[str]:
        """Lines that are not empty."""
        return [line.strip() for line in self.text.split("\n") if line.strip()]

    @cached_property
    def words(self) -> float:
        return len(self.units) - (1 - CJK_WORD) * self._n_cjk

    @cached_property
    def word_length(self) -> float | None:
        spaced = len(self.units) - self._n_cjk
        if spaced <= self._n_cjk:  # mostly Chinese
            return None
        return (sum(map(len, self.units)) - self._n_cjk) / spaced

    @property
    def symbols(self) -> float:
        return len(_SYMBOL.findall(self.text)) / max(self.words, 1)

    @property
    def bullet_lines(self) -> float:
        return _share(bool(_BULLET.match(line)) for line in self.lines)

    @property
    def ellipsis_lines(self) -> float:
        return _share(line.endswith(("...", "\u2026")) for line in self.lines)

    @property
    def alphabetic(self) -> float:
        return _share(unit.isalpha() or any(map(str.isalpha, unit)) for unit in self.units)

    @property
    def stop_words(self) -> int | None:
        language = self._language or ("zh" if 2 * self._n_cjk > len(self.units) else "en")
        known = STOP_WORDS.get(language)
        return None if known is None else len(known.intersection(unit.lower() for unit in self.units))

    @property
    def sentences(self) -> int:
        return len(_SENTENCE.findall(self.text))

    @property
    def braces(self) -> int:
        return self.text.count("{") + self.text.count("}")

    @property
    def lorem_ipsum(self) -> int:
        return self.text.lower().count("lorem ipsum")

    @property
    def ended_lines(self) -> float:
        return _share(line.endswith(END) for line in self.lines)

    @property
    def short_lines(self) -> float:
        return _share(len(line) < 30 and _size(line) < 30 for line in self.lines)

    @property
    def repeated_lines(self) -> float:
        return _repeated(self.lines)[0]

    @property
    def repeated_line_bytes(self) -> float:
        return _repeated(self.lines)[1]

    @property
    def repeated_paragraphs(self) -> float:
        return _repeated(self._paragraphs)[0]

    @property
    def repeated_paragraph_bytes(self) -> float:
        return _repeated(self._paragraphs)[1]

    @cached_property
    def _paragraphs(self) -> list[str]:
        return [part.strip() for part in self.text.split("\n\n") if part.strip()]

    @cached_property
    def _ids(self) -> tuple[np.ndarray, np.ndarray]:
        """(number of each unit among the different ones, its length in characters), int64[n]."""
        numbers: dict[str, int] = {}
        ids = [numbers.setdefault(unit, len(numbers)) for unit in self.units]
        return np.array(ids, np.int64), np.array([*map(len, self.units)], np.int64)

    def ngram(self, words: int) -> int:
        """Return how many units are as long as `words` words: more of mostly Chinese text, of which five characters
        are about three words and come back in any good text.
        """
        return round(words / CJK_WORD) if 2 * self._n_cjk > len(self.units) else words

    def _ngrams(self, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(first position, number of occurrences) of each different n-gram, and which one stands at each position."""
        if size not in self._found:
            ids = self._ids[0]
            # The n-grams one shorter are numbered without gaps: with the next unit that is a number, and none collides.
            keys = (
                ids
                if size == 1
                else self._ngrams(size - 1)[2][: len(ids) - size + 1] * (len(ids) + 1) + ids[size - 1 :]
            )
            _, first, inverse, counts = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
            self._found[size] = first, counts, inverse
        return self._found[size]

    def top_ngram(self, size: int) -> float:
        """Share of the text's characters, spaces apart, that the commonest n-gram takes, if it occurs twice."""
        first, counts, _ = self._ngrams(size)
        if not len(first) or counts.max() < 2:
            return 0.0
        at = first[counts.argmax()]
        lengths = self._ids[1]
        return min(1.0, float(lengths[at : at + size].sum() * counts.max() / lengths.sum()))

    def repeated_ngrams(self, size: int) -> float:
        """Share of the text's characters, spaces apart, in n-grams that it has had before; each counts once."""
        first, _, which = self._ngrams(size)
        again = np.flatnonzero(first[which] < np.arange(len(which)))
        lengths = self._ids[1]
        covered = np.zeros(len(lengths) + 1, np.int64)
        np.add.at(covered, again, 1)
        np.add.at(covered, again + size, -1)
        return float(lengths[np.cumsum(covered)[:-1] > 0].sum() / max(lengths.sum(), 1))


def n_words(units: Iterable[str]) -> float:
    return sum(CJK_WORD if _CJK.match(unit) else 1 for unit in units)


def _share(found: Iterable[bool]) -> float:
    total = count = 0
    for each in found:
        total, count = total + each, count + 1
    return total / max(count, 1)


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
