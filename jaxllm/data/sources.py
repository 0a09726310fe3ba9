"""Sources of documents and conversations: text files, JSON lines, the Python standard library, the micro-world.

Everything is read as a stream and in a fixed order, so memory does not grow with the corpus and a second pass sees the
same. Lines end at "\\n" and nowhere else: real text holds U+2028 and U+0085, which `str.splitlines` would cut at.
"""

import glob
import json
import os
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from jaxllm.core.config import Config
from jaxllm.data import pydocs, world
from jaxllm.data.documents import Conversation, Document, Message, parse_messages
from jaxllm.data.problems import Problems


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
            for path in _files(source.path):
                yield from _text_documents(path, source.split, problems)
        case JsonLines():
            name = source.fields or "text"
            for path in _files(source.path):
                for number, row in _rows(path, problems):
                    text = _field(row, name, f"{path}:{number}", problems)
                    if text is not None:
                        yield Document(text, path, f"line {number}")
        case PyDocs():
            yield from pydocs.documents()
        case World():
            yield from world.documents(source.count, source.seed)


def conversations(source: Input, problems: Problems) -> Iterator[Conversation]:
    """Yield the conversations of a source.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: a text source, which has none; unreadable input under the policy "error".
    """
    match source:
        case TextFiles():
            raise ValueError(
                f"--text {source.path} has no conversations; use --jsonl for chat data, or leave out --chat"
            )
        case JsonLines():
            for path in _files(source.path):
                for number, row in _rows(path, problems):
                    yield from _conversations(row, source.fields, path, number, problems)
        case PyDocs():
            yield from pydocs.conversations()
        case World():
            yield from world.conversations(source.count, source.seed)


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


def _text_documents(path: str, split: str, problems: Problems) -> Iterator[Document]:
    for number, offset, data in _cut(path, split):
        text = problems.decode(data, path, offset)
        if text is not None:
            yield Document(text.removeprefix("\ufeff"), path, "whole file" if split == "file" else f"line {number}")


def _cut(path: str, split: str) -> Iterator[tuple[int, int, bytes]]:
    """(first line number, byte offset, content) of each document of a file."""
    if split == "file":
        with open(path, "rb") as file:
            yield 1, 0, file.read()
        return
    held: list[bytes] = []
    first = (1, 0)
    for number, offset, line in _lines(path):
        if line.strip() and not held:
            first = (number, offset)
        if line.strip():
            held.append(line)
        if held and (split == "line" or not line.strip()):
            yield *first, b"".join(held).rstrip(b"\r\n")
            held = []
    if held:
        yield *first, b"".join(held).rstrip(b"\r\n")


def _lines(path: str) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, line with its newline); a binary file is cut at newlines only."""
    offset = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, start=1):
            yield number, offset, line
            offset += len(line)


def _rows(path: str, problems: Problems) -> Iterator[tuple[int, dict]]:
    for number, offset, line in _lines(path):
        text = problems.decode(line, f"{path}:{number}", offset)
        if text is None or not text.strip():
            continue
        try:
            row = json.loads(text.removeprefix("\ufeff"))
        except json.JSONDecodeError as error:
            problems.report(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})")
            continue
        except RecursionError:
            problems.report(f"{path}:{number}: JSON nested too deeply")
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            problems.report(f"{path}:{number}: a row must be a JSON object, found {type(row).__name__}")


def _field(row: dict, name: str, place: str, problems: Problems) -> str | None:
    """A string field of a row, or None after a report."""
    value = row.get(name)
    if not isinstance(value, str):
        found = (
            f"it is {type(value).__name__}"
            if name in row
            else f"the row has {', '.join(map(repr, row)) or 'no fields'}"
        )
        problems.report(f"{place}: no text in field {name!r}: {found}")
        return None
    return _valid(value, place, problems)


def _valid(text: str, place: str, problems: Problems) -> str | None:
    """`text` unless it holds half of a surrogate pair, as JSON's \\ud800 can, which no UTF-8 can say."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError as error:
        problems.report(f"{place}: lone surrogate \\u{ord(text[error.start]):04x} at character {error.start}")
    return text.encode("utf-8", errors="replace").decode("utf-8") if problems.policy == "replace" else None


def _conversations(row: dict, fields: str | None, path: str, number: int, problems: Problems) -> Iterator[Conversation]:
    """The conversations of a row: one, or one per entry of `instances` (Wang et al. 2023, Self-Instruct)."""
    place = f"{path}:{number}"
    form = fields or _recognise(row)
    if form is None:
        problems.report(
            f"{place}: not a conversation: the row has {', '.join(map(repr, row)) or 'no fields'}; expected "
            "'messages', or 'instruction' and 'output' or 'instances', or name two fields: --jsonl FILE:PROMPT,ANSWER"
        )
        return
    rows, form = (_instances(row, place, problems), "alpaca") if form == "instances" else ([row], form)
    for each in rows:
        messages = _messages(each, place, problems) if form == "messages" else _pair(each, form, place, problems)
        if messages is not None:
            yield Conversation(messages, path, f"line {number}")


def _instances(row: dict, place: str, problems: Problems) -> list[dict]:
    """One alpaca row per instance: the instruction is said once for all of them."""
    instances = row.get("instances")
    if isinstance(instances, list) and instances and all(isinstance(each, dict) for each in instances):
        shared = {"instruction": row["instruction"]} if "instruction" in row else {}
        return [shared | each for each in instances]
    problems.report(
        f"{place}: 'instances' must be a non-empty list of {{input, output}}, found {str(instances)[:60]!r}"
    )
    return []


def _messages(row: dict, place: str, problems: Problems) -> tuple[Message, ...] | None:
    try:
        messages = parse_messages(row.get("messages"))
    except ValueError as error:
        problems.report(f"{place}: {error}")
        return None
    turns = [(_valid(each.role, place, problems), _valid(each.content, place, problems)) for each in messages]
    return None if any(None in turn for turn in turns) else tuple(Message(*turn) for turn in turns)


def _pair(row: dict, form: str, place: str, problems: Problems) -> tuple[Message, ...] | None:
    names = "instruction,output" if form == "alpaca" else form
    prompt_name, _, answer_name = names.partition(",")
    prompt = _field(row, prompt_name, place, problems)
    answer = _field(row, answer_name, place, problems) if prompt is not None else None
    if prompt is None or answer is None:
        return None
    context = row.get("input") if form == "alpaca" else None
    if context and (context := _field(row, "input", place, problems)) is None:
        return None
    return Message("user", f"{prompt}\n\n{context}" if context else prompt), Message("assistant", answer)


def _recognise(row: dict) -> str | None:
    if "messages" in row:
        return "messages"
    if "instruction" not in row:
        return None
    return next((form for field, form in (("output", "alpaca"), ("instances", "instances")) if field in row), None)
