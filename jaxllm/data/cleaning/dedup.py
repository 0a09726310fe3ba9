"""Repeated text: exact copies, repeated paragraphs, and near duplicates by MinHash with locality-sensitive hashing.

Pure functions on texts and arrays, so that a pool of processes and Apache Beam run the same ones. Everywhere the first
in the order of the corpus stays. Near duplicates of documents 0 .. n - 1, in three steps:

1. `signatures` of each batch of texts, anywhere; 4 bytes per permutation and document (512 with the defaults).
2. Per band, documents with the same `band_keys` are a group, and `group_pairs` compares those in it. On Beam this is a
   GroupByKey on (band, key), best first of the indices alone, since most groups are of one document.
   `near_duplicates` does it with a sort for each band.
3. `join` of all pairs (16 bytes each): duplicates of duplicates belong together.

Sets: the n-grams of `ngrams`, words or Chinese characters. Two documents whose sets have the Jaccard similarity
s = |A & B| / |A | B| agree in each value of their signatures with probability s (Broder 1997), so in all `rows` values
of one of `bands` bands with probability 1 - (1 - s^rows)^bands, the S-curve (Leskovec, Rajaraman, Ullman, Mining of
Massive Datasets, ch. 3). With the defaults, 18 bands of 7 rows find 0.985 of the pairs at s = 0.8, 0.9999 at 0.9, and
0.51 at 0.6; `verify` then drops those of them whose signatures agree in less than the threshold; where these leave it
open (within `NOISE` standard deviations of the threshold), the n-grams themselves are compared.

Where many texts are made after one pattern, most of them share bands, and to compare all with all would take a time
that grows with the square of their number. So of a group only `ROUNDS` documents that differ are compared with all the
others, and these with `NEIGHBOURS` behind them in the order of their signatures (Hernandez and Stolfo 1995).
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cache
from typing import Literal

import numpy as np
from pydantic import Field

from jaxllm.core.config import Config
from jaxllm.data.cleaning.ngrams import constants, mix, units, windows

ROWS_AT_ONCE = 1 << 14  # signatures worked on at once: 8 MiB
PAIRS_AT_ONCE = 1 << 9  # of which the n-grams are compared
ROUNDS, NEIGHBOURS, SORTED = 32, 8, 32  # SORTED: values of a signature that decide who is a neighbour
NOISE = 3.0  # standard deviations of a similarity by signatures
SETS = 1 << 23  # n-grams of documents kept in memory for comparing: 64 MiB
BAND_RECALL = 0.95  # of the pairs exactly at the threshold that share a band; more rows would find fewer
_SEPARATOR = {"line": re.compile("(\n+)"), "blank_line": re.compile("(\n[ \t\u3000]*\n\\s*)")}


class DedupConfig(Config):
    """Which repetitions across documents are dropped; exact copies of documents are `clean.deduplicate`."""

    paragraphs: Literal["keep", "line", "blank_line"] = Field(
        "keep", description="drop paragraphs that an earlier document has; they end at a newline or at a blank line"
    )
    paragraph_min_bytes: int = Field(
        100, ge=1, description="shorter paragraphs stay; UTF-8, in which a Chinese character is 3 bytes"
    )
    near: bool = Field(False, description="drop near duplicates of earlier documents (MinHash)")
    threshold: float = Field(0.8, gt=0, lt=1, description="Jaccard similarity of n-grams that makes a near duplicate")
    ngram: int = Field(5, ge=1, description="words (of Chinese: characters) in one n-gram")
    permutations: int = Field(128, ge=16, le=4096, description="values in a signature; their noise is 1 / (2 sqrt(n))")
    verify: bool = Field(True, description="compare whole signatures, and in doubt the n-grams, not only one band")


def digest(text: str) -> bytes:
    """Return 128 bits of `text`: no two of 10^12 different texts meet."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def repeated(keys: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """Return bool[n]: whether the key of an earlier owner is the same.

    Args:
      keys: uint64[n, 2], digests.
      owners: int64[n], document of each, ascending; a repetition inside one document is none.
    """
    order = np.lexsort(keys.T)  # stable: of equal keys the first comes first
    new = np.append(True, (keys[order[1:]] != keys[order[:-1]]).any(axis=1))[: len(keys)]
    again = np.empty(len(keys), bool)
    again[order] = owners[order] > owners[order[new]][np.cumsum(new) - 1]
    return again


def paragraphs(text: str, config: DedupConfig) -> list[str]:
    """Return the paragraphs of `text` that count, in order."""
    return [part for part in _SEPARATOR[config.paragraphs].split(text)[::2] if _counts(part, config)]


def drop_paragraphs(text: str, dropped: Sequence[bool], config: DedupConfig) -> str:
    """Return `text` without those of its `paragraphs` for which `dropped` is True; what separates them goes too."""
    parts = _SEPARATOR[config.paragraphs].split(text)
    verdicts = iter(dropped)
    pairs = zip(["", *parts[1::2]], parts[::2], strict=True)
    kept = [pair for pair in pairs if not (_counts(pair[1], config) and next(verdicts))]
    return "".join(separator * bool(number) + part for number, (separator, part) in enumerate(kept))


def _counts(paragraph: str, config: DedupConfig) -> bool:
    return len(paragraph.encode("utf-8", "surrogatepass")) >= config.paragraph_min_bytes


@cache
def bands(threshold: float, permutations: int) -> tuple[int, int]:
    """Return how a signature is cut: (bands, rows), values in each; those behind the last band only verify.

    These are the bands with the most rows, so the fewest false candidates, that find `BAND_RECALL` at the threshold.

    Raises:
      ValueError: there are too few permutations for any.
    """
    for rows in range(permutations, 0, -1):
        if 1 - (1 - threshold**rows) ** (permutations // rows) >= BAND_RECALL:
            return permutations // rows, rows
    raise ValueError(
        f"{permutations} permutations cannot find {BAND_RECALL:.0%} of the pairs at threshold {threshold}; "
        "raise permutations or threshold"
    )


def signatures(texts: Sequence[str], config: DedupConfig) -> np.ndarray:
    """Return MinHash signatures, uint32[n, permutations]; each a function of its text and the config alone."""
    factors, addends = (mix(constants(config.permutations, start)) >> np.uint64(32) for start in (1000, 10_000))
    factors, addends = factors.astype(np.uint32) | np.uint32(1), addends.astype(np.uint32)
    result = np.full((len(texts), config.permutations), np.iinfo(np.uint32).max, np.uint32)
    for found in units(texts):
        hashes, bounds = windows(found, config.ngram)
        for part in np.flatnonzero(hashes[bounds[:-1]] == 0):  # no word at all: only exact copies are alike
            hashes[bounds[part]] = int.from_bytes(digest(texts[found.owners[part]])[:8], "little")
        values = (hashes >> np.uint64(32)).astype(np.uint32)
        smallest = np.empty((config.permutations, len(found.owners)), np.uint32)
        hashed = np.empty_like(values)
        for out, factor, addend in zip(smallest, factors, addends, strict=True):
            np.multiply(values, factor, out=hashed)
            np.add(hashed, addend, out=hashed)
            np.minimum.reduceat(hashed, bounds[:-1], out=out)
        result[found.owners] = np.minimum(result[found.owners], smallest.T)  # a long text comes in parts
    return result


def band_keys(rows: np.ndarray, config: DedupConfig) -> np.ndarray:
    """Return the key of each band of signatures uint32[n, P], uint64[n, bands]; different bands may share a key."""
    count, _ = bands(config.threshold, config.permutations)
    return np.stack([_band_key(rows, band, config) for band in range(count)], axis=1)


def _band_key(rows: np.ndarray, band: int, config: DedupConfig) -> np.ndarray:
    _, size = bands(config.threshold, config.permutations)
    factors, keys = constants(size), np.empty(len(rows), np.uint64)
    for at in range(0, len(rows), ROWS_AT_ONCE):
        values = rows[at : at + ROWS_AT_ONCE, band * size : (band + 1) * size].astype(np.uint64)
        keys[at : at + ROWS_AT_ONCE] = mix((mix(values + factors) * factors).sum(axis=1, dtype=np.uint64))
    return keys


def group_pairs(
    indices: np.ndarray, rows: np.ndarray, config: DedupConfig, text: Callable[[int], str] | None = None
) -> np.ndarray:
    """Return the pairs of duplicates among documents that share a band: enough to connect all that are alike.

    Args:
      indices: int64[m], ascending.
      rows: uint32[m, P], their signatures.
      text: the text of each of `indices`; None: signatures decide alone.
    Returns:
      int64[k, 2] of `indices`, the earlier first.
    """
    alike = _Alike(rows, config, text and (lambda at: text(int(indices[at]))))
    return indices[_pairs(np.arange(len(indices)), np.zeros(len(indices), np.int64), alike)]


def near_duplicates(rows: np.ndarray, config: DedupConfig, text: Callable[[int], str] | None = None) -> np.ndarray:
    """Return for each signature, uint32[n, P], the index of the first of its cluster, int64[n]; itself for the first.

    `rows` may be a memory map. Needs about 80 bytes per document beside it.

    Args:
      text: the text of each row; None: signatures decide alone.
    """
    root, alike = np.arange(len(rows)), _Alike(rows, config, text)
    for band in range(bands(config.threshold, config.permutations)[0]):
        keys = _band_key(rows, band, config)
        order = np.argsort(keys, kind="stable")
        groups = np.cumsum(_first(keys[order]))
        shared = np.bincount(groups)[groups] > 1
        root = join(root, _pairs(order[shared], groups[shared], alike))
    return root


class _Alike:
    """Which of the pairs int64[k, 2] of rows are duplicates, bool[k]."""

    def __init__(self, rows: np.ndarray, config: DedupConfig, text: Callable[[int], str] | None):
        self.rows, self._config, self._text = rows, config, text
        self._sets: dict[int, np.ndarray] = {}

    def __call__(self, pairs: np.ndarray) -> np.ndarray:
        threshold, count = self._config.threshold, self._config.permutations
        if not self._config.verify:
            return np.ones(len(pairs), bool)
        found = similarity(self.rows, pairs)
        noise = NOISE * (threshold * (1 - threshold) / count) ** 0.5
        open_ = np.flatnonzero(np.abs(found - threshold) < noise) if self._text else []
        for start in range(0, len(open_), PAIRS_AT_ONCE):
            some = open_[start : start + PAIRS_AT_ONCE]
            self._read(pairs[some].ravel().tolist())
            found[some] = [_jaccard(self._sets[a], self._sets[b]) for a, b in pairs[some].tolist()]
        return found >= threshold

    def _read(self, indices: Sequence[int]) -> None:
        """Have the n-grams of these texts in `_sets`; beside them, those of some that were asked for before."""
        if sum(map(len, self._sets.values())) > SETS:
            self._sets.clear()
        new = [index for index in dict.fromkeys(indices) if index not in self._sets]
        parts: dict[int, list[np.ndarray]] = {index: [] for index in new}
        for found in units([self._text(index) for index in new]):
            hashes, bounds = windows(found, self._config.ngram)
            for owner, each in zip(found.owners.tolist(), np.split(hashes, bounds[1:-1]), strict=True):
                parts[new[owner]].append(each)
        self._sets |= {index: np.unique(np.concatenate(each)) for index, each in parts.items()}


def _jaccard(a: np.ndarray, b: np.ndarray) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)


def _pairs(indices: np.ndarray, groups: np.ndarray, alike: _Alike) -> np.ndarray:
    """Compare the first of each group with the others, then the first of those that differ with the rest, and so on."""
    found = [np.empty((0, 2), np.int64)]
    for _ in range(ROUNDS):
        if not len(indices):
            break
        first = _first(groups)
        pairs = np.stack([indices[first][np.cumsum(first) - 1], indices], axis=1)[~first]
        same = alike(pairs)
        found.append(pairs[same])
        indices, groups = indices[~first][~same], groups[~first][~same]
    indices, groups = _sorted(indices, groups, alike.rows)
    for step in range(1, min(NEIGHBOURS + 1, len(indices))):
        pairs = np.sort(np.stack([indices[:-step], indices[step:]], axis=1)[groups[:-step] == groups[step:]], axis=1)
        found.append(pairs[alike(pairs)])
    return np.concatenate(found)


def _first(groups: np.ndarray) -> np.ndarray:
    return np.append(True, groups[1:] != groups[:-1])[: len(groups)]


def _sorted(indices: np.ndarray, groups: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Put the members of each group in the order of some values of their signatures, in each group others."""
    first = _first(groups)
    begin = rows[indices[first], 0][np.cumsum(first) - 1].astype(np.int64)
    values = rows[indices[:, None], (begin[:, None] + np.arange(SORTED)) % rows.shape[1]]
    order = np.lexsort([*values.T[::-1], groups])
    return indices[order], groups[order]


def similarity(rows: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the estimated Jaccard similarity of pairs int64[k, 2], float64[k]: the share of equal values."""
    pieces = [pairs[at : at + ROWS_AT_ONCE] for at in range(0, len(pairs), ROWS_AT_ONCE)]
    return np.concatenate([[], *((rows[each[:, 0]] == rows[each[:, 1]]).mean(axis=1) for each in pieces)])


def join(root: np.ndarray, pairs: np.ndarray) -> np.ndarray:
    """Return the smallest index of the connected component of each node, int64[n], when `pairs` are joined.

    Args:
      root: the same before; np.arange(n) where nothing was joined yet.
      pairs: int64[k, 2] of nodes, in any order.
    """
    root = root.copy()
    while len(pairs):
        ends = np.sort(root[pairs], axis=1)
        pairs = pairs[ends[:, 0] != ends[:, 1]]
        np.minimum.at(root, ends[:, 1], ends[:, 0])  # the larger root hangs below the smaller
        while not np.array_equal(above := root[root], root):
            root = above
    return root
