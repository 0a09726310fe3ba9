"""What to do with unreadable input: stop, or leave it out and count it. Never silent."""

import codecs
import json
import lzma
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal, TypeVar

Policy = Literal["error", "skip", "replace"]
N_EXAMPLES = 5
T = TypeVar("T")
# What the readers of compressed files, archives and records raise; the last also for a ZIP that has a password.
BROKEN = (OSError, EOFError, zlib.error, lzma.LZMAError, tarfile.TarError, zipfile.BadZipFile, RuntimeError)


@dataclass
class Problems:
    """Collects what could not be read.

    Attributes:
      policy: "error" stops at the first problem; "skip" leaves the document or row out; "replace" puts U+FFFD for bytes
        that are not UTF-8, and leaves out what cannot be repaired.
      count: how many there were; replaced: those of them that were repaired.
      examples: the first few messages.
      notes: what was left out although nothing is wrong with it, and how often.
    """

    policy: Policy = "error"
    count: int = 0
    replaced: int = 0
    examples: list[str] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def __add__(self, other: "Problems") -> "Problems":
        """Return what two readers, one after the other, could not read."""
        examples = (self.examples + other.examples)[:N_EXAMPLES]
        counts = self.count + other.count, self.replaced + other.replaced
        return Problems(self.policy, *counts, examples, self.notes + other.notes)

    def report(self, message: str, replaceable: bool = False) -> None:
        """Count one problem; `replaceable`: the policy "replace" repairs it.

        Raises:
          ValueError: the policy is "error".
        """
        if self.policy == "error":
            advice = "; repair it, or pass --errors skip (leave it out and count it)"
            raise ValueError(message + advice + (" or --errors replace" if replaceable else ""))
        self.count += 1
        self.replaced += replaceable and self.policy == "replace"
        if len(self.examples) < N_EXAMPLES:
            self.examples.append(message)

    def decode(self, data: bytes, path: str, offset: int, encoding: str = "utf-8") -> str | None:
        """Decode what starts at byte `offset` of the file `path`, by the first of the encodings "utf-8,gb18030" that it
        can be in; None: left out.
        """
        first, *others = encoding.split(",")
        try:
            return data.decode(first)
        except UnicodeDecodeError as error:
            wrong = error
        for other in others:
            with suppress(UnicodeDecodeError):
                text = data.decode(other)
                self.notes[f"documents in {other.upper()}"] += 1
                return text
        if not offset and data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            self.report(f"{path}: UTF-16 by its first two bytes; convert it: iconv -f utf-16 -t utf-8")
            return None
        at, name = offset + wrong.start, encoding.upper().replace(",", " or ")
        found = f"(byte 0x{data[wrong.start]:02x}: {wrong.reason}); if it is in another encoding, name it (--encoding)"
        self.report(f"{path}: not {name} at byte offset {at} {found}", replaceable=True)
        return data.decode(first, errors="replace") if self.policy == "replace" else None

    def attempt(self, place: str, read: Callable[..., T], *values: object) -> T | None:
        """Return `read(*values)`, or None after a report of the ValueError that it raised."""
        try:
            return read(*values)
        except UnicodeEncodeError as error:  # JSON can say half of a surrogate pair, and UTF-8 cannot
            half = ord(error.object[error.start])
            self.report(f"{place}: lone surrogate \\u{half:04x} at character {error.start}")
        except ValueError as error:
            self.report(f"{place}: {error}")
        return None

    def guard(self, place: str, items: Iterable[T]) -> Iterator[T]:
        """Yield `items`; what breaks the file they come from is reported, and they end there."""
        try:
            yield from items
        except BROKEN as error:
            why = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
            self.report(f"{place}: {why}; what follows cannot be read")


def as_json(value: object, limit: int) -> str:
    """Return the beginning of `value` as a row of a file shows it."""
    text = json.dumps(value, ensure_ascii=False, default=str).encode("utf-8", errors="backslashreplace").decode("utf-8")
    return text if len(text) <= limit else text[:limit] + "..."
