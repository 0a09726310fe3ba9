"""Writing of a dataset directory: streams documents into shards, then publishes the whole directory by one rename."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from itertools import compress
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple, Self

import numpy as np

from jaxllm.core import files
from jaxllm.core.bucket import here, is_pushed, named, push
from jaxllm.core.wording import count
from jaxllm.data.shards import SPLITS, VERSION, Kind, Manifest, ShardInfo, SplitInfo, crc32
from jaxllm.data.tokenizers.tokenizer import Tokenizer

NOTHING: Mapping = MappingProxyType({})
# All that this module and `Tokenizer.save` write, by its path inside a dataset.
_OWN = re.compile(
    r"(manifest|report)\.json|report\.html|tokenizer(/(tokenizer\.json|huggingface\.json|spm\.model|chat_template\.jinja))?|"
    r"(train|validation)(/shard-\d+\.((tokens|offsets|trained)\.npy|origins\.jsonl))?"
)


def check_out(directory: str | Path, overwrite: bool, inputs: Iterable[str] = ()) -> None:
    """Raise FileExistsError unless `directory` can be made, or replaced without the loss of anything but a dataset.

    Args:
      overwrite: an empty directory and a dataset may be replaced; nothing else ever is. One whose way into its bucket
        was cut short is replaced without it.
      inputs: files that are read; they must lie elsewhere.
    """
    path, place = here(directory), here(directory).resolve()
    if not os.path.lexists(path):
        return
    other = f"choose another directory than {named(path)}"
    if Path.cwd().is_relative_to(place):
        raise FileExistsError(f"{other}: the current directory is in it")
    if path.is_symlink() or not path.is_dir():
        raise FileExistsError(f"{other}: it is a {'link' if path.is_symlink() else 'file'}")
    if inside := [each for each in inputs if Path(each).resolve().is_relative_to(place)]:
        raise FileExistsError(f"{other}: the input {inside[0]} is in it")
    names = (each.relative_to(path).as_posix() for each in path.rglob("*"))
    if foreign := next((name for name in names if not _OWN.fullmatch(name)), None):
        raise FileExistsError(f"{other}: it holds {foreign}, which is no part of a dataset")
    if any(path.iterdir()) and not {"version", "splits"} <= files.read_json(path / "manifest.json", {"": None}).keys():
        raise FileExistsError(f"{other}: it is not empty and has no manifest.json of a dataset")
    if not overwrite and not _was_cut(path):
        raise FileExistsError(f"{named(path)} exists; choose another directory, or --overwrite to replace it")


def _was_cut(directory: Path) -> bool:
    """Whether a dataset is complete here, and not in the bucket."""
    return (directory / "manifest.json").is_file() and not is_pushed(directory / "manifest.json")


class Encoded(NamedTuple):
    """A document or conversation as ids; `trained` is empty for text; `size_bytes` of UTF-8 text."""

    source: str
    location: str
    ids: list[int]
    trained: list[bool]
    size_bytes: int
    more: Mapping[str, str | int] = NOTHING  # as `documents.provenance`


class Stored(NamedTuple):
    """What a shard holds of some documents that follow each other.

    Attributes:
      tokens: uint16 or uint32, of all of them. lengths: int64 [documents], tokens of each.
      trained: bool, one for each token, of conversations; else empty: all but the first of a document.
      origins: uint8, a line of JSON for each. n_trained: targets, which stand for `text_bytes` bytes of UTF-8.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    trained: np.ndarray
    origins: np.ndarray
    n_trained: int
    text_bytes: int


def token_dtype(tokenizer: Tokenizer) -> Literal["uint16", "uint32"]:
    """Return how ids are stored."""
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


def text_tokens(tokenizer: Tokenizer, each: Encoded) -> Stored:
    """Return a document as it is stored: [bos] + ids + [eos]."""
    tokens = np.array([tokenizer.bos_id, *each.ids, tokenizer.eos_id], token_dtype(tokenizer))
    lengths = np.array([len(tokens)])
    return Stored(tokens, lengths, np.zeros(0, bool), _origin(each), len(each.ids) + 1, each.size_bytes)


def chat_tokens(tokenizer: Tokenizer, each: Encoded) -> Stored:
    """Return a conversation as it is stored; the text that counts is what is learned."""
    learned = sum(len(tokenizer.token_bytes(token)) for token in compress(each.ids, each.trained))
    tokens, lengths = np.array(each.ids, token_dtype(tokenizer)), np.array([len(each.ids)])
    return Stored(tokens, lengths, np.array(each.trained, bool), _origin(each), sum(each.trained[1:]), learned)


def _origin(each: Encoded) -> np.ndarray:
    line = json.dumps({"source": each.source, "location": each.location, **each.more}, ensure_ascii=False) + "\n"
    return np.frombuffer(line.encode("utf-8"), np.uint8)


