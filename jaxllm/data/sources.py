"""Sources of documents and conversations: text files, JSON lines, the Python standard library, the micro-world.

Everything is read as a stream and in a fixed order, so memory does not grow with the corpus and a second pass sees the
same. Lines end at "\\n" and nowhere else: real text holds U+2028 and U+0085, which `str.splitlines` would cut at.
"""

import glob
import json
import os
from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Literal

from pydantic import Field

from jaxllm.core.config import Config
from jaxllm.data import pydocs
from jaxllm.data.documents import Conversation, Document, Message, parse_messages
from jaxllm.data.problems import Problems, as_json

FORMS = ("messages", "alpaca", "instances")  # of rows that are conversations, apart from a field each


class TextFiles(Config):
    """Plain text files in UTF-8."""

    kind: Literal["text"] = "text"
    path: str = Field(description="file, or glob pattern; ** matches any depth")
    split: Literal["file", "paragraph", "line"] = Field(
        "file", description="what one document is: a whole file, text between blank lines, a line"
    )


class JsonLines(Config):
    """One JSON object per line."""

    kind: Literal["jsonl"] = "jsonl"
    path: str = Field(description="file, or glob pattern")
    fields: str | None = Field(
        None,
        description="text: name of the field with the text (default: text); chat: messages, alpaca, instances or "
        "PROMPT,ANSWER (names of two fields; default: as the row looks)",
    )


class PyDocs(Config):
    """The documentation inside this Python: topics and docstrings; for chat, questions about what a function does."""

    kind: Literal["pydocs"] = "pydocs"


class World(Config):
    """The synthetic micro-world: the same bytes on every machine."""

    kind: Literal["world"] = "world"
    count: int = Field(10_000, ge=1, description="documents, or conversations for chat")
    seed: int = Field(0, ge=0, description="another seed gives another sample of the same world")


Input = Annotated[TextFiles | JsonLines | PyDocs | World, Field(discriminator="kind")]


def documents(source: Input, problems: Problems) -> Iterator[Document]:
    """Yield the running text of a source.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: unreadable input under the policy "error": file, place and what is wrong.
    """
    match source:
        case TextFiles():
            for path, number, offset, data in _cut(source):
                text = problems.decode(data, path, offset)
                if text is not None:
                    place = "whole file" if source.split == "file" else f"line {number}"
                    yield Document(text.removeprefix("\ufeff"), path, place)
        case JsonLines():
            for path, number, row in _rows(source.path, problems):
                text = problems.attempt(f"{path}:{number}", _field, row, source.fields or "text")
                if text is not None:
                    yield Document(text, path, f"line {number}")
        case PyDocs():
            yield from pydocs.documents()
        case World():
            from jaxllm.data import world

            yield from world.documents(source.count, source.seed)


def conversations(source: Input, problems: Problems) -> Iterator[Conversation]:
    """Yield the conversations of a source: of a row one, or one per entry of `instances`.

    Source: Wang et al. 2023, Self-Instruct.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: a text source, which has none; `fields` that are none; unreadable input under the policy "error".
    """
    match source:
        case TextFiles():
            raise ValueError(f"--text {source.path} has no conversations; use --jsonl for them, or leave out --chat")
        case JsonLines():
            names = (source.fields or "messages").split(",")
            if names[0] not in FORMS and not (len(names) == 2 and all(names)):
                raise ValueError(
                    f"--jsonl {source.path}:{source.fields}: a conversation has two fields, PROMPT,ANSWER (or the form "
                    f"{', '.join(FORMS)})"
                )
            for path, number, row in _rows(source.path, problems):
                place = f"{path}:{number}"
                for each, form in problems.attempt(place, _instances, row, source.fields) or ():
                    messages = problems.attempt(place, _messages, each, form)
                    if messages is not None:
                        yield Conversation(messages, path, f"line {number}")
        case PyDocs():
            yield from pydocs.conversations()
        case World():
            from jaxllm.data import world

            yield from world.conversations(source.count, source.seed)


def paths(source: Input) -> list[str]:
    """Return the files that a source reads, in order.

    Raises:
      FileNotFoundError: no file matches.
    """
    return _files(source.path) if isinstance(source, TextFiles | JsonLines) else []


