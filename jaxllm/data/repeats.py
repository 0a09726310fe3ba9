"""What documents have in common, with each other and with evaluation texts: found part by part, decided over all parts.

`Sign` is a task of one part, as those of `stages`; `decide` compares what the tasks have found, and writes for each
part what is to be left out, which `Encode` does.
"""

import json
import pickle
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path

import numpy as np

from jaxllm.core import files
from jaxllm.data import stages
from jaxllm.data.clean import RuleCount
from jaxllm.data.decontaminate import DecontaminateConfig, Evaluation
from jaxllm.data.dedup import DedupConfig, digest, drop_paragraphs, near_duplicates, paragraphs, repeated, signatures
from jaxllm.data.documents import Conversation, Document
from jaxllm.data.problems import Problems
from jaxllm.data.shard_writer import save_array
from jaxllm.data.sources import documents

KEPT, NEAR, CONTAMINATED = 0, 1, 2  # what is said of a document
RULES = {NEAR: "near_duplicate", CONTAMINATED: "contaminated"}
N_CLUSTERS, N_MEMBERS = 6, 4  # groups of near duplicates that are reported, and documents of each


@dataclass(frozen=True)
class Sign:
    """Describes the documents of a part by what can be compared.

    Writes signatures.npy (uint32 [n, P]), paragraphs.npy (uint64 [m, 2], digests) with counts.npy (int64 [n], of each
    document), met.json ({number: [text that is left, evaluation sources]}), of which what is not asked for is empty.

    Attributes:
      text: what `stages.Clean` left. evaluation: what `write_evaluation` wrote, or None.
    """

    out: Path
    text: Path
    dedup: DedupConfig
    evaluation: Path | None
    chat: bool

    @property
    def key(self) -> str:
        """What decides the result."""
        return repr((self.text.name, self.dedup, self.evaluation and self.evaluation.name))

    def __call__(self, tick: stages.Tick) -> None:
        """Do it."""
        evaluation = None if self.evaluation is None else _evaluation(self.evaluation)
        found: list[np.ndarray] = []
        digests, counts, met, number = bytearray(), [], {}, 0
        for batch in _batches(stages.read_documents(self.text, self.chat)):
            texts = [stages.identity(item) for item in batch]
            if self.dedup.near:
                found.append(signatures(texts, self.dedup))
            if self.dedup.paragraphs != "keep" and not self.chat:
                each = [paragraphs(text, self.dedup) for text in texts]
                counts += map(len, each)
                digests += b"".join(map(digest, chain.from_iterable(each)))
            for hit in evaluation.hits(texts) if evaluation is not None else ():
                met[number + hit.index] = ["" if self.chat else hit.left, hit.sources]
            number += len(batch)
            tick(len(batch), sum(map(stages.size_of, batch)))
        with stages.result(self.out) as directory:
            nothing = np.zeros((0, self.dedup.permutations), np.uint32)
            save_array(directory / "signatures.npy", np.concatenate([nothing, *found]))
            save_array(directory / "paragraphs.npy", np.frombuffer(digests, "<u8").reshape(-1, 2))
            save_array(directory / "counts.npy", np.array(counts, np.int64))
            files.write_json(directory / "met.json", met)


@dataclass(frozen=True)
class Verdicts:
    """What `decide` has said of the documents of a part, for `stages.Encode` to do.

    Attributes:
      said: NAME.npy of `decide`. signed: what `Sign` left.
    """

    said: Path
    signed: Path
    dedup: DedupConfig

    @property
    def key(self) -> str:
        """What decides the result."""
        contents = [self.said.read_bytes(), self._marks.read_bytes(), (self.signed / "met.json").read_bytes()]
        return repr([*map(zlib.crc32, contents), self.dedup])

    @property
    def _marks(self) -> Path:
        return self.said.with_name(f"{self.said.stem}.paragraphs.npy")

    def open(self) -> Callable[[int, Document | Conversation, stages.Account], Document | Conversation | None]:
        """Return the function that gives what is left of document `number`, and counts what goes."""
        said, again, counts = np.load(self.said), np.load(self._marks), np.load(self.signed / "counts.npy")
        bounds, met = np.cumsum([0, *counts.tolist()]), files.read_json(self.signed / "met.json")

        def judge(number: int, item: Document | Conversation, account: stages.Account):
            if said[number] != KEPT:
                named = f"{', '.join(met[str(number)][1])}: " if said[number] == CONTAMINATED else ""
                account.drop(RULES[said[number]], item, named)
                return None
            text = None
            if str(number) in met:
                rule, text = "contaminated", met[str(number)][0]
            elif len(counts) and (marks := again[bounds[number] : bounds[number + 1]]).any():
                rule, text = "repeated_paragraph", drop_paragraphs(item.text, marks.tolist(), self.dedup)
            if text is None:
                return item
            if not text.strip():
                account.drop(rule, item)
                return None
            account.bytes_kept -= stages.size_of(item)
            item = replace(item, text=text)
            account.bytes_kept += stages.size_of(item)
            account.rules.setdefault(rule, RuleCount()).changed += 1
            return item

        return judge


