"""The stages of `prepare` on Apache Beam: the same tasks, and the comparison of digests as a combination by key.

What passes through Beam is small: tasks, and for each document its digest and place. Documents and ids are written to
the work directory, which the workers and the process that starts them must all see. A bundle that Beam does twice, or
in two places at once, does no harm.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field

from jaxllm.core import files
from jaxllm.core.config import Config
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
