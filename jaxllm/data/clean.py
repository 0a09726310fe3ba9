"""Cleaning: small named rules over one text, and the count of what each of them changed and dropped.

A rule is a name and a pure function from text to text, or to None to drop the document.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from pydantic import Field

from jaxllm.core.config import Config
from jaxllm.data.documents import Conversation, Document, Message

N_EXAMPLES = 3
_NEWLINES = re.compile("\r\n?|[\x0b\x0c\x85]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f]")


class CleanConfig(Config):
    """Which rules run, in this order."""

    nfc: bool = Field(False, description="compose characters (Unicode NFC); changes no meaning, but is not reversible")
    control: bool = Field(True, description="remove control characters; form feed, foreign line ends become newlines")
    trailing_space: bool = Field(True, description="remove spaces at line ends and blank lines around a text")
    min_chars: int = Field(1, ge=1, description="drop texts shorter than this (characters)")
    deduplicate: bool = Field(True, description="drop exact copies of an earlier document or conversation")


Rule = Callable[[str], str | None]  # returns the text, changed or not, or None to drop the document


@dataclass
class RuleCount:
    """What one rule did; `examples` of what it dropped: place and beginning of the text."""

    changed: int = 0
    dropped: int = 0
    examples: list[str] = field(default_factory=list)


def rules(config: CleanConfig) -> dict[str, Rule]:
    """Return the rules that `config` asks for, in order; copies are dropped by `Cleaner`, which has seen the others."""
    known: dict[str, tuple[bool, Rule]] = {
        "nfc": (config.nfc, partial(unicodedata.normalize, "NFC")),
        "control": (config.control, remove_control),
        "trailing_space": (config.trailing_space, strip_line_ends),
        "min_chars": (True, lambda text: text if len(text.strip()) >= config.min_chars else None),
    }
    return {name: rule for name, (wanted, rule) in known.items() if wanted}


def remove_control(text: str) -> str:
    """Turn CR, CRLF, VT, FF and NEL into newlines and remove other control characters; tabs and U+2028 stay."""
    return _CONTROL.sub("", _NEWLINES.sub("\n", text))


def strip_line_ends(text: str) -> str:
    """Remove spaces and tabs before newlines, and newlines around the text."""
    return "\n".join(line.rstrip(" \t") for line in text.split("\n")).strip("\n")


class Cleaner:
    """Applies the rules to a stream of documents and counts.

    Attributes:
      counts: by rule name, in order; "duplicate" last.
    """

    def __init__(self, config: CleanConfig):
        self._rules = rules(config)
        self._seen: set[bytes] | None = set() if config.deduplicate else None
        self.counts = {name: RuleCount() for name in self._rules}
        if config.deduplicate:
            self.counts["duplicate"] = RuleCount()

    def document(self, document: Document) -> Document | None:
        """Return the cleaned document, or None if a rule dropped it."""
        text = self._text(document.text, document)
        if text is None or self._is_copy(text, repr(text[:60]), document):
            return None
        return replace(document, text=text)

    def conversation(self, conversation: Conversation) -> Conversation | None:
        """Return the conversation with every message cleaned, or None if a rule dropped one of them or all of it.

        An empty system message says nothing and is left out; many data sets have one in each row.
        """
        messages = []
        for message in conversation.messages:
            if message.role == "system" and not message.content.strip():
                continue
            content = self._text(message.content, conversation)
            if content is None:
                return None
            messages.append(Message(message.role, content))
        text = json.dumps([{message.role: message.content} for message in messages], ensure_ascii=False)
        if self._is_copy(text, text[:60], conversation):
            return None
        return replace(conversation, messages=tuple(messages))

    def _text(self, text: str, owner: Document | Conversation) -> str | None:
        for name, rule in self._rules.items():
            result = rule(text)
            if result is None:
                self._drop(name, repr(text[:60]), owner)
                return None
            self.counts[name].changed += result != text
            text = result
        return text

    def _is_copy(self, text: str, shown: str, owner: Document | Conversation) -> bool:
        if self._seen is None:
            return False
        # 128 bits: no two of 10^12 different documents meet. Per document the set needs about 100 bytes of memory.
        digest = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        if digest in self._seen:
            self._drop("duplicate", shown, owner)
            return True
        self._seen.add(digest)
        return False

    def _drop(self, name: str, shown: str, owner: Document | Conversation) -> None:
        count = self.counts[name]
        count.dropped += 1
        if len(count.examples) < N_EXAMPLES:
            count.examples.append(f"{owner.source}, {owner.location}: {shown}")
