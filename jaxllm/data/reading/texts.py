"""Readers of files whose content is running text: plain text, Markdown, web pages, web archives."""

import re
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from jaxllm.core.extras import extra
from jaxllm.data.documents import Document
from jaxllm.data.problems import BROKEN, Problems
from jaxllm.data.reading.html import extract_text
from jaxllm.data.reading.input_files import Line, lines, streams, unpacked

if TYPE_CHECKING:
    from jaxllm.data.reading.sources import Part, TextFiles

_YAML_LINE = re.compile(rb"[\w .\"'-]+:(\s|$)|\s|-\s|#|$")
_HTML = ("text/html", "application/xhtml+xml")
_PAGES = (*_HTML, "text/plain")
_LAST_RECORD = b"WARC/1.0\r\nWARC-Type: conversion\r\nContent-Length: 0\r\n\r\n\r\n\r\n"


class _Text(NamedTuple):
    """One document as bytes, or as text already; `offset` None: it is a whole file."""

    location: str
    offset: int | None
    size_bytes: int
    content: bytes | str
    id: str | None = None


def read(part: "Part", problems: Problems) -> Iterator[Document]:
    """Yield the documents of one input file; those longer than the source's `max_bytes` are cut, or problems."""
    source = part.source
    readers = {"text": _plain, "markdown": _plain, "html": _page, "warc": _archive}
    for file, prefix, content in streams(part, problems):
        found = readers[source.kind](content, source, problems, file)
        for location, offset, size, text, name in problems.guard(file, found):
            if size > source.max_bytes:
                problems.report(
                    f"{file}, {location}: a document of {size:,} bytes, and max_bytes of this input is "
                    f"{source.max_bytes:,}; set it higher"
                )
                continue
            if isinstance(text, bytes):
                text = problems.decode(text, file, offset or 0, getattr(source, "encoding", "utf-8"))
            if text is not None:
                place = prefix[:-2] if offset is None and prefix else prefix + location
                yield Document(text.removeprefix("\ufeff"), part.path, place, offset, name)


def _plain(content: BinaryIO, source: "TextFiles", problems: Problems, file: str) -> Iterator[_Text]:
    """Files, paragraphs or lines; those of UTF-8 are cut at `max_bytes`, so that memory does not grow with them."""
    limit, cut = source.max_bytes, source.encoding == "utf-8"
    longer = f"cuts in texts longer than max_bytes={limit:,}, where a line, a word or a character ends"
    found = lines(content, limit, cut=cut)
    if source.kind == "markdown":
        found = _without_front_matter(found)
    if source.split == "line":
        before = 0
        for number, offset, size, data in found:
            if number == before:
                problems.notes[longer] += 1
            before = number
            if not data.isspace():
                yield _Text(f"line {number}", offset, size, data.rstrip(b"\r\n"))
        return
    wide = "\u3000".encode(source.encoding.split(",")[0], "ignore")  # the space of Chinese text
    whole, held, first, size, begun = source.split == "file", [], (1, 0), 0, False
    for number, offset, size_bytes, data in _ended(found):
        blank = not data.strip() or (data.startswith(wide) and not data.replace(wide, b"").strip())
        full = cut and size + size_bytes > limit and (whole or not blank)
        if full:
            problems.notes[longer] += 1
        if whole and not (number or begun):
            yield _Text("whole file", None, size, b"".join(held))
        elif size and (full or not number or (blank and not whole)):
            text = b"".join(held)
            yield _Text(f"line {first[0]}", first[1], size, text if whole else text.rstrip(b"\r\n"))
            held, size, begun = [], 0, True
        if whole or not blank:
            first = first if size else (number, offset)
            size += size_bytes
            held.append(data)
            if size > limit:
                held.clear()


def _ended(found: Iterator[Line]) -> Iterator[Line]:
    """Yield lines and an empty one of number 0 at their end, also where the file breaks: what came before is text."""
    end, line = (0, 0, 0, b""), None
    try:
        for line in found:
            yield line
    except BROKEN:
        if line:
            yield end
        raise
    yield end


def _without_front_matter(found: Iterator[Line]) -> Iterator[Line]:
    """Leave out YAML between two lines of dashes at the beginning, which describes the text."""
    held: list[Line] = []
    for line in found:
        held.append(line)
        text = line[-1].strip()
        if len(held) > 1 and text in (b"---", b"..."):
            return found
        if text != b"---" and (len(held) == 1 or not _YAML_LINE.match(line[-1])):
            break
    return chain(held, found)


def _page(content: BinaryIO, source, problems: Problems, file: str) -> Iterator[_Text]:
    data = unpacked(content).read(source.max_bytes + 1)
    text = problems.attempt(file, extract_text, data) if len(data) <= source.max_bytes else ""
    if text is not None:
        yield _Text("whole file", None, len(data), text)


class _Ended:
    """A stream with one record more, so that an archive that is cut short can be told from one that ends there."""

    def __init__(self, stream: BinaryIO):
        self.stream, self.end, self.at = stream, _LAST_RECORD, 0

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        if not data:
            data, self.end = self.end, b""
        self.at += len(data)
        return data

    def tell(self) -> int:
        return self.at

    def is_end(self, place: int) -> bool:
        return not self.end and place == self.at - len(_LAST_RECORD)


def _archive(content: BinaryIO, source, problems: Problems, file: str) -> Iterator[_Text]:
    """Pages and converted texts; other records have no text, and are counted in the notes."""
    with extra("prep"):
        from fastwarc.warc import ArchiveIterator, WarcRecordType
        from resiliparse.parse.encoding import bytes_to_str
    types = WarcRecordType.response | WarcRecordType.resource | WarcRecordType.conversion
    ended, at = _Ended(unpacked(content)), 0
    held: _Text | None = None  # until the next record shows that this one is whole
    try:
        for record in ArchiveIterator(ended, record_types=types, parse_http=True, auto_decode="all"):
            if held:
                yield held
            held, at = None, record.stream_pos
            if ended.is_end(at):
                return
            kind = record.http_content_type or record.headers.get("Content-Type", "no type").partition(";")[0]
            status = record.http_headers.status_code if record.http_headers else 200
            good = status and status // 100 == 2
            if not good or kind not in _PAGES:
                problems.notes[f"WARC records left out: {kind if good else f'status {status}'}"] += 1
                continue
            location, size = f"record {record.headers.get('WARC-Target-URI')}", record.content_length
            data = record.reader.read(source.max_bytes + 1) if size <= source.max_bytes else b""
            if data and record.http_charset:
                with suppress(LookupError):  # no such encoding
                    data = bytes_to_str(data, record.http_charset)
            text = problems.attempt(f"{file}, {location}", extract_text, data) if kind in _HTML else data
            if text is not None:
                held = _Text(location, at, max(size, len(data)), text, record.record_id)
    except OSError as error:
        raise OSError(f"the record at byte offset {at} or the one after it is broken ({error})") from error
    raise OSError(f"the record at byte offset {at} is cut short")