def write_evaluation(config: DecontaminateConfig, out: Path) -> None:
    """Read the evaluation texts and write their n-grams into the directory `out`."""
    texts = ((each.path if hasattr(each, "path") else each.kind, each) for each in config.against)
    read = ((name, found.text) for name, each in texts for found in documents(each, Problems()))
    with stages.result(out) as directory, open(directory / "evaluation.pickle", "wb") as file:
        pickle.dump(Evaluation(read, config), file)


def decide(
    texts: Sequence[Path], signed: Sequence[Path], kept: Sequence[Path], config: DedupConfig, out: Path,
    find: Callable[[np.ndarray], np.ndarray] | None = None,
) -> None:  # fmt: skip
    """Write into `out` for each part NAME.npy (uint8 [n], what is said of a document), NAME.paragraphs.npy (bool [m],
    which are repeated) and NAME.keep.npy (bool [n]), and clusters.json. The first in the order of parts stays.

    Args:
      find: from the numbers of documents over all parts to the first near duplicate of each; None: here.
    """
    keep = [np.load(path) for path in kept]
    ends = np.cumsum([len(each) for each in keep])[:-1]
    said = np.zeros(sum(map(len, keep)), np.uint8)
    for start, path in zip([0, *ends.tolist()], signed, strict=True):
        met = files.read_json(path / "met.json")
        said[[start + int(number) for number, (left, _) in met.items() if not left]] = CONTAMINATED
    stays = np.flatnonzero(np.concatenate(keep) & (said == KEPT))
    clusters: list[dict] = []
    if config.near:
        first = _first_alike(signed, stays, config) if find is None else find(stays)
        said[stays[first != stays]] = NEAR
        clusters = list(_clusters(texts, ends, stays, first))
    files.write_json(out / "clusters.json", clusters)
    again = _repeated_paragraphs(signed, said, np.concatenate(keep))
    for path, one, which, mask in zip(kept, np.split(said, ends), keep, again, strict=True):
        save_array(out / path.name, one)
        save_array(out / f"{path.stem}.paragraphs.npy", mask)
        save_array(out / f"{path.stem}.keep.npy", which & (one == KEPT))


def _first_alike(signed: Sequence[Path], stays: np.ndarray, config: DedupConfig) -> np.ndarray:
    rows = np.concatenate([np.load(path / "signatures.npy", mmap_mode="r") for path in signed])[stays]
    return stays[near_duplicates(rows, config)]


def _repeated_paragraphs(signed: Sequence[Path], said: np.ndarray, keep: np.ndarray) -> list[np.ndarray]:
    """Which paragraphs of each part an earlier document has, of those that stay."""
    digests = [np.load(path / "paragraphs.npy") for path in signed]
    counts = np.concatenate([np.load(path / "counts.npy") for path in signed])
    everything = np.ascontiguousarray(np.concatenate(digests)).view("V16").ravel()
    again = np.zeros(len(everything), bool)
    if len(everything):
        owners = np.repeat(np.arange(len(counts)), counts)
        stay = ((said == KEPT) & keep)[owners]
        again[stay] = repeated(everything[stay], owners[stay])
    return np.split(again, np.cumsum([len(each) for each in digests])[:-1])


def _clusters(texts: Sequence[Path], ends: np.ndarray, stays: np.ndarray, first: np.ndarray) -> Iterator[dict]:
    """The largest groups: how many documents, and what some of them are."""
    roots, sizes = np.unique(first, return_counts=True)
    for at in np.argsort(-sizes, kind="stable")[:N_CLUSTERS]:
        if sizes[at] > 1:
            members = stays[first == roots[at]][:N_MEMBERS]
            yield {"size": int(sizes[at]), "examples": [_shown(texts, ends, int(member)) for member in members]}


def _shown(texts: Sequence[Path], ends: np.ndarray, number: int) -> str:
    part = int(np.searchsorted(ends, number, side="right"))
    within = number - (int(ends[part - 1]) if part else 0)
    with open(texts[part] / "documents.jsonl", encoding="utf-8", newline="\n") as file:
        first, source, location, *_ = json.loads(next(line for at, line in enumerate(file) if at == within))
    return f"{source}, {location}: {first[:80] if isinstance(first, str) else first[0][1][:80]!r}"


def _batches(items: Iterator[Document | Conversation]) -> Iterator[list[Document | Conversation]]:
    batch: list[Document | Conversation] = []
    size = 0
    for item in items:
        batch.append(item)
        size += stages.size_of(item)
        if size >= stages.BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=1)
def _evaluation(directory: Path) -> Evaluation:
    with open(directory / "evaluation.pickle", "rb") as file:
        return pickle.load(file)  # of our own work directory
