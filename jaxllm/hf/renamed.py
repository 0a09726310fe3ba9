"""A checkpoint under the names of a table: old spellings translated, what a model does not read left out."""

from collections.abc import Collection, Iterator, Mapping

import numpy as np

from jaxllm.hf.checkpoint import Checkpoint, Stored


def without_copies(
    checkpoint: Checkpoint, names: Mapping[str, str], copies: Mapping[str, str], wanted: Collection[str] = ()
) -> dict[str, str]:
    """Return `names` without those of tensors that repeat another one.

    Args:
      names: {name in the table: name in the files}.
      copies: {name of a copy: name of the tensor that it repeats}.
      wanted: names of the table, which are no copies.
    Raises:
      ValueError: a copy differs.
    """
    kept = dict(names)
    for copy, original in copies.items():
        if copy not in kept or copy in wanted:
            continue
        stored = kept.pop(copy)
        other = kept.setdefault(original, stored)  # a file may have the copy alone
        if other != stored and not np.array_equal(checkpoint[stored], checkpoint[other]):
            raise ValueError(
                f"{checkpoint.directory}: {stored} differs from {other}, and config.json has tie_word_embeddings: "
                "true; set it to false"
            )
    return kept


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
