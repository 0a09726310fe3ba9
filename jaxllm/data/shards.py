"""Token shards on disk: the dataset directory that `prepare` writes and the loader maps into memory.

    manifest.json  tokenizer/  report.json
    train/shard-00000.tokens.npy    uint16 or uint32 [n_tokens]: documents one after the other
    train/shard-00000.offsets.npy   int64 [n_documents + 1]: document d is tokens[offsets[d]:offsets[d + 1]]
    train/shard-00000.trained.npy   bool [n_tokens], chat only: True = part of an answer
    train/shard-00000.origins.jsonl one line per document: source, location; offset and id if known
    validation/...

The directory appears whole or not at all. Sizes and checksums are recorded, so a damaged file is found when the dataset
is opened.
"""

import json
import zlib
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int
from pydantic import Field

from jaxllm.core import files
from jaxllm.core.bucket import here
from jaxllm.core.config import Record

VERSION = 1
SPLITS = ("train", "validation")
Kind = Literal["text", "chat"]
REPAIR = "copy the file again or prepare the data again"


class ShardInfo(Record):
    """What the manifest records of one shard; `size_bytes` and `crc32` are by file name."""

    name: str
    n_documents: int
    n_tokens: int
    size_bytes: dict[str, int]
    crc32: dict[str, int]


class SplitInfo(Record):
    """One split: `n_trained` tokens are targets, and stand for `trained_bytes` bytes of UTF-8 text."""

    n_documents: int = 0
    n_tokens: int = 0
    n_trained: int = 0
    trained_bytes: int = 0
    shards: tuple[ShardInfo, ...] = ()


class Manifest(Record):
    """Everything a reader must know, and the identity of the data."""

    version: int
    kind: Kind
    dtype: Literal["uint16", "uint32"]
    vocab_size: int
    tokenizer_fingerprint: str
    splits: dict[str, SplitInfo] = Field(default_factory=dict)

    def fingerprint(self, split: str) -> str:
        """Identity of what a split trains on: kind, tokenizer, checksums of the arrays; not the origins."""
        shards = self.splits[split].shards
        contents = [sorted(item for item in shard.crc32.items() if item[0].endswith(".npy")) for shard in shards]
        return files.fingerprint(self.kind, self.dtype, self.tokenizer_fingerprint, split, repr(contents))


