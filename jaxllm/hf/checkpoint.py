"""Checkpoints as mappings from tensor name to array, read one tensor at a time; safetensors files read and written."""

import json
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxllm.core import files

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# What safetensors calls them, and NumPy (with ml_dtypes, which JAX brings).
DTYPES = {
    "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64", "U8": "uint8", "F8_E4M3": "float8_e4m3fn",
}  # fmt: skip
MAX_SHARD_BYTES = 4 * 2**30


class Stored(NamedTuple):
    """A tensor of a file: what is said of it, and how it is read."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


class Tensors(Mapping[str, np.ndarray]):
    """Tensors by name, each read when it is asked for.

    Args:
      origin: the file or directory. stored: {name: tensor}.
      called: what errors call a name. described_by: what must fit the tensors.
    """

    def __init__(
        self, origin: Path, stored: Mapping[str, Stored], *, called: Callable[[str], str] = str,
        described_by: str = "config.json",
    ):  # fmt: skip
        self.origin, self.stored, self.called, self.described_by = origin, stored, called, described_by

    def __getitem__(self, name: str) -> np.ndarray:
        return self.stored[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)

    def under(self, wanted: Collection[str], *, first: str, copies: Mapping[str, str], ignored: str) -> "Tensors":
        """Return the tensors as a table spells them, without what no model reads.

        Args:
          wanted: the table's names. first: a word that files put before a name, or leave out.
          copies: {name: the name that it is tied to}, in files that have both, or the copy alone.
          ignored: regular expression of how names begin, after `first`, that are left out unless they are wanted.
        Raises:
          ValueError: a copy differs from the tensor that it is tied to, or two tensors have one name.
        """
        found: dict[str, str] = {}
        for stored in self:
            name = stored.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")
            bare = name.removeprefix(f"{first}.")
            name = next((each for each in (name, f"{first}.{bare}", bare) if each in wanted), name)
            if name in found:
                raise ValueError(f"{self.origin} has {name} twice: {found[name]} and {stored}; remove one")
            if name in wanted or not re.match(ignored, bare):
                found[name] = stored
        for copy in [each for each in copies if each in found]:
            stored = found.pop(copy)
            other = found.setdefault(copies[copy], stored)
            if other != stored and not np.array_equal(self[stored], self[other]):
                raise ValueError(
                    f"{self.origin}: {stored}: differs from {other}, and {self.described_by} has tie_word_embeddings: "
                    "true; set it to false"
                )
        return self.holding({name: self.stored[stored] for name, stored in found.items()})

    def holding(self, stored: Mapping[str, Stored]) -> "Tensors":
        """Return other tensors of the same file or directory."""
        return Tensors(self.origin, stored, called=self.called, described_by=self.described_by)


class Checkpoint(Tensors):
    """The tensors of a directory; reading one maps no other into memory.

    Raises:
      ValueError: no safetensors files, or a file that is missing or damaged.
    """

    def __init__(self, directory: str | Path):
        directory = Path(directory)
        super().__init__(directory, {name: tensor for path in _files(directory) for name, tensor in _tensors(path)})


def _files(directory: Path) -> list[Path]:
    if (directory / INDEX).is_file():
        names = sorted(set(files.read_json(directory / INDEX)["weight_map"].values()))
        paths = [directory / name for name in names]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise ValueError(f"{directory / INDEX} names files that are not there: {', '.join(missing)}")
        return paths
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if pickles := sorted(directory.glob("*.bin")):
        raise ValueError(
            f"{directory} has its weights only as {pickles[0].name}, a pickle, which may run any code when it is read; "
            "convert it once where torch is installed: AutoModelForCausalLM.from_pretrained(DIR)"
            ".save_pretrained(NEW_DIR)"
        )
    raise ValueError(f"{directory} has no {SINGLE} and no {INDEX}")


def _tensors(path: Path) -> Iterator[tuple[str, Stored]]:
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}; fetch it again") from error
    with path.open("rb") as opened:  # safetensors checks the header, but keeps what it reads in memory
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    for name in file.keys():  # noqa: SIM118  it is no mapping
        entry = header[name]
        stored = DTYPES.get(entry["dtype"], entry["dtype"])
        offset = 8 + length + entry["data_offsets"][0]
        yield name, Stored(tuple(entry["shape"]), stored, partial(_read, path, entry["shape"], stored, offset))


def _read(path: Path, shape: list[int], dtype: str, offset: int) -> np.ndarray:
    tensor = aligned(tuple(shape), np.dtype(dtype))
    with path.open("rb") as file:
        file.seek(offset)
        if file.readinto(tensor.reshape(-1).view(np.uint8)) < tensor.nbytes:  # it was cut after it was opened
            raise ValueError(f"{path} ends early, before byte {offset + tensor.nbytes}; fetch it again")
    return tensor


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an array at an address that JAX takes without a copy: a multiple of 64."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


class Writer:
    """Writes tensors into safetensors files of at most `max_bytes` and an index; holds one file's worth in memory."""

    def __init__(self, directory: str | Path, max_bytes: int = MAX_SHARD_BYTES):
        self.directory, self._max_bytes = Path(directory), max_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._shards: list[list[str]] = []
        self._bytes = self._total = 0

    def add(self, name: str, tensor: np.ndarray) -> None:
        """Take a tensor; a full file is written."""
        if self._pending and self._bytes + tensor.nbytes > self._max_bytes:
            self._flush()
        self._pending[name] = np.ascontiguousarray(tensor)
        self._bytes += tensor.nbytes
        self._total += tensor.nbytes

    def close(self) -> None:
        """Write what is left, give the files their names, write the index if there are several."""
        self._flush()
        count = len(self._shards)
        names = [f"model-{i:05d}-of-{count:05d}.safetensors" if count > 1 else SINGLE for i in range(1, count + 1)]
        for number, name in enumerate(names):
            self._part(number).rename(self.directory / name)
        if count > 1:
            homes = {tensor: name for name, shard in zip(names, self._shards, strict=True) for tensor in shard}
            files.write_json(self.directory / INDEX, {"metadata": {"total_size": self._total}, "weight_map": homes})

    def _flush(self) -> None:
        from safetensors.numpy import save_file

        path = self._part(len(self._shards))
        path.touch()  # with the user's umask, which safetensors would not ask
        mode = path.stat().st_mode
        save_file(self._pending, path, metadata={"format": "pt"})
        path.chmod(mode)
        self._shards.append(list(self._pending))
        self._pending, self._bytes = {}, 0

    def _part(self, number: int) -> Path:
        return self.directory / f".model-{number:05d}.part"
