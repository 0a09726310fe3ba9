"""Texts as sequences of units, and hashes of their n-grams: what near duplicates and contamination are measured in.

A unit is a word, or one character of a script that writes no spaces between words (Chinese, Japanese, Thai, Lao,
Khmer, Burmese, Tibetan). So an n-gram of n units is n words of English, n characters of Chinese, and either where they
mix. Case and width do not count (each character is replaced by its NFKC form in lower case if that is one character),
nor do spaces and punctuation. Hashes are 64 bits and a function of the text alone: not of the process, the batch, the
machine or the version of numpy; only letters that Unicode adds later depend on the version of Python.
"""

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np

UNSPACED = (
    (0x0E00, 0x1000), (0x1000, 0x10A0), (0x1780, 0x1800), (0x2E80, 0x2FE0), (0x3005, 0x3008), (0x3040, 0x3130),
    (0x31A0, 0x3200), (0x3400, 0x4DC0), (0x4E00, 0xA000), (0xF900, 0xFB00), (0x20000, 0x40000),
)  # fmt: skip
_UNIFORM = ((0x3400, 0x4DC0), (0x4E00, 0xA000), (0xAC00, 0xD7A4), (0x20000, 0x40000))  # letters without case or width
PART_CHARS = 1 << 18  # longer texts are cut, so that memory does not grow with a document
OVERLAP_CHARS = 1 << 10  # of two parts, so that no n-gram is lost where they meet
_BASE = 0x9E3779B97F4A7C15 | 1  # of the polynomial: odd, so that it has an inverse modulo 2^64


class Units(NamedTuple):
    """The units of some texts, or of parts of them, one after the other.

    Attributes:
      hashes: uint64[n]; never 0.
      begins: int64[n], index of a unit's first character in its text.
      bounds: int64[m + 1]; part i has the units bounds[i]:bounds[i + 1].
      owners: int64[m], index of the text that a part is of; no text has two parts here.
    """

    hashes: np.ndarray
    begins: np.ndarray
    bounds: np.ndarray
    owners: np.ndarray


def mix(values: np.ndarray) -> np.ndarray:
    """Return a bijection of uint64[...] in which every bit depends on every bit (the finalizer of splitmix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@cache
def constants(count: int, start: int = 1) -> np.ndarray:
    """Return `count` fixed odd numbers, uint64, that look random."""
    return mix(np.arange(start, start + count, dtype=np.uint64) * np.uint64(_BASE)) | np.uint64(1)


def units(texts: Sequence[str]) -> Iterator[Units]:
    """Yield the units of all texts in order, a bounded number at a time; long texts come in overlapping parts."""
    parts: list[tuple[int, int, str]] = []
    size = 0
    for owner, text in enumerate(texts):
        for at in range(0, max(len(text), 1), PART_CHARS):
            parts.append((owner, at, text[at : at + PART_CHARS + OVERLAP_CHARS]))
            size += len(parts[-1][2]) + 1
            if size >= PART_CHARS:
                yield _split(parts)
                parts, size = [], 0
    if parts:
        yield _split(parts)


def _split(parts: list[tuple[int, int, str]]) -> Units:
    owners, offsets, texts = zip(*parts, strict=True)
    first = np.cumsum([0, *(len(text) + 1 for text in texts)])  # of each part in the joined text
    codes = np.frombuffer("\n".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    values = _characters()[codes]
    inside = values != 0
    letter = inside & ((values & np.uint64(1)) == 0)
    inside[1:] &= ~(letter[1:] & letter[:-1])
    begins = np.flatnonzero(inside)
    bounds = np.searchsorted(begins, first)
    hashes = values[:0]
    if len(begins):
        powers, inverses = _powers()
        hashes = np.add.reduceat(values * powers[: len(values)], begins) * inverses[begins]
        hashes = mix(hashes) | np.uint64(1)
    shift = np.array(offsets) - first[:-1]
    return Units(hashes, begins + np.repeat(shift, np.diff(bounds)), bounds, np.array(owners))


def windows(found: Units, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of all n-grams of `size` units, uint64[k], and their bounds by part, int64[m + 1].

    A part of fewer units has one n-gram, all of it; one without units has one that is 0.
    """
    counts = np.diff(found.bounds)
    # With size - 1 zeros behind each part (or more behind short ones), no window reaches into the next.
    starts = np.concatenate([[0], np.cumsum(np.maximum(counts, 1) + size - 1)])
    padded = np.zeros(starts[-1], np.uint64)
    padded[np.arange(len(found.hashes)) + np.repeat(starts[:-1] - found.bounds[:-1], counts)] = found.hashes
    n_windows = np.maximum(counts - size + 1, 1)
    bounds = np.concatenate([[0], np.cumsum(n_windows)])
    total = np.zeros(len(padded) - size + 1, np.uint64)
    for offset, factor in enumerate(constants(size)):
        total += padded[offset : offset + len(total)] * factor
    where = np.arange(bounds[-1]) + np.repeat(starts[:-1] - bounds[:-1], n_windows)
    return mix(total[where]), bounds


@cache
def _powers() -> tuple[np.ndarray, np.ndarray]:
    """Powers of the polynomial's base and of its inverse modulo 2^64, for as many characters as a batch can have."""
    count = 2 * PART_CHARS + OVERLAP_CHARS + 2
    power, inverse = np.full((2, count), 1, np.uint64)
    power[1:], inverse[1:] = _BASE, pow(_BASE, -1, 1 << 64)
    return np.cumprod(power, dtype=np.uint64), np.cumprod(inverse, dtype=np.uint64)


@cache
def _characters() -> np.ndarray:
    """Return uint64 by code point: 0 outside units, odd for a character that is a unit, even for part of a word."""
    fold = np.zeros(0x110000, np.uint64)
    for start, stop in _UNIFORM:
        fold[start:stop] = np.arange(start, stop)
    for code in np.flatnonzero(fold[:0x20000] == 0).tolist():
        character = chr(code)
        if unicodedata.category(character)[0] not in "LMN":
            continue
        folded = unicodedata.normalize("NFKC", character).lower()
        fold[code] = ord(folded) if len(folded) == 1 else code
    alone = np.zeros(len(fold), bool)
    for start, stop in UNSPACED:
        alone |= (fold >= start) & (fold < stop)
    values = (mix(fold) | np.uint64(1)) - ~alone
    return np.where(fold == 0, np.uint64(0), values)
