"""Atomic files and fingerprints: a reader sees the old content or the new, never a part of it."""

import contextlib
import difflib
import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxllm.core.bucket import here, named, push


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Replace the file at `path` with `content`, durably: temporary file, fsync, rename.

    Raises:
      OSError: the disk is full or the directory is not writable; the old file is then untouched.
    """
    path = here(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    push(path)


def write_text(path: str | os.PathLike, content: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, content.encode("utf-8"))


def write_json(path: str | os.PathLike, value: Any) -> None:
    """`write_text` of indented JSON, keys in the given order, non-ASCII characters as they are."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike, missing: Any = None) -> Any:
    """Parse the JSON file at `path`; return `missing`, if it is given, where there is no file.

    Raises:
      ValueError: the file is not JSON; the message names it.
    """
    if missing is not None and not Path(path).is_file():
        return missing
    text = Path(path).read_text(encoding="utf-8")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); it was damaged or edited: write it again") from error


def misspelt(path: Path) -> str:
    """Return "; did you mean OTHER?" for a path that does not exist, where a neighbour has a similar name, else ""."""
    wrong = path
    while not wrong.parent.exists():
        wrong = wrong.parent
    near = difflib.get_close_matches(wrong.name, [each.name for each in wrong.parent.glob("*")], n=1)
    return f"; did you mean {wrong.parent / near[0] / path.relative_to(wrong)}?" if near else ""


def named_run(path: Path) -> tuple[Path, int | None]:
    """Return (the run of which `path` is a checkpoint, or that its run.json names, or itself; checkpoint or None)."""
    if path.parent.name == "checkpoints" and path.name.isdigit():
        return path.parent.parent, int(path.name)
    named = {} if (path / "recipe.yaml").is_file() else read_json(path / "run.json", {"model": ""})
    return path / named.get("model", ""), None


def check_no_file(directory: Path) -> None:
    """Raise ValueError if `directory` cannot be one: it is a file, or inside of one."""
    if taken := next((path for path in (directory, *directory.parents) if path.is_file()), None):
        raise ValueError(f"{taken} is a file; name a directory")


def check_empty(directory: str | os.PathLike) -> None:
    """Raise ValueError unless `directory` is free to write into: it does not exist, or holds nothing."""
    check_no_file(path := here(directory))
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{named(path)} is not empty; choose a new directory")


@contextlib.contextmanager
def new_directory(directory: str | os.PathLike) -> Iterator[Path]:
    """Give a place to write into that becomes `directory` when all went well; a kill leaves no half of it.

    Raises:
      ValueError: `directory` is not free to write into.
    """
    directory = here(directory)
    check_empty(directory)
    temporary = directory.with_name(f".{directory.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    if directory.exists():
        directory.rmdir()
    temporary.rename(directory)
    push(directory)


def temporary_beside(directory: Path) -> Path:
    """Return a hidden name next to `directory` that says which process of which machine writes there."""
    return directory.with_name(f".{directory.name}.{socket.gethostname()}.{os.getpid()}.tmp")


def drop_leftovers(directory: Path) -> None:
    """Remove what killed processes of this machine left in their `temporary_beside`; the living keep theirs."""
    ours = temporary_beside(directory)
    for path in directory.parent.glob(f".{glob.escape(directory.name)}.{socket.gethostname()}.*.tmp"):
        with contextlib.suppress(ValueError, PermissionError):  # PermissionError: it lives, and is another user's
            try:
                os.kill(int(path.suffixes[-2][1:]), 0)
            except ProcessLookupError:
                shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(ours, ignore_errors=True)  # of a process that had our number


def fingerprint(*parts: bytes | str) -> str:
    """First 16 hex digits of the SHA-256 of `parts`, each preceded by its length so that boundaries count."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:16]
