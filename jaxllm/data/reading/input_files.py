"""Files of inputs: which there are (globs, directories, here or remote), and their bytes (compressed, in archives)."""

import bz2
import fnmatch
import glob
import gzip
import io
import lzma
import mmap
import os
import re
import stat
import tarfile
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, BinaryIO

from etils import epath

from jaxllm.core.extras import extra
from jaxllm.data.problems import Problems

if TYPE_CHECKING:
    from jaxllm.data.reading.sources import Part

BUFFER = 1 << 18
Line = tuple[int, int, int, bytes]  # number, offset, size, content
_ENDINGS = {
    "text": "txt|text", "markdown": "md|markdown", "html": "html?|xhtml", "warc": "warc|wet", "jsonl": "jsonl|ndjson",
    "parquet": "parquet", "arrayrecord": "array_?record",
}  # fmt: skip
_NAMES = {  # of files of each kind, also numbered as in -00000-of-00008, also compressed
    kind: re.compile(rf"\.({endings})(-\d+-of-\d+)?(\.(gz|zst|bz2|xz))?$", re.IGNORECASE)
    for kind, endings in _ENDINGS.items()
}
_TAR = re.compile(r"\.(tar|tar\.\w+|tgz)$", re.IGNORECASE)
_PACKED = re.compile(rb"\x1f\x8b|\xfd7zXZ\0|BZh[1-9]1AY&SY|\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")  # how files begin
_HIDDEN = re.compile(r"(^|/)(\.[^/.]|__MACOSX/)")


def find(pattern: str, kind: str) -> list[str]:
    """Return the files that are meant, in order.

    Args:
      pattern: a file, whose name may look like a pattern ("[x]1.txt"); a directory, of which the files are meant that
        are named as `kind` demands, at any depth; or a pattern, in which ** stands for directories at any depth. Hidden
        files are left alone, and each directory is visited once, whatever links lead to it.
    Raises:
      FileNotFoundError: there is none.
      ValueError: the package for a remote store is not installed.
    """
    try:
        is_directory = epath.Path(pattern).is_dir()
    except ImportError as error:  # the package for this kind of store is missing, and the message says which
        raise ValueError(f"{pattern}: {error}") from error
    if is_directory:
        below = [path for place in _directories(pattern) for path in _children(place) if not epath.Path(path).is_dir()]
        if not (paths := sorted(path for path in below if _NAMES[kind].search(path))):
            others = sorted({os.path.splitext(path)[1] or "no suffix" for path in below})[:8]
            raise FileNotFoundError(
                f"no file in the directory {pattern!r} is named as --{kind} demands; its {len(below)} files end in "
                f"{', '.join(others) or 'nothing'}; name them: {_join(pattern, '**/*')!r}"
            )
        return paths
    if epath.Path(pattern).exists():
        return [pattern]
    root, rest = re.fullmatch(r"(\w+://[^/]*/?|/)?(.*)", pattern.replace(os.sep, "/")).groups()
    paths = sorted({path for path in _expand(root or "", rest.split("/")) if not epath.Path(path).is_dir()})
    if not paths:
        raise FileNotFoundError(
            f"no file matches {pattern!r}; quote the pattern, so that the shell does not expand it, and check the path"
        )
    return paths