def _files(pattern: str) -> list[str]:
    """The file of this name, which may look like a pattern ("[x]1.txt"), or else the files that match the pattern."""
    if os.path.isdir(pattern):
        raise FileNotFoundError(f"{pattern!r} is a directory; name its files: '{os.path.join(pattern, '**', '*')}'")
    if os.path.exists(pattern):
        return [pattern]
    paths = sorted(path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path))
    if not paths:
        raise FileNotFoundError(
            f"no file matches {pattern!r}; quote the pattern, so that the shell does not expand it, and check the path"
        )
    return paths


def _cut(source: TextFiles) -> Iterator[tuple[str, int, int, bytes]]:
    """(path, first line number, byte offset, content) of each document."""
    for path in _files(source.path):
        if source.split == "file":
            with open(path, "rb") as file:
                yield path, 1, 0, file.read()
            continue
        held: list[bytes] = []
        first = (1, 0)
        for number, offset, line in chain(_lines(path), [(0, 0, b"")]):
            if line.strip():
                first = first if held else (number, offset)
                held.append(line)
            if held and (source.split == "line" or not line.strip()):
                yield path, *first, b"".join(held).rstrip(b"\r\n")
                held = []


def _lines(path: str) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, line with its newline); a binary file is cut at newlines only."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, offset, line
            offset += len(line)


def _rows(pattern: str, problems: Problems) -> Iterator[tuple[str, int, dict]]:
    """(path, line number, row) of each line that is a JSON object."""
    for path in _files(pattern):
        for number, offset, line in _lines(path):
            text = problems.decode(line, f"{path}:{number}", offset)
            if text is not None and text.strip():
                row = problems.attempt(f"{path}:{number}", _row, text.removeprefix("\ufeff"))
                if row is not None:
                    yield path, number, row


def _row(text: str) -> dict:
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, found {type(row).__name__}")
    return row


def _field(row: dict, name: str) -> str:
    """A string field of a row."""
    value = row.get(name)
    if not isinstance(value, str):
        chat = "; for conversations, give --chat" * (name == "text" and bool(_form(row)))
        found = f"it is {type(value).__name__}" if name in row else f"the row has {_names(row)}{chat}"
        raise ValueError(f"no text in field {name!r}: {found}")
    return _encodable(value)


def _encodable(text: str) -> str:
    text.encode("utf-8")  # or it raises
    return text


def _names(row: dict) -> str:
    return ", ".join(map(repr, row)) or "no fields"


def _form(row: dict) -> str | None:
    """Which form of a conversation a row looks like."""
    forms = {"output": "alpaca", "instances": "instances"} if "instruction" in row else {}
    forms = {"messages": "messages"} | forms
    return next((form for field, form in forms.items() if field in row), None)


def _instances(row: dict, fields: str | None) -> list[tuple[dict, str]]:
    """(row, form) of each conversation; where a row has several, the instruction is said once for all of them."""
    form = fields or _form(row)
    if form is None:
        raise ValueError(
            f"not a conversation: the row has {_names(row)}; expected 'messages', or 'instruction' and 'output' or "
            "'instances', or name two fields: --jsonl FILE:PROMPT,ANSWER"
        )
    if form != "instances":
        return [(row, form)]
    instances = row.get("instances")
    if not (isinstance(instances, list) and instances and all(isinstance(each, dict) for each in instances)):
        raise ValueError(f"'instances' must be a non-empty list of {{input, output}}, found {as_json(instances, 60)}")
    shared = {"instruction": row["instruction"]} if "instruction" in row else {}
    return [(shared | each, "alpaca") for each in instances]


def _messages(row: dict, form: str) -> tuple[Message, ...]:
    if form == "messages":
        return tuple(
            Message(_encodable(each.role), _encodable(each.content)) for each in parse_messages(row.get("messages"))
        )
    prompt_name, _, answer_name = ("instruction,output" if form == "alpaca" else form).partition(",")
    prompt, answer = (_field(row, name) for name in (prompt_name, answer_name))
    if form == "alpaca" and row.get("input"):
        prompt += "\n\n" + _field(row, "input")
    return Message("user", prompt), Message("assistant", answer)
