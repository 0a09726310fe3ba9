"""Text out of arriving tokens: whole characters only, and nothing of a stop string."""

from collections.abc import Callable, Sequence
from typing import Any


class TextStream:
    """Joins tokens to text up to the first stop string, and holds back whatever may still become one.

    Example, stop strings ("END",), pieces "abE" "N" "x" "END" "y":

        push -> "ab"   ""   "ENx"   ""    then `stopped` is True

    Args:
      characters: makes whole characters of ids, as `Tokenizer.stream()`: `push(id)` returns those that it completes,
        `flush()` what is held back.

    Attributes:
      stopped: a stop string has come; nothing more is returned.
    """

    def __init__(self, characters: Any, stop: Sequence[str]):
        self._characters = characters
        self._stop = stop
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Return the text that is final now."""
        return self._release(self._characters.push(token))

    def flush(self) -> str:
        """Return the rest: the answer is over."""
        text = self._release(self._characters.flush())
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, new: str) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        found = [index for index in (text.find(stop) for stop in self._stop) if index >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        # The longest end of the text that begins a stop string may not be shown yet.
        held = max((n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
        cut = len(text) - held
        self._held = text[cut:]
        return text[:cut]


def finisher(decode: Callable[[list[int]], str], stop: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """Return what says whether the text of tokens has one of the strings; None: there are no strings.

    Raises:
      ValueError: `stop` is one string, or one of them is empty.
    """
    if isinstance(stop, str) or "" in stop:
        raise ValueError(f"stop={stop!r} must be a list of strings that are not empty")

    def finished(tokens: list[int]) -> bool:
        text = decode(tokens)
        return any(string in text for string in stop)

    return finished if stop else None


def cut(tokens: Sequence[int], text: TextStream) -> tuple[str, int | None]:
    """Return (text of tokens, how many of them there are up to the end of a stop string; None: there is none)."""
    pieces: list[str] = []
    for count, token in enumerate(tokens, 1):
        pieces.append(text.push(token))
        if text.stopped:
            return "".join(pieces), count
    return "".join(pieces) + text.flush(), None