class Dataset:
    """One split of a dataset directory, memory-mapped: opening costs the checksum pass, reading costs page faults.

    Attributes:
      kind, vocab_size, tokenizer_fingerprint: as in the manifest; fingerprint: of this split.
      lengths: int64 [n_documents], tokens per document with bos and eos.
      starts: int64 [n_documents + 1], where each document starts in the stream of all tokens.
      n_trained: tokens that are targets with weight 1.
      bytes_per_token: UTF-8 bytes per trained token: nats per token / (this * ln 2) = bits per byte; 0 for an empty
        split.
    """

    def __init__(self, directory: Path, manifest: Manifest, split: str):
        info = manifest.splits[split]
        self.directory, self.split, self.tokenizer_dir = directory, split, directory / "tokenizer"
        self.kind, self.vocab_size = manifest.kind, manifest.vocab_size
        self.tokenizer_fingerprint, self.fingerprint = manifest.tokenizer_fingerprint, manifest.fingerprint(split)
        self.n_trained = info.n_trained
        self.bytes_per_token = info.trained_bytes / info.n_trained if info.n_trained else 0.0
        self._shards = info.shards
        self.lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(each) for each in self._maps("offsets"))])
        self.starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.lengths)])
        self._bounds = np.cumsum([0, *(shard.n_tokens for shard in info.shards)])
        self._tokens = self._maps("tokens")
        self._trained = self._maps("trained") if self.kind == "chat" else []

    def _maps(self, part: str) -> list[np.ndarray]:
        paths = [self.directory / self.split / f"{shard.name}.{part}.npy" for shard in self._shards]
        # A plain ndarray over the map: slicing np.memmap itself costs ten times as much.
        return [np.load(path, mmap_mode="r").view(np.ndarray) for path in paths]

    @classmethod
    def open(cls, directory: str | Path, split: str = "train", verify: bool = True) -> "Dataset":
        """Open one split.

        Args:
          verify: read every byte once and compare checksums (about 1 GB/s); sizes are compared in any case.
        Raises:
          FileNotFoundError: no dataset there, or a file of it is gone.
          ValueError: unknown split, another version, or a damaged shard: file, expected and found.
        """
        directory = here(directory)
        manifest = read_manifest(directory)
        if split not in manifest.splits:
            raise ValueError(f"{directory} has no split {split!r}; it has {', '.join(manifest.splits)}")
        for shard in manifest.splits[split].shards:
            _check(directory / split, shard, verify)
        return cls(directory, manifest, split)

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self, document: int) -> Int[np.ndarray, "T"]:
        """Tokens of one document."""
        return self.stream(int(self.starts[document]), int(self.starts[document + 1]))

    def trained(self, document: int) -> Bool[np.ndarray, "T"]:
        """For chat, which of those tokens belong to an answer; for text, all but the first token of the document."""
        if self.kind == "chat":
            return self.marks(int(self.starts[document]), int(self.starts[document + 1]))
        return np.arange(self.lengths[document]) > 0

    def stream(self, start: int, stop: int) -> Int[np.ndarray, "T"]:
        """Tokens [start, stop) of all documents in a row, across shards; a view where one shard holds them."""
        return self._read(self._tokens, start, stop)

    def marks(self, start: int, stop: int) -> Bool[np.ndarray, "T"]:
        """Which of the tokens of `stream`, of conversations, belong to an answer."""
        return self._read(self._trained, start, stop)

    def origin(self, document: int) -> dict[str, str | int]:
        """{"source", "location"} of one document, and where it has them, "offset" and "id"."""
        for shard in self._shards:
            if document < shard.n_documents:
                break
            document -= shard.n_documents
        path = self.directory / self.split / f"{shard.name}.origins.jsonl"
        with open(path, encoding="utf-8", newline="\n") as file:
            return json.loads(next(islice(file, document, None)))

    def _read(self, arrays: list[np.ndarray], start: int, stop: int) -> np.ndarray:
        shard = int(np.searchsorted(self._bounds, start, side="right")) - 1
        if shard == len(arrays):  # an empty read at the very end
            return arrays[-1][:0]
        low, high = self._bounds[shard], self._bounds[shard + 1]
        if stop <= high:
            return arrays[shard][start - low : stop - low]
        return np.concatenate([arrays[shard][start - low :], self._read(arrays, int(high), stop)])


def read_manifest(directory: str | Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
      FileNotFoundError: `directory` is no dataset.
      ValueError: the file is damaged or of another version.
    """
    path = here(directory) / "manifest.json"
    if not path.is_file():
        raise FileNotFoundError(f"{directory} is no dataset (no manifest.json); make one with python -m jaxllm.prepare")
    content = files.read_json(path)
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise ValueError(f"{path} has version {version}; this jaxllm reads version {VERSION}: prepare the data again")
    return Manifest.model_validate(content)


def crc32(path: Path) -> int:
    """CRC-32 of a file, read in pieces."""
    value = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _check(directory: Path, shard: ShardInfo, verify: bool) -> None:
    for name, size in shard.size_bytes.items():
        path = directory / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing: the manifest lists it with {size} bytes; {REPAIR}")
        if (found := path.stat().st_size) != size:
            raise ValueError(f"{path} is damaged: expected {size} bytes, found {found}; {REPAIR}")
        if verify and (found := crc32(path)) != shard.crc32[name]:
            expected = shard.crc32[name]
            raise ValueError(f"{path} is damaged: expected CRC-32 {expected:08x}, found {found:08x}; {REPAIR}")
