"""What stands where a checkpoint brought no tokenizer: a model works with ids, and text is an error that says why."""

from collections.abc import Iterable
from typing import Any, NoReturn


class NoTokenizer:
    """A vocabulary of ids alone; text has no ids, and ids have no text.

    Args:
      why: what was looked for. size: number of ids. ids: of padding, the beginning and the end, where config.json says.
    Raises:
      ValueError: whatever needs text is asked for.
    """

    chat = original = None
    prefix = ()

    def __init__(self, why: str, size: int, ids: Iterable[int | None]):
        self.why, self.size, self.vocab_size = why, size, size
        self.pad_id, self.bos_id, self.eos_id = ids

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        raise ValueError(
            f"{self.why}. Without a tokenizer there are logits, answers to ids and export, but no text and no run"
        )

    def decode(self, ids: Iterable[int], **_: Any) -> NoReturn:
        """Say that ids have no text."""
        self.__getattr__("text")
