"""Sources of documents and conversations: files of many kinds, data sets, the Python library, the micro-world.

Everything is read as a stream and in a fixed order, so memory does not grow with the corpus and a second pass sees the
same. Lines end at "\\n" and nowhere else: real text holds U+2028 and U+0085, which `str.splitlines` would cut at.
"""

import codecs
from collections.abc import Iterator
from itertools import pairwise
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import Field, field_validator, model_validator

from jaxllm.core.config import Config
from jaxllm.data.documents import Conversation, Document, Message, parse_messages
from jaxllm.data.problems import Problems, as_json
from jaxllm.data.reading import input_files, pydocs, rows, texts

FORMS = ("messages", "alpaca", "instances")  # of rows that are conversations, apart from a field each
IDS = ("id", "url")  # fields that say what a row is called, the first that is there
MAX_BYTES, MAX_TEXT = 1 << 25, 1 << 24  # memory is up to 50 times as much
PATH = "file, glob pattern (** matches any depth), archive (.zip, .tar, .tar.gz), or directory; also gs://..."
FIELDS = (
    "text: name of the field with the text (default: text); chat: messages, alpaca, instances or PROMPT,ANSWER (names "
    "of two fields; default: as the row looks)"
)
LONGEST = "longest document or line that is read, in bytes; a longer one is a problem"
CUT = "longest document, in bytes; a longer one is cut if it is UTF-8, at a line, a word or a character, else a problem"


class Files(Config):
    """Files, or a directory of them."""

    path: str = Field(description=PATH)
    max_bytes: int = Field(MAX_BYTES, ge=1, description=LONGEST)


class Encoded(Files):
    """Files in some encoding."""

    encoding: str = Field(
        "utf-8", description="of the files; several (utf-8,gb18030): of each document the first that it can be in"
    )

    @field_validator("encoding")
    @classmethod
    def _named(cls, encoding: str) -> str:
        try:
            names = encoding.split(",")
            return ",".join("utf-8" if codecs.lookup(name).name == "utf-8" else name for name in names)
        except LookupError as error:
            raise ValueError(f"{error}; Python knows utf-8, gb18030, big5, latin-1, utf-16, ...") from error

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kind not in ("text", "markdown", "jsonl") and self.encoding != "utf-8":
            raise ValueError(f"encoding={self.encoding}: --{self.kind} has no encoding of its own; leave it out")
        for name in self.encoding.split(","):
            if "\n".encode(name) != b"\n" and getattr(self, "split", "") != "file":
                raise ValueError(
                    f"encoding={name} cannot be cut at newlines; convert the file: iconv -f {name} -t utf-8"
                )
        return self


class TextFiles(Encoded):
    """Plain text or Markdown; the YAML at the beginning of Markdown is left out."""

    kind: Literal["text", "markdown"] = "text"
    split: Literal["file", "paragraph", "line"] = Field(
        "file", description="what one document is: a whole file, text between blank lines, a line"
    )
    max_bytes: int = Field(MAX_TEXT, ge=1, description=CUT)


class WebPages(Files):
    """Web pages: HTML files, or the responses and converted texts of web archives (WARC, WET)."""

    kind: Literal["html", "warc"] = "html"


class RowFiles(Encoded):
    """Rows with named fields: JSON lines, Parquet, ArrayRecord (JSON or text), a directory of Hugging Face datasets."""

    kind: Literal["jsonl", "parquet", "arrayrecord", "hf"] = "jsonl"
    fields: str | None = Field(None, description=f"{FIELDS}; without it, records of ArrayRecord are text, not JSON")


class Tfds(Config):
    """A prepared data set of TensorFlow Datasets, read without TensorFlow; its files must be ArrayRecord or Parquet."""

    kind: Literal["tfds"] = "tfds"
    name: str = Field(description="name, name:1.0.0 or name/config:1.0.0")
    split: str = Field("train", description="split, or a part of it: train[:10%]")
    data_dir: str | None = Field(None, description="where it is prepared; also gs://... (default: that of TFDS)")
    fields: str | None = Field(None, description=FIELDS)
    max_bytes: int = Field(MAX_BYTES, ge=1, description=LONGEST)