def stamp(path: str) -> tuple[int, int] | None:
    """Return (size in bytes, time of the last change) of a file; None for a pipe and for what cannot be looked at."""
    try:
        if "://" in path:
            found = epath.Path(path).stat()
            return found.length, int(found.mtime)
        found = os.stat(path)
    except OSError:  # whoever reads it will say so
        return None
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def cut(path: str, size: int, step: int, end: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (first byte, end, lines before) of stretches of `step` bytes or more of a file here, or all of it at once,
    where it is compressed.

    Args:
      end: pattern of what a stretch ends with, such as a newline.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        step = size if _PACKED.match(content) else step
        first = before = 0
        while first < size:
            found = re.compile(end).search(content, first + step - 1, size)
            stop = found.end() if found else size
            yield first, stop, before
            before += content[first:stop].count(b"\n")
            first = stop


def streams(part: "Part", problems: Problems) -> Iterator[tuple[str, str, BinaryIO]]:
    """Yield a file, or a stretch of it, or those members of an archive that are named as its kind demands.

    Returns:
      (what it is called in messages, what its locations begin with, content).
    """
    for member, content in problems.guard(part.path, _members(part, problems)):
        yield (f"{part.path}/{member}", f"{member}, ", content) if member else (part.path, "", content)


def _members(part: "Part", problems: Problems) -> Iterator[tuple[str, BinaryIO]]:
    path, kind = part.path, part.source.kind
    with open_file(path) as file:
        begin = Stretch(file, part)
        if path.lower().endswith(".zip"):
            yield from _wanted(_zipped(file), kind, problems)
        elif _TAR.search(path):
            yield from _wanted(_tarred(unpacked(begin)), kind, problems)
        else:
            yield "", begin
        if begin.grew:
            problems.notes[f"{path} grew while it was read: only its first {part.size:,} bytes are used"] += 1


def is_archive(path: str) -> bool:
    """Return whether a file is named as an archive is."""
    return bool(_TAR.search(path)) or path.lower().endswith(".zip")


def _wanted(
    members: Iterable[tuple[str, Callable[[], BinaryIO]]], kind: str, problems: Problems
) -> Iterator[tuple[str, BinaryIO]]:
    found = False
    for name, open_member in members:
        if _NAMES[kind].search(name) and not _HIDDEN.search(name):
            found = True
            yield name, open_member()
        else:
            suffix = os.path.splitext(name)[1].lower()
            which = "hidden" if _HIDDEN.search(name) else suffix if suffix[1:].isalpha() else "others"
            problems.notes[f"members of archives left out, which --{kind} does not read: {which}"] += 1
    if not found:
        raise OSError(f"no member of the archive is named as --{kind} demands")


def _zipped(file: BinaryIO) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if not info.is_dir():
                yield info.filename, partial(archive.open, info)


def _tarred(file: BinaryIO) -> Iterator[tuple[str, Callable[[], BinaryIO]]]:
    with tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as archive:
        while (info := archive.next()) is not None:
            archive.members = []  # else memory grows with their number
            if info.isfile():
                yield info.name, partial(archive.extractfile, info)


class _Member(tarfile.TarInfo):
    """A member of a tar archive, which ends with blocks of zeros; tarfile takes anything for one."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise
        except tarfile.HeaderError as error:
            raise OSError(f"the archive is damaged or cut short ({error})") from error


def open_file(path: str) -> BinaryIO:
    """Open a file here or elsewhere (gs://...) for reading."""
    return epath.Path(path).open("rb")


def lines(content: BinaryIO, limit: int, *, cut: bool = False) -> Iterator[Line]:
    """Yield the lines, which end at newlines only: (number from 1, offset, size, at most `limit` + 1 of its bytes).

    Args:
      cut: yield a longer line in pieces of at most `limit` bytes of UTF-8, which end at a space where there is one.
    """
    stream, offset, number = unpacked(content), getattr(content, "first", 0), getattr(content, "before", 0)
    rest = b""
    while data := rest if rest.endswith(b"\n") else rest + stream.readline(limit + 1 - len(rest)):
        rest = b""
        # The last piece of a line is more than its end, which alone would be a line without text.
        most = min(limit, max(0, len(data.rstrip(b"\r\n")) - 1))
        if cut and len(data) > limit and (stop := _stop(data, most)):
            data, rest = data[:stop], data[stop:]
            yield number + 1, offset, stop, data
            offset += stop
            continue
        size, end = len(data), data
        while not end.endswith(b"\n"):
            if not (end := stream.readline(BUFFER)):
                if isinstance(content, Stretch) and content.grew:
                    return  # half a line: the writer was not done
                break
            size += len(end)
        number += 1
        yield number, offset, size, data
        offset += size


def _stop(data: bytes, limit: int) -> int:
    """Where to end the first piece of a line of UTF-8: behind a space near `limit`, or before a character."""
    stop = data.rfind(b" ", limit - limit // 8, limit) + 1 or limit
    while stop and data[stop] & 0xC0 == 0x80:
        stop -= 1
    return stop


class Stretch(io.RawIOBase):
    """A part of a file, so that what a writer appends meanwhile is not seen; `grew`: there was more in the end."""

    def __init__(self, file: BinaryIO, part: "Part"):
        self.file, self.grew, self.first, self.before = file, False, part.first, part.before
        self.left = None if part.size is None else part.stop - part.first
        self._last = part.stop == part.size
        if part.first:
            file.seek(part.first)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self.file.readinto(memoryview(buffer)[: self.left])
        if self.left is not None:
            if not count and self.left:
                raise OSError(f"the file lost its last {self.left:,} bytes while it was read")
            self.left -= count
            self.grew = self.grew or (not self.left and self._last and bool(self.file.read(1)))
        return count


def unpacked(content: BinaryIO) -> BinaryIO:
    """Decompress what looks compressed, whatever it is called."""
    stream = io.BufferedReader(content, BUFFER)
    head = stream.peek(16)
    if not _PACKED.match(head):
        return stream
    for begin, opened in ((b"\x1f\x8b", gzip.open), (b"\xfd7zXZ", lzma.open), (b"BZh", bz2.open)):
        if head.startswith(begin):
            file = opened(stream)
            file.readinto = file.readinto1  # what it has at once: else what comes before a break is lost
            return io.BufferedReader(file, BUFFER)
    with extra("prep"):
        import pyarrow
    return io.BufferedReader(pyarrow.CompressedInputStream(stream, "zstd"), BUFFER)  # it finds cut ones


def _join(place: str, name: str) -> str:
    return f"{place}/{name}" if place and not place.endswith("/") else place + name


def _children(place: str, hidden: bool = False) -> list[str]:
    names = sorted(each.name for each in epath.Path(place or ".").iterdir())
    return [_join(place, name) for name in names if hidden or not name.startswith(".")]


def _directories(top: str) -> Iterator[str]:
    """`top` and the directories below it, the nearest first."""
    seen, waiting = set(), deque([top])
    while waiting:
        place = waiting.popleft()
        real = place if "://" in place else os.path.realpath(place)
        if real not in seen:
            seen.add(real)
            yield place
            waiting.extend(path for path in _children(place) if epath.Path(path).is_dir())


def _expand(place: str, parts: list[str]) -> Iterator[str]:
    """What matches the pattern whose components are `parts`, from `place` on."""
    first, *rest = parts
    if first == "**":
        for directory in _directories(place):
            yield from _expand(directory, rest or ["*"])
        return
    if not glob.has_magic(first):
        found = [_join(place, first)] if epath.Path(_join(place, first)).exists() else []
    else:
        children = _children(place, first.startswith(".")) if epath.Path(place or ".").is_dir() else []
        found = [path for path in children if fnmatch.fnmatch(path.rpartition("/")[2], first)]
    for path in found:
        yield from _expand(path, rest) if rest else [path]
