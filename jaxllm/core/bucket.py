"""Directories in a bucket ("gs://bucket/runs/a"): each has a twin on this machine, where it is read and written.

A run appends to files, locks and renames, and data are mapped into memory: nothing that a bucket can do. So all of that
is done in the twin, and `push` copies what has changed into the bucket. Checkpoints have no twin: Orbax writes and
reads them in the bucket itself, all hosts at once (`origin`).
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from etils.epath import Path as AnyPath

TWINS = Path("~/.cache/jaxllm/buckets").expanduser()
BULK = ("checkpoints", "damaged")  # the directories of a run that have no twin
LAST = "manifest.json"  # of a dataset: says that all its other files are there
LOCK = ".lock"  # in a run directory, held by the process that writes there
_VERSION_KEYS = ("generation", "etag", "created", "mtime", "size")
_mirrored: set[Path] = set()


def is_url(path: str | os.PathLike) -> bool:
    """Whether `path` is in a bucket."""
    return isinstance(path, str) and "://" in path


def here(path: str | os.PathLike) -> Path:
    """Return where `path` is on this machine: itself, or, of a URL, its twin; a twin is brought up to date once.

    A checkpoint ("gs://bucket/run/checkpoints/500") is a place in the twin of its run, where nothing is.

    Raises:
      ValueError: the bucket cannot be read, or the package for it is not installed.
    """
    scheme, _, rest = str(path).partition("://")
    twin = TWINS / scheme / rest.strip("/") if is_url(path) else Path(path)
    if _url(twin) is None or (_is_hidden(twin) and not is_url(path)):
        return twin
    place = twin.parent.parent if twin.parent.name in BULK and twin.name.isdigit() else twin
    if _mirrored.isdisjoint((place, *place.parents)):
        with _errors(path):
            _mirror(place)
        _mirrored.add(place)
    return twin


def origin(path: str | os.PathLike) -> "Path | AnyPath":
    """Return what `path` is the twin of, as a path in the bucket; `path` itself, absolute, if it is no twin."""
    url = _url(path := Path(path))
    if url is None:
        return path.resolve()
    from etils import epath

    return epath.Path(url)


def push(path: Path) -> None:
    """Copy what has changed in the twin of a directory, or a file of it, into the bucket; nothing for other paths.

    Hidden files and checkpoints stay where they are. A changed manifest of a dataset goes first and comes last, so
    that what was cut short has none.
    """
    url = _url(path)
    if url is None or _is_hidden(path):
        return
    with _errors(url):
        fs, root = _file_system(url), _root(path)
        index = _read_index(root)
        found = [path] if path.is_file() else [each for each in sorted(path.rglob("*")) if each.is_file()]
        files = {file.relative_to(root).as_posix(): file for file in found if not _is_hidden(file)}
        files = {name: file for name, file in files.items() if not _is_bulk(name)}
        changed = [name for name, file in files.items() if index.get(name, [None])[1:] != _stat(file)]
        is_last = lambda name: name.rpartition("/")[2] == LAST
        gone = [name for name in index if (root / name).is_relative_to(path) and not (root / name).exists()]
        for name in sorted({*gone, *filter(is_last, index.keys() & {*changed})}, key=is_last, reverse=True):
            del index[name]
            _write_index(root, index)
            with suppress(FileNotFoundError):  # another machine was first
                fs.rm_file(_url(root / name))
        for name in sorted(changed, key=is_last):
            now = _stat(files[name])
            fs.put_file(str(files[name]), _url(files[name]))
            fs.invalidate_cache()
            index[name] = [_version(fs.info(_url(files[name]))), *now]
            _write_index(root, index)


def remove(path: "Path | AnyPath") -> None:
    """Remove a directory, on this machine or in a bucket, if there is one."""
    from etils import epath

    epath.Path(path).rmtree(missing_ok=True)


def named(path: Path) -> str:
    """Return what a person calls `path`: where it is in a bucket, if it is a twin."""
    return _url(path) or str(path)


def is_pushed(file: Path) -> bool:
    """Whether the bucket has had all of a file that is in a twin; for other paths, whether there is one."""
    root = _root(file)
    return file.is_file() if _url(file) is None else file.relative_to(root).as_posix() in _read_index(root)


def is_twin(path: Path) -> bool:
    """Whether what is at `path` is in a bucket as well."""
    return _url(path) is not None


def _mirror(place: Path) -> None:
    """Make a twin what the bucket has; a run that a process of this machine writes is newer here and stays."""
    url, root = _url(place), _root(place)
    fs = _file_system(url)
    fs.invalidate_cache()
    root.parent.mkdir(parents=True, exist_ok=True)
    with open(_beside(root, "lock"), "a") as mirroring:
        fcntl.flock(mirroring, fcntl.LOCK_EX)  # until it is closed
        locks = [*place.rglob(LOCK), *(each / LOCK for each in place.parents if each.is_relative_to(root))]
        written = [each.parent for each in locks if _is_held(each)]
        stays = lambda name: any((root / name).is_relative_to(each) for each in written)
        index, found = _read_index(root), {}
        kept = {name: index[name] for name in index if stays(name) or not (root / name).is_relative_to(place)}
        base = fs._strip_protocol(_url(root))
        for remote, info in fs.find(url, detail=True).items():
            name = remote[len(base) :].lstrip("/") or "."
            if not (_is_bulk(name) or stays(name)):
                found[name] = remote, _version(info)
        for name in index.keys() - found.keys() - kept.keys():
            (root / name).unlink(missing_ok=True)
        for name, (remote, version) in found.items():
            file = root / name
            if not (file.is_file() and index.get(name) == [version, *_stat(file)]):
                file.parent.mkdir(parents=True, exist_ok=True)
                temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
                fs.get_file(remote, str(temporary))
                os.replace(temporary, file)
        seen = {name: [version, *_stat(root / name)] for name, (_, version) in found.items()}
        _write_index(root, kept | seen)


def _is_bulk(name: str) -> bool:
    return not set(BULK).isdisjoint(name.split("/")[:-1])


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(TWINS).parts)


def _root(path: Path) -> Path:
    """Return the directory above `path`, or `path`, of which there is an index; else `path`."""
    return next((each for each in (path, *path.parents) if _url(each) and _beside(each, "json").is_file()), path)


def _is_held(lock: Path) -> bool:
    with suppress(FileNotFoundError), open(lock, "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _beside(root: Path, kind: str) -> Path:
    """Return a file of ours beside a twin, so that the twin is empty where the bucket is."""
    return root.with_name(f".{root.name}.bucket.{kind}")


def _url(path: Path) -> str | None:
    with suppress(ValueError):
        scheme, *rest = path.relative_to(TWINS).parts
        return f"{scheme}://{'/'.join(rest)}"
    return None


def _file_system(url: str) -> Any:
    from fsspec.core import url_to_fs

    return url_to_fs(url)[0]


def _version(info: dict[str, Any]) -> str:
    return " ".join(str(info[key]) for key in _VERSION_KEYS if key in info)


def _stat(file: Path) -> list[int]:
    found = file.stat()
    return [found.st_size, found.st_mtime_ns]


def _read_index(root: Path) -> dict[str, list]:
    """Return {name: [version in the bucket, size here, time here]} of what was the same in both places."""
    with suppress(FileNotFoundError):
        return json.loads(_beside(root, "json").read_text(encoding="utf-8"))
    return {}


def _write_index(root: Path, index: dict[str, list]) -> None:
    path = _beside(root, "json")
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(index), encoding="utf-8")
    os.replace(temporary, path)


@contextmanager
def _errors(url: str | os.PathLike) -> Iterator[None]:
    """Say which place in a bucket cannot be used, and why."""
    try:
        yield
    except ImportError as error:
        raise ValueError(f"{url}: {error}; for Google's buckets run: pip install 'jaxllm[gcs]'") from error
    except Exception as error:  # catch-all: every file system has errors of its own
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"{url} cannot be used ({reason}); check its name, and that this machine may read and write the bucket"
        ) from error
