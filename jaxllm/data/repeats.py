"""What documents have in common with each other: found part by part, decided over all parts.

`Sign` is a task of one part, as those of `stages`; `decide` compares what the tasks have found, and writes for each
part what is to be left out, which `Encode` does.
"""

import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import chain
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np

from jaxllm.core import files
from jaxllm.core.wording import count
from jaxllm.data import stages
from jaxllm.data.cleaning import dedup
from jaxllm.data.cleaning.clean import RuleCount
from jaxllm.data.cleaning.dedup import DedupConfig, digest, drop_paragraphs, paragraphs, repeated, signatures
from jaxllm.data.documents import Conversation, Document
from jaxllm.data.shard_writer import save_array

N_CLUSTERS, N_MEMBERS = 6, 4  # groups of near duplicates that are reported, and documents of each


@dataclass(frozen=True)
class Sign:
    """Describes the documents of a part by what can be compared.

    Writes signatures.npy (uint32 [n, P]), paragraphs.npy (uint64 [m, 2], digests) and counts.npy (int64 [n], of each
    document), of which what is not asked for is empty.

    Attributes:
      text: what `stages.Clean` left.
    """

    out: Path
    text: Path
    dedup: DedupConfig
    chat: bool

    @property
    def key(self) -> str:
        """What decides the result."""
        return repr((self.text.name, self.dedup))

    def __call__(self, tick: stages.Tick) -> None:
        """Do it."""
        found = [np.zeros((0, self.dedup.permutations), np.uint32)]
        digests, counts = bytearray(), []
        for batch in stages.batches(stages.read_documents(self.text, self.chat)):
            texts = [stages.identity(item) for item in batch]
            if self.dedup.near:
                found.append(signatures(texts, self.dedup))
            if self.dedup.paragraphs != "keep" and not self.chat:
                each = [paragraphs(text, self.dedup) for text in texts]
                counts += map(len, each)
                digests += b"".join(map(digest, chain.from_iterable(each)))
            tick(len(batch), sum(map(stages.size_of, batch)))
        with stages.result(self.out) as directory:
            save_array(directory / "signatures.npy", np.concatenate(found))
            save_array(directory / "paragraphs.npy", np.frombuffer(digests, "<u8").reshape(-1, 2))
            save_array(directory / "counts.npy", np.array(counts, np.int64))


@dataclass(frozen=True)
class Verdicts:
    """What `decide` has said of the documents of a part, for `stages.Encode` to do.

    Attributes:
      near: NAME.near.npy of `decide`. signed: what `Sign` left.
    """

    near: Path
    signed: Path
    dedup: DedupConfig

    @property
    def key(self) -> str:
        """What decides the result."""
        return repr([zlib.crc32(self.near.read_bytes()), zlib.crc32(self._again.read_bytes()), self.dedup])

    @property
    def _again(self) -> Path:
        return self.near.with_suffix("").with_suffix(".paragraphs.npy")

    def open(self) -> Callable[[int, Document | Conversation, stages.Account], Document | Conversation | None]:
        """Return the function that gives what is left of document `number`, and counts what goes."""
        near, again, counts = np.load(self.near), np.load(self._again), np.load(self.signed / "counts.npy")
        bounds = np.cumsum([0, *counts.tolist()])

        def judge(number: int, item: Document | Conversation, account: stages.Account):
            if near[number]:
                account.drop("near_duplicate", item)
                return None
            if not len(counts) or not (marks := again[bounds[number] : bounds[number + 1]]).any():
                return item
            text = drop_paragraphs(item.text, marks.tolist(), self.dedup)
            if not text.strip():
                account.drop("repeated_paragraph", item)
                return None
            account.keep(item, -1)
            item = item._replace(text=text)
            account.keep(item)
            account.rules.setdefault("repeated_paragraph", RuleCount()).changed += 1
            return item

        return judge


def decide(
    texts: "Texts", signed: Sequence[Path], kept: Sequence[Path], config: DedupConfig, out: Path,
    find: Callable[[np.ndarray], np.ndarray],
) -> None:  # fmt: skip
    """Write into `out` for each part NAME.near.npy (bool [n], near duplicates), NAME.paragraphs.npy (bool [m], which
    are repeated) and NAME.npy (bool [n], which documents stay), and clusters.json. The first in the order of parts
    stays.

    Args:
      find: from the numbers of documents over all parts to the first near duplicate of each.
    """
    keep = [np.load(path) for path in kept]
    ends = np.cumsum([len(each) for each in keep])[:-1]
    left = np.concatenate(keep)
    near, stays = np.zeros(len(left), bool), np.flatnonzero(left)
    clusters: list[dict] = []
    if config.near:
        first = find(stays)
        near[stays[first != stays]] = True
        clusters = list(_clusters(texts, stays, first))
    left &= ~near
    files.write_json(out / "clusters.json", clusters)
    again = _repeated_paragraphs(signed, left)
    for path, *arrays in zip(kept, np.split(near, ends), again, np.split(left, ends), strict=True):
        for suffix, array in zip((".near.npy", ".paragraphs.npy", ".npy"), arrays, strict=True):
            save_array(out / f"{path.stem}{suffix}", array)


