"""The stages of `prepare` on Apache Beam: the same tasks, and the comparison of digests and of signatures by key.

What passes through Beam is small: tasks, and for each document its digest and place. Documents and ids are written to
the work directory, which the workers and the process that starts them must all see. A bundle that Beam does twice, or
in two places at once, does no harm.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from jaxllm.core import files
from jaxllm.core.config import Config
from jaxllm.data.cleaning.dedup import DedupConfig, band_keys, group_pairs, join
from jaxllm.data.engine import Task
from jaxllm.data.shard_writer import save_array

LOCAL = "--runner=FnApiRunner"  # Beam's own default would download a program


class BeamEngine(Config):
    """Apache Beam: a cluster, or for a trial this process."""

    kind: Literal["beam"] = "beam"
    options: tuple[str, ...] = Field(
        (), description="flags of Beam, such as --runner=FlinkRunner; none: in this process"
    )


def run(tasks: Sequence[Task], options: Sequence[str]) -> None:
    """Do the tasks of which there is no result yet.

    Raises:
      ValueError: Beam is not installed; or the first task in order that cannot be done says why.
    """
    tasks = [task for task in tasks if not task.out.exists()]
    if not tasks:
        return
    for task in tasks:
        _error(task.out).unlink(missing_ok=True)
    beam, pipeline = _pipeline(options)
    with pipeline:
        _ = pipeline | beam.Create(tasks) | beam.Reshuffle() | beam.Map(_do)
    for task in tasks:
        if _error(task.out).exists():
            raise ValueError(_error(task.out).read_text(encoding="utf-8"))


def keep_first(texts: Sequence[Path], out: Path, options: Sequence[str]) -> None:
    """Write for each part NAME.npy into `out`: bool, whether a document is the first of its digest in their order."""
    beam, pipeline = _pipeline(options)
    with pipeline:
        parts = pipeline | beam.Create([(number, str(path)) for number, path in enumerate(texts)])
        first = parts | beam.Reshuffle() | beam.FlatMap(_digests) | beam.CombinePerKey(min)
        places = first | beam.Values()
        _ = {"path": parts, "kept": places} | beam.CoGroupByKey() | beam.Map(_write, str(out))


def near_duplicates(
    signed: Sequence[Path], stays: np.ndarray, config: DedupConfig, text: Callable[[int], str],
    options: Sequence[str], scratch: Path,
) -> np.ndarray:  # fmt: skip
    """Return for each document of `stays` the first of its cluster, as `dedup.near_duplicates` finds it.

    Args:
      signed: where the signatures of each part are. stays: int64, numbers of documents over all parts, ascending.
      text: of a document by its number.
      scratch: directory for what the workers read and write.
    """
    beam, pipeline = _pipeline(options)
    starts = np.cumsum([0, *(len(np.load(path / "signatures.npy", mmap_mode="r")) for path in signed)])
    save_array(scratch / "stays.npy", stays)
    rows = _Signatures(tuple(signed), tuple(starts.tolist()), scratch / "stays.npy", config, text)
    with pipeline:
        groups = (
            pipeline
            | beam.Create(range(len(signed)))
            | beam.Reshuffle()
            | beam.FlatMap(rows.bands)
            | beam.GroupByKey()
            | beam.Values()
            | beam.Map(sorted)
            | beam.Filter(lambda numbers: len(numbers) > 1)
        )
        _ = groups | beam.FlatMap(rows.pairs) | beam.combiners.ToList() | beam.Map(_save, str(scratch / "pairs.npy"))
    return join(np.arange(starts[-1]), np.load(scratch / "pairs.npy"))[stays]


@dataclass(frozen=True)
class _Signatures:
    """The signatures of all parts, as files: `starts` are the numbers of the first document of each part."""

    paths: tuple[Path, ...]
    starts: tuple[int, ...]
    stays: Path
    config: DedupConfig
    text: Callable[[int], str]

    def bands(self, part: int) -> Iterator[tuple[tuple[int, int], int]]:
        """((band, key), document) of every document of a part that stays."""
        stays, (first, stop) = np.load(self.stays, mmap_mode="r"), self.starts[part : part + 2]
        numbers = stays[np.searchsorted(stays, first) : np.searchsorted(stays, stop)]
        for number, keys in zip(
            numbers.tolist(), band_keys(self._rows(numbers), self.config).view(np.int64).tolist(), strict=True
        ):
            yield from (((band, key), number) for band, key in enumerate(keys))

    def pairs(self, numbers: Sequence[int]) -> list[list[int]]:
        """The pairs of near duplicates among documents that share a band."""
        numbers = np.array(numbers, np.int64)
        return group_pairs(numbers, self._rows(numbers), self.config, self.text).tolist()

    def _rows(self, numbers: np.ndarray) -> np.ndarray:
        parts = np.searchsorted(self.starts, numbers, side="right") - 1
        found = [np.zeros((0, self.config.permutations), np.uint32)]
        for part in np.unique(parts).tolist():
            rows = np.load(self.paths[part] / "signatures.npy", mmap_mode="r")
            found.append(rows[numbers[parts == part] - self.starts[part]])
        return np.concatenate(found)


def _save(pairs: list[list[int]], path: str) -> None:
    save_array(Path(path), np.array(pairs, np.int64).reshape(-1, 2))


def _pipeline(options: Sequence[str]) -> tuple:
    """(Beam, a new pipeline)"""
    try:
        import apache_beam
        from apache_beam.options.pipeline_options import PipelineOptions
    except ImportError as error:
        raise ValueError("engine.kind=beam needs Apache Beam: pip install 'jaxllm[beam]'") from error
    runner = [] if any(each.startswith("--runner") for each in options) else [LOCAL]
    return apache_beam, apache_beam.Pipeline(options=PipelineOptions([*runner, *options]))


def _do(task) -> None:
    """Do a task; what is wrong with the data is written down, since to try again would not help.

    Its type, a protocol, is not said: Beam would check it, and cannot.
    """
    if not task.out.exists():
        try:
            task(lambda *_: None)
        except ValueError as error:
            files.write_text(_error(task.out), str(error))


def _error(out: Path) -> Path:
    return out.with_name(f"error-{out.name}")


def _digests(part: tuple[int, str]) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """(digest, (part, document)) of every document."""
    number, path = part
    for document, digest in enumerate(np.load(Path(path) / "digests.npy", mmap_mode="r")):
        yield digest.tobytes(), (number, document)


def _write(grouped: tuple[int, dict[str, Iterable]], out: str) -> None:
    [path] = grouped[1]["path"]
    keep = np.zeros(len(np.load(Path(path) / "digests.npy", mmap_mode="r")), bool)
    keep[np.fromiter(grouped[1]["kept"], np.int64)] = True
    save_array(Path(out) / f"{Path(path).name}.npy", keep)