class PyDocs(Config):
    """The documentation inside this Python: topics and docstrings; for chat, questions about what a function does."""

    kind: Literal["pydocs"] = "pydocs"


class World(Config):
    """The synthetic micro-world: the same bytes on every machine."""

    kind: Literal["world"] = "world"
    count: int = Field(10_000, ge=1, description="documents, or conversations for chat")
    seed: int = Field(0, ge=0, description="another seed gives another sample of the same world")


FileInput = TextFiles | WebPages | RowFiles
Input = Annotated[FileInput | Tfds | PyDocs | World, Field(discriminator="kind")]


class Part(NamedTuple):
    """What one worker reads alone: a file, or a stretch of one or of a data set.

    Attributes:
      path: the file, or what the source is called.
      size, changed: of the file when it was found, in bytes, and when it was written; what is appended later is not
        read. None: unknown.
      first, stop: bytes of the file (of one that is not cut at bytes, its share: `share`), or rows of a data set.
      before: lines of the file before `first`.
    """

    source: Input
    path: str
    size: int | None = None
    changed: int | None = None
    first: int = 0
    stop: int = 0
    before: int = 0

    def share(self, count: int) -> range:
        """Return which of the `count` records of the file, or groups of them, are in this stretch of it."""
        return (
            range(*(-(-byte * count // self.size) for byte in (self.first, self.stop))) if self.size else range(count)
        )


def parts(source: Input) -> list[Part]:
    """Return the parts of a source, in the order of its documents.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: a data set that is not there.
    """
    match source:
        case Tfds():
            count, step = len(rows.tfds_data(source)), rows.EXAMPLES
            name = f"{source.name}[{source.split}]"
            return [Part(source, name, first=at, stop=min(at + step, count)) for at in range(0, count, step)]
        case PyDocs() | World():
            return [Part(source, source.kind)]
    stamped = ((path, input_files.stamp(path) or (None, None)) for path in paths(source))
    return [Part(source, path, size, changed, stop=size or 0) for path, (size, changed) in stamped]


def cut(part: Part, step: int) -> list[Part]:
    """Return stretches of `step` bytes or more of a file, or `part`: one that is remote or packed has none of lines."""
    if part.size is None or part.size <= step or input_files.is_archive(part.path):
        return [part]
    match part.source:
        case RowFiles(kind="parquet" | "arrayrecord" as kind):
            count = min(part.size // step, rows.count_groups(part.path, kind))
            edges = [part.size * number // count for number in range(count + 1)]
            return [part._replace(first=first, stop=stop) for first, stop in pairwise(edges)]
        case RowFiles(kind="jsonl") | TextFiles(kind="text", split="line"):
            end = rb"\n"
        case TextFiles(kind="text", split="paragraph"):
            end = rb"\n\r?\n"
        case _:
            return [part]
    if "://" in part.path:
        return [part]
    found = input_files.cut(part.path, part.size, step, end)
    return [part._replace(first=first, stop=stop, before=before) for first, stop, before in found]


def name_of(source: Input) -> str:
    """Return what a person calls a source: its kind, the pattern of its files or name of a data set, and fields."""
    names = getattr(source, "path", "") or getattr(source, "name", ""), getattr(source, "fields", "")
    return " ".join(filter(None, [source.kind, ":".join(filter(None, names))]))


def paths(source: Input) -> list[str]:
    """Return the files that a source reads, in order.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: a name is not UTF-8.
    """
    if not isinstance(source, FileInput):
        return []
    found = rows.arrow_files(source.path) if source.kind == "hf" else input_files.find(source.path, source.kind)
    for path in found:
        if not path.isprintable() and path.encode("utf-8", "replace").decode() != path:
            raise ValueError(f"{path!r}: the name of this file is not UTF-8; rename it (convmv -f gbk -t utf-8)")
    return found


def documents(source: Input | Part, problems: Problems) -> Iterator[Document]:
    """Yield the running text of a source, or of one part of it.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: unreadable input under the policy "error": file, place and what is wrong.
    """
    for part in [source] if isinstance(source, Part) else parts(source):
        match part.source:
            case TextFiles() | WebPages():
                yield from texts.read(part, problems)
            case RowFiles() | Tfds():
                yield from _row_documents(part, problems)
            case PyDocs():
                yield from pydocs.documents()
            case World(count=count, seed=seed):
                yield from _world().documents(count, seed)


def _world():
    from jaxllm.data.world import world  # which takes a moment

    return world


def _row_documents(part: Part, problems: Problems) -> Iterator[Document]:
    name = part.source.fields or "text"
    for row in rows.read(part, problems, [name, *IDS]):
        value = row.values.get(name)
        if isinstance(value, bytes):
            row.values[name] = value = problems.decode(value, row.place, 0)
            if value is None:
                continue
        text = problems.attempt(row.place, _field, row.values, name, part.source.max_bytes)
        if text is not None:
            yield Document(text, part.path, row.location, row.offset, _id(row.values))


def conversations(source: Input | Part, problems: Problems) -> Iterator[Conversation]:
    """Yield the conversations of a source or part: of a row one, or one per entry of `instances`.

    Source: Wang et al. 2023, Self-Instruct.

    Raises:
      FileNotFoundError: no file matches.
      ValueError: a text source, which has none; `fields` that are none; unreadable input under the policy "error".
    """
    whole = source.source if isinstance(source, Part) else source
    if isinstance(whole, TextFiles | WebPages):
        raise ValueError(f"--{whole.kind} {whole.path} has no conversations; use --jsonl for them, or leave out --chat")
    if isinstance(whole, RowFiles | Tfds):
        names = (whole.fields or "messages").split(",")
        if names[0] not in FORMS and not (len(names) == 2 and all(names)):
            raise ValueError(
                f"--{whole.kind} {whole.name if isinstance(whole, Tfds) else whole.path}:{whole.fields}: "
                f"a conversation has two fields, PROMPT,ANSWER (or the form {', '.join(FORMS)})"
            )
    for part in [source] if isinstance(source, Part) else parts(source):
        match part.source:
            case PyDocs():
                yield from pydocs.conversations()
            case World(count=count, seed=seed):
                yield from _world().conversations(count, seed)
            case _:
                yield from _row_conversations(part, problems)


def _row_conversations(part: Part, problems: Problems) -> Iterator[Conversation]:
    for row in rows.read(part, problems, None):
        for each, form in problems.attempt(row.place, _instances, row.values, part.source.fields) or ():
            messages = problems.attempt(row.place, _messages, each, form, part.source.max_bytes)
            if messages is not None:
                yield Conversation(messages, part.path, row.location, row.offset, _id(row.values))


def _id(row: dict) -> str | None:
    """What the row is called, if it says so."""
    for name in IDS:
        if (found := row.get(name)) not in (None, "", b""):
            name = found.decode("utf-8", "replace") if isinstance(found, bytes) else str(found)
            return name[:256] if name.isascii() else name[:256].encode("utf-8", "replace").decode()
    return None


def _field(row: dict, name: str, max_bytes: int) -> str:
    """A string field of a row."""
    value = row.get(name)
    value = value.decode("utf-8") if isinstance(value, bytes) else value
    if not isinstance(value, str):
        chat = "; for conversations, give --chat" * (name == "text" and bool(_form(row)))
        found = f"it is {as_json(value, 40)}" if name in row else f"the row has {_names(row)}{chat}"
        raise ValueError(f"no text in field {name!r}: {found}")
    return _encodable(value, max_bytes)


def _encodable(text: str, max_bytes: int) -> str:
    size = len(text.encode("utf-8"))  # or it raises
    if size > max_bytes:
        raise ValueError(f"a text of {size:,} bytes, and max_bytes of this input is {max_bytes:,}; set it higher")
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


def _messages(row: dict, form: str, max_bytes: int) -> tuple[Message, ...]:
    if form == "messages":
        found = parse_messages(row.get("messages"))
        return tuple(Message(*(_encodable(text, max_bytes) for text in each)) for each in found)
    prompt_name, _, answer_name = ("instruction,output" if form == "alpaca" else form).partition(",")
    prompt, answer = (_field(row, name, max_bytes) for name in (prompt_name, answer_name))
    if form == "alpaca" and row.get("input"):
        prompt += "\n\n" + _field(row, "input", max_bytes)
    return Message("user", prompt), Message("assistant", answer)
