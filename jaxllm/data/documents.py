"""What flows out of every source: a document (text to predict) or a conversation (of which the answers are learned)."""

from typing import NamedTuple

from jaxllm.data.problems import as_json


class Document(NamedTuple):
    """One piece of running text.

    Attributes:
      text: any Unicode text.
      source: where the collection comes from: a path, "pydocs", "world".
      location: which part of the source, for a person to find it again: "line 12", "textwrap.dedent". Lines count from
        1, rows, records and examples from 0.
      offset: where it starts in the file as it is unpacked, in bytes, where that is known.
      id: how the source itself calls it: the id or URL of a row, the id of a WARC record. Not always unique.
      language: ISO 639 code, once it was looked for (`clean.languages`); "" if there is none.
    """

    text: str
    source: str
    location: str
    offset: int | None = None
    id: str | None = None
    language: str | None = None


class Message(NamedTuple):
    """One turn of a conversation; `role` is "system", "user" or "assistant"."""

    role: str
    content: str


class Conversation(NamedTuple):
    """Messages in order; only what the assistant says is learned. Where it comes from, as in `Document`."""

    messages: tuple[Message, ...]
    source: str
    location: str
    offset: int | None = None
    id: str | None = None

    @classmethod
    def pair(cls, prompt: str, answer: str, source: str, location: str) -> "Conversation":
        """Return the two-message conversation: the user says `prompt`, the assistant `answer`."""
        return cls((Message("user", prompt), Message("assistant", answer)), source, location)


def parse_messages(value: object) -> tuple[Message, ...]:
    """Return the messages of a JSON value [{"role": ..., "content": ...}, ...].

    Raises:
      ValueError: another shape; the message says which entry and what it is.
    """
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"messages must be a non-empty list of {{role, content}}, found {as_json(value, 60)}")
    messages = []
    for index, entry in enumerate(value):
        role, content = (entry.get("role"), entry.get("content")) if isinstance(entry, dict) else (None, None)
        if not isinstance(role, str) or not isinstance(content, str):
            raise ValueError(f"message {index} must have a string role and content, found {as_json(entry, 80)}")
        messages.append(Message(role, content))
    return tuple(messages)


def provenance(item: Document | Conversation) -> dict[str, str | int]:
    """Return what is known of where `item` comes from besides source and location: offset, id."""
    return {name: value for name in ("offset", "id") if (value := getattr(item, name)) is not None}
