"""What to do with unreadable input: stop, or leave it out and count it. Never silent."""

from dataclasses import dataclass, field
from typing import Literal

Policy = Literal["error", "skip", "replace"]
N_EXAMPLES = 5


@dataclass
class Problems:
    """Collects what could not be read.

    Attributes:
      policy: "error" stops at the first problem; "skip" leaves the document or row out; "replace" puts U+FFFD for bytes
        that are not UTF-8, and leaves out what cannot be repaired.
      count: how many there were.
      examples: the first few messages.
    """

    policy: Policy = "error"
    count: int = 0
    examples: list[str] = field(default_factory=list)

    def report(self, message: str) -> None:
        """Count one problem.

        Raises:
          ValueError: the policy is "error".
        """
        if self.policy == "error":
            raise ValueError(
                f"{message}; repair it, or pass --errors skip (leave it out and count it) or --errors replace"
            )
        self.count += 1
        if len(self.examples) < N_EXAMPLES:
            self.examples.append(message)

    def decode(self, data: bytes, path: str, offset: int) -> str | None:
        """Decode UTF-8 that starts at byte `offset` of the file `path`; None: left out."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            byte = data[error.start]
            self.report(f"{path}: not UTF-8 at byte offset {offset + error.start} (byte 0x{byte:02x}: {error.reason})")
        return data.decode("utf-8", errors="replace") if self.policy == "replace" else None
