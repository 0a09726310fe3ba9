"""Writing of a dataset directory: streams documents into shards, then publishes the whole directory by one rename."""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Self

import numpy as np

from jaxllm.core import files
from jaxllm.data.shards import SPLITS, VERSION, Kind, Manifest, ShardInfo, SplitInfo, crc32
from jaxllm.data.tokenizer import Tokenizer

NOTHING: Mapping = MappingProxyType({})
# All that this module and `Tokenizer.save` write, by its path inside a dataset.
_OWN = re.compile(
    r"(manifest|report)\.json|tokenizer(/(tokenizer\.json|huggingface\.json|spm\.model|chat_template\.jinja))?|"
    r"(train|validation)(/shard-\d+\.((tokens|offsets|trained)\.npy|origins\.jsonl))?"
)


def check_out(directory: str | Path, overwrite: bool, inputs: Iterable[str] = ()) -> None:
    """Raise FileExistsError unless `directory` can be made, or replaced without the loss of anything but a dataset.

    Args:
      overwrite: an empty directory and a dataset may be replaced; nothing else ever is.
      inputs: files that are read; they must lie elsewhere.
    """
    path, place = Path(directory), Path(directory).resolve()
    if not os.path.lexists(path):
        return
    other = f"choose another directory than {path}"
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
    if not overwrite:
        raise FileExistsError(f"{path} exists; choose another directory, or --overwrite to replace it")


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
        self.directory = Path(directory)
        self.tokenizer, self.kind, self.overwrite = tokenizer, kind, overwrite
        check_out(directory, overwrite)
        self._sealed = False
        self._temporary = files.temporary_beside(self.directory)
        self._dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        self._splits = {
            split: _SplitWriter(self._temporary / split, kind, self._dtype, shard_tokens) for split in SPLITS
        }

    def __enter__(self) -> Self:
        files.drop_leftovers(self.directory)
        self._temporary.mkdir(parents=True)
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *rest: object) -> None:
        try:
            if exception_type is None:
                if not self._sealed:
                    self.seal()
                self._publish()
        finally:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def add_text(
        self, split: str, ids: list[int], source: str, location: str, text_bytes: int, more: Mapping = NOTHING
    ) -> None:
        """Store one document as [bos] + ids + [eos].

        Args:
          text_bytes: the UTF-8 length of its text.
          more: of where it comes from: offset, id.
        """
        tokens = [self.tokenizer.bos_id, *ids, self.tokenizer.eos_id]
        trained = [False] + [True] * (len(ids) + 1)
        self._splits[split].add(tokens, trained, {"source": source, "location": location, **more}, text_bytes)

    def add_chat(
        self, split: str, ids: list[int], trained: list[bool], source: str, location: str, more: Mapping = NOTHING
    ) -> None:
        """Store one encoded conversation; `more` as in `add_text`."""
        text_bytes = sum(
            len(self.tokenizer.token_bytes(token)) for token, learn in zip(ids, trained, strict=True) if learn
        )
        self._splits[split].add(ids, trained, {"source": source, "location": location, **more}, text_bytes)

    def seal(self) -> Path:
        """Write the rest, the tokenizer and the manifest; return the directory, complete but not yet in its place.

        Raises:
          ValueError: there is no document for training.
        """
        self.tokenizer.save(self._temporary / "tokenizer")
        manifest = Manifest(
            version=VERSION,
            kind=self.kind,
            dtype=self._dtype,
            vocab_size=self.tokenizer.vocab_size,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            splits={split: writer.finish() for split, writer in self._splits.items()},
        )
        if not manifest.splits["train"].n_documents:
            raise ValueError(
                f"nothing to write to {self.directory}: no document is left for training; check the sources"
            )
        files.write_json(self._temporary / "manifest.json", manifest.model_dump(mode="json"))
        self._sealed = True
        return self._temporary

    def _publish(self) -> None:
        if not self.directory.exists():
            os.replace(self._temporary, self.directory)
            return
        if not self.overwrite:
            raise FileExistsError(f"{self.directory} appeared while the data was prepared; it is left as it is")
        check_out(self.directory, self.overwrite)  # hours may have passed
        old = self._temporary.with_suffix(".old")
        os.replace(self.directory, old)
        os.replace(self._temporary, self.directory)
        shutil.rmtree(old)


class _SplitWriter:
    def __init__(self, directory: Path, kind: Kind, dtype: str, shard_tokens: int):
        self.directory, self.kind, self.dtype, self.shard_tokens = directory, kind, dtype, shard_tokens
        self.n_trained = self.trained_bytes = 0
        self.shards: list[ShardInfo] = []
        self._clear()

    def _clear(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._trained: list[np.ndarray] = []
        self._origins: list[str] = []
        self._size = 0

    def add(self, tokens: list[int], trained: list[bool], origin: dict[str, str | int], text_bytes: int) -> None:
        if self._size and self._size + len(tokens) > self.shard_tokens:
            self._flush()
        self._tokens.append(np.array(tokens, self.dtype))
        self._origins.append(json.dumps(origin, ensure_ascii=False) + "\n")
        self._size += len(tokens)
        self.n_trained += sum(trained[1:])
        self.trained_bytes += text_bytes
        if self.kind == "chat":
            self._trained.append(np.array(trained, bool))

    def finish(self) -> SplitInfo:
        if self._tokens:
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
        contents = {
            "tokens.npy": np.concatenate(self._tokens),
            "offsets.npy": np.cumsum([0, *map(len, self._tokens)], dtype=np.int64),
            "origins.jsonl": np.frombuffer("".join(self._origins).encode("utf-8"), np.uint8),
            **({"trained.npy": np.concatenate(self._trained)} if self.kind == "chat" else {}),
        }
        paths = [self.directory / f"{shard}.{part}" for part in contents]
        for path, content in zip(paths, contents.values(), strict=True):
            _save(path, content)
        self.shards.append(
            ShardInfo(
                name=shard,
                n_documents=len(self._tokens),
                n_tokens=self._size,
                size_bytes={path.name: path.stat().st_size for path in paths},
                crc32={path.name: crc32(path) for path in paths},
            )
        )
        self._clear()


def _save(path: Path, array: np.ndarray) -> None:
    """Write a .npy file, or bytes. `np.save` does not say that a disk is full, or that only the end is missing."""
    with open(path, "wb") as file:
        if path.suffix == ".npy":
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(array.data)
