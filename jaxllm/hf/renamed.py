"""A checkpoint under the names of a table: old spellings translated, what a model does not read left out."""

from collections.abc import Iterator, Mapping

import numpy as np

from jaxllm.hf.checkpoint import Checkpoint, Stored


class Renamed(Mapping[str, np.ndarray]):
    """The tensors of `checkpoint` that `names` has, under their new names.

    Args:
      names: {new name: name in the files}.
    """

    def __init__(self, checkpoint: Checkpoint, names: Mapping[str, str]):
        self.directory, self.config_name = checkpoint.directory, checkpoint.config_name
        self._checkpoint, self._names = checkpoint, dict(names)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._checkpoint[self._names[name]]

    def called(self, name: str) -> str:
        """Return what errors call a tensor: its new name."""
        return name

    def stored(self, name: str) -> Stored:
        """Return shape and dtype of a tensor without reading it."""
        return self._checkpoint.stored(self._names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