class DatasetWriter:
    """Context manager that builds `directory`; it appears when the block ends without an exception, and not before.

    Memory holds one shard per split, whatever the size of the data.

    Args:
      kind: "text" (every token is learned) or "chat" (the tokens marked `trained`).
      overwrite: replace an existing dataset at the end, once the new one is complete.
      shard_tokens: close a shard when it holds this many tokens.
    Raises:
      FileExistsError: `check_out` refuses `directory`.
    """

    def __init__(
        self,
        directory: str | Path,
        tokenizer: Tokenizer,
        kind: Kind,
        overwrite: bool = False,
        shard_tokens: int = 1 << 24,
    ):
        self.directory = here(directory)
        self.tokenizer, self.kind, self.overwrite = tokenizer, kind, overwrite
        check_out(directory, overwrite)
        self._temporary = files.temporary_beside(self.directory)
        self._splits = {split: _SplitWriter(self._temporary / split, kind, shard_tokens) for split in SPLITS}

    def __enter__(self) -> Self:
        files.drop_leftovers(self.directory)
        self._temporary.mkdir(parents=True)
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *rest: object) -> None:
        try:
            if exception_type is None:
                if not (self._temporary / "manifest.json").exists():
                    self.seal()
                self._publish()
                push(self.directory)
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def room(self, split: str) -> int:
        """Return how many tokens the open shard can take."""
        return self._splits[split].room

    def add(self, split: str, stored: Stored) -> None:
        """Store documents, all in one shard: in the open one if they fit."""
        self._splits[split].add(stored)

    def seal(self) -> Path:
        """Write the rest, the tokenizer and the manifest; return the directory, complete but not yet in its place.

        Raises:
          ValueError: there is no document for training.
        """
        self.tokenizer.save(self._temporary / "tokenizer")
        manifest = Manifest(
            version=VERSION,
            kind=self.kind,
            dtype=token_dtype(self.tokenizer),
            vocab_size=self.tokenizer.vocab_size,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            splits={split: writer.finish() for split, writer in self._splits.items()},
        )
        if not manifest.splits["train"].n_documents:
            held = manifest.splits["validation"].n_documents
            why = (
                f" beside the {count(held, 'document')} held out; lower --validation" if held else "; check the sources"
            )
            raise ValueError(f"nothing to write to {self.directory}: no document is left for training{why}")
        files.write_json(self._temporary / "manifest.json", manifest.model_dump(mode="json"))
        return self._temporary

    def _publish(self) -> None:
        if not self.directory.exists():
            os.replace(self._temporary, self.directory)
            return
        if not self.overwrite and not _was_cut(self.directory):
            raise FileExistsError(f"{self.directory} appeared while the data was prepared; it is left as it is")
        check_out(self.directory, self.overwrite)  # hours may have passed
        old = self._temporary.with_suffix(".old")
        os.replace(self.directory, old)
        os.replace(self._temporary, self.directory)
        shutil.rmtree(old)


class _SplitWriter:
    def __init__(self, directory: Path, kind: Kind, shard_tokens: int):
        self.directory, self.kind, self.shard_tokens = directory, kind, shard_tokens
        self.n_trained = self.trained_bytes = 0
        self.shards: list[ShardInfo] = []
        self._open: list[Stored] = []
        self.room = shard_tokens

    def add(self, stored: Stored) -> None:
        if self._open and len(stored.tokens) > self.room:
            self._flush()
        self._open.append(stored)
        self.room -= len(stored.tokens)
        self.n_trained += stored.n_trained
        self.trained_bytes += stored.text_bytes

    def finish(self) -> SplitInfo:
        if self._open:
            self._flush()
        return SplitInfo(
            n_documents=sum(shard.n_documents for shard in self.shards),
            n_tokens=sum(shard.n_tokens for shard in self.shards),
            n_trained=self.n_trained,
            trained_bytes=self.trained_bytes,
            shards=tuple(self.shards),
        )

    def _flush(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        shard = f"shard-{len(self.shards):05d}"
        joined = {name: np.concatenate([getattr(each, name) for each in self._open]) for name in Stored._fields[:4]}
        contents = {
            "tokens.npy": joined["tokens"],
            "offsets.npy": np.concatenate([np.zeros(1, np.int64), np.cumsum(joined["lengths"])]),
            "origins.jsonl": joined["origins"],
            **({"trained.npy": joined["trained"]} if self.kind == "chat" else {}),
        }
        paths = [self.directory / f"{shard}.{part}" for part in contents]
        for path, content in zip(paths, contents.values(), strict=True):
            save_array(path, content)
        self.shards.append(
            ShardInfo(
                name=shard,
                n_documents=len(joined["lengths"]),
                n_tokens=len(joined["tokens"]),
                size_bytes={path.name: path.stat().st_size for path in paths},
                crc32={path.name: crc32(path) for path in paths},
            )
        )
        self._open, self.room = [], self.shard_tokens


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file, or bytes. `np.save` does not say that a disk is full, or that only the end is missing."""
    with open(path, "wb") as file:
        if path.suffix == ".npy":
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)
