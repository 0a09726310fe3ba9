"""A directory of safetensors files as one mapping from tensor name to array, read one tensor at a time."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxllm.core import files

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# What safetensors calls them, and NumPy (with ml_dtypes, which JAX brings).
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
MAX_SHARD_BYTES = 4 * 2**30


class Stored(NamedTuple):
    """What the files say of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: str


class Checkpoint(Mapping[str, np.ndarray]):
    """The tensors of a directory; reading one maps no other into memory.

    Raises:
      ValueError: no safetensors files, a file that is missing or damaged, a tensor that no file has.
    """

    config_name = "config.json"  # what must fit the tensors

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._files = ExitStack()
        self._homes: dict[str, Any] = {}
        for path in self._paths():
            file = self._open(path)
            self._homes |= dict.fromkeys(file.keys(), file)

    def _paths(self) -> list[Path]:
        if (self.directory / INDEX).is_file():
            names = sorted(set(files.read_json(self.directory / INDEX)["weight_map"].values()))
            paths = [self.directory / name for name in names]
            if missing := [path.name for path in paths if not path.is_file()]:
                raise ValueError(f"{self.directory / INDEX} names files that are not there: {', '.join(missing)}")
            return paths
        if (self.directory / SINGLE).is_file():
            return [self.directory / SINGLE]
        if pickles := sorted(self.directory.glob("*.bin")):
            raise ValueError(
                f"{self.directory} has its weights only as {pickles[0].name}, a pickle, which may run any code when it "
                "is read; convert it once where torch is installed: AutoModelForCausalLM.from_pretrained(DIR)"
                ".save_pretrained(NEW_DIR)"
            )
        raise ValueError(f"{self.directory} has no {SINGLE} and no {INDEX}")

    def _open(self, path: Path) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            return self._files.enter_context(safe_open(path, framework="numpy"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read: {error}; fetch it again") from error

    def __getitem__(self, name: str) -> np.ndarray:
        return self._homes[name].get_tensor(name)

    def called(self, name: str) -> str:
        """Return what the files call a tensor: here its name."""
        return name

    def stored(self, name: str) -> Stored:
        """Return shape and dtype of a tensor without reading it."""
        view = self._homes[name].get_slice(name)
        return Stored(tuple(view.get_shape()), DTYPES.get(view.get_dtype(), view.get_dtype()))

    def __iter__(self) -> Iterator[str]:
        return iter(self._homes)

    def __len__(self) -> int:
        return len(self._homes)

    def close(self) -> None:
        """Close the files."""
        self._files.close()


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