@dataclass(frozen=True)
class Texts:
    """The documents that `stages.Clean` left in `paths`, by their number over all of these parts."""

    paths: tuple[Path, ...]
    chat: bool

    def item(self, number: int) -> Document | Conversation:
        """Return document `number`."""
        part = bisect_right(self._ends, number)
        path = self.paths[part] / "documents.jsonl"
        with open(path, "rb") as file:
            file.seek(_line_starts(path)[number - (self._ends[part - 1] if part else 0)])
            return stages.parse(file.readline(), self.chat)

    def __call__(self, number: int) -> str:
        """Return the text by which document `number` is compared."""
        return stages.identity(self.item(number))

    @cached_property
    def _ends(self) -> list[int]:
        return np.cumsum([len(np.load(path / "digests.npy", mmap_mode="r")) for path in self.paths]).tolist()


@lru_cache(maxsize=1 << 12)
def _line_starts(path: Path) -> np.ndarray:
    with open(path, "rb") as file:
        return np.cumsum([0, *map(len, file)])


def repeated_ids(texts: Texts, kept: Sequence[Path]) -> list[str]:
    """Say how many of the documents that are `kept` have an id that an earlier one of the same input has."""
    keep = np.concatenate([np.load(path) for path in kept])
    ids = np.concatenate([np.load(path / "ids.npy") for path in texts.paths])
    stays = np.flatnonzero(keep & ids.any(axis=1))
    again = stays[repeated(ids[stays], stays)].tolist()
    if not again:
        return []
    what, at = count(len(again), "document"), texts.item(again[0])
    where = f"the first: {at.source}, {at.location}, id {at.id}"
    return [f"{what} kept with an id that an earlier one of the same input has; {where}"]


def near_duplicates(signed: Sequence[Path], stays: np.ndarray, config: DedupConfig, texts: Texts) -> np.ndarray:
    """Return for each document of `stays` (numbers over all parts, ascending) the first of its cluster."""
    with TemporaryFile(dir=signed[0].parent) as file:  # not in memory: 512 bytes for each document
        start = 0
        for path in signed:
            rows = np.load(path / "signatures.npy", mmap_mode="r")
            file.write(rows[stays[slice(*np.searchsorted(stays, (start, start + len(rows))))] - start].tobytes())
            start += len(rows)
        file.flush()
        rows = np.memmap(file, np.uint32, "r").view(np.ndarray) if len(stays) else np.zeros(0, np.uint32)
        rows = rows.reshape(-1, config.permutations)
        return stays[dedup.near_duplicates(rows, config, lambda row: texts(int(stays[row])))]


def _repeated_paragraphs(signed: Sequence[Path], left: np.ndarray) -> list[np.ndarray]:
    """Which paragraphs of each part an earlier document has, of those that stay."""
    digests = [np.load(path / "paragraphs.npy") for path in signed]
    counts = np.concatenate([np.load(path / "counts.npy") for path in signed])
    everything, again = np.concatenate(digests), np.zeros(sum(map(len, digests)), bool)
    if len(everything):
        owners = np.repeat(np.arange(len(counts)), counts)
        stay = left[owners]
        again[stay] = repeated(everything[stay], owners[stay])
    return np.split(again, np.cumsum([len(each) for each in digests])[:-1])


def _clusters(texts: Texts, stays: np.ndarray, first: np.ndarray) -> Iterator[dict]:
    """The largest groups: how many documents, and what some of them are."""
    roots, sizes = np.unique(first, return_counts=True)
    for at in np.argsort(-sizes, kind="stable")[:N_CLUSTERS]:
        if sizes[at] > 1:
            members = map(texts.item, stays[first == roots[at]][:N_MEMBERS].tolist())
            shown = [f"{item.source}, {item.location}: {stages.texts(item)[0][:80]!r}" for item in members]
            yield {"size": int(sizes[at]), "examples": shown}
