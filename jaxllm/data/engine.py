"""How the tasks of `prepare` are done: where their results are kept until the end, and by which processes.

Results are kept in a hidden directory beside the dataset, under names that say what they were made of. A run that finds
them goes on from there, whatever ended the one before.

A worker is this module as a program of its own: it reads tasks from its standard input and ends with the process that
started it. So a script needs no `if __name__ == "__main__"`, nothing is forked, and no worker is left behind.
"""

import errno
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, Literal, Protocol, Self

from pydantic import Field

from jaxllm.core.config import Config

SAY_S = 0.1  # seconds between two words of a worker about how far it is
Tick = Callable[[int, int], None]  # called with the documents and bytes that are done since the last call


class Task(Protocol):
    """Leaves the directory `out`, whole or not at all; the same bytes whoever does it."""

    out: Path

    def __call__(self, tick: Tick) -> None: ...


class LocalEngine(Config):
    """Processes of this machine."""

    kind: Literal["local"] = "local"
    workers: int | None = Field(None, ge=1, description="processes; none: one for each core. The data are the same")


class Work:
    """Context manager that holds `.OUT.work`, where what is done is kept until the dataset is complete.

    Args:
      say: told in words what is found there or left there.
    Raises:
      FileExistsError: another process is at work on the same dataset.
    """

    def __init__(self, out: Path, say: Callable[[str], None]):
        self.path, self._out, self._say = out.with_name(f".{out.name}.work"), out, say

    def __enter__(self) -> Self:
        import fcntl

        lock = self.path / "lock"
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(lock, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if lock.exists() and os.path.samestat(os.fstat(self._lock), lock.stat()):
                    break  # else who held it has removed it
            except BlockingIOError as error:
                holder = os.read(self._lock, 99).decode() or "another process"
                raise FileExistsError(
                    f"{self._out} is being prepared by {holder}; wait for it, or choose another directory"
                ) from error
            os.close(self._lock)
        self._sweep()
        os.truncate(self._lock, 0)
        os.write(self._lock, f"process {os.getpid()} of {os.uname().nodename}".encode())
        return self

    def __exit__(self, exception_type: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        self._sweep()
        kept = exception_type is not None and any(path.is_dir() for path in self.path.iterdir())
        if not kept:
            _remove(self.path)
        os.close(self._lock)
        if kept:
            self._say(f"what is done is kept in {self.path}: the same command goes on from there")
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            place = error.filename or self.path
            raise OSError(errno.ENOSPC, f"the disk is full ({place}); free some space and run the same command again")

    def _sweep(self) -> None:
        """Remove what is half done."""
        for path in (self.path.with_name(f"{self.path.name}.tmp"), *self.path.glob(".*.tmp")):
            shutil.rmtree(path, ignore_errors=True)

    def clear(self) -> None:
        """Drop all results."""
        for path in self.path.glob("*/"):
            _remove(path)

    def keep(self, stage: str, names: Sequence[str]) -> list[Path]:
        """Return the paths of the results of a stage, after what another config left of it is dropped."""
        paths = [self.path / f"{stage}-{name}" for name in names]
        for path in {*self.path.glob(f"{stage}-*")} - {*paths}:
            _remove(path)
        return paths


def _remove(path: Path) -> None:
    """Remove a directory; one that a kill leaves half removed has a name that only `Work._sweep` looks for."""
    hidden = path.rename(path.with_name(f".{path.name.removeprefix('.')}.tmp"))
    shutil.rmtree(hidden, ignore_errors=True)


def run(tasks: Sequence[Task], workers: int | None, tick: Tick) -> None:
    """Do the tasks of which there is no result yet; `workers` at a time, or one for each core.

    Raises:
      ValueError, OSError: the first task in order that cannot be done says why; those that follow may be done or not.
    """
    tasks = [task for task in tasks if not task.out.exists()]
    count = min(workers or os.cpu_count(), len(tasks))
    if count < 2:
        for task in tasks:
            task(tick)
        return
    with _Workers(count, tick) as pool:
        for _ in pool.map(tasks):
            pass


class _Workers:
    """Context manager: processes that do tasks, one thread of ours for each to talk to it."""

    def __init__(self, count: int, tick: Tick):
        self._tick, self._lock, self._own = tick, threading.Lock(), threading.local()
        self._processes: list[subprocess.Popen] = []
        self._threads = ThreadPoolExecutor(count, initializer=self._start)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
        self._threads.shutdown()
        for process in self._processes:
            process.communicate()

    def map(self, tasks: Sequence[Task]) -> Iterator[None]:
        return self._threads.map(self._do, tasks)

    def _start(self) -> None:
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        environment = os.environ | {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}
        self._own.process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment
        )
        self._processes.append(self._own.process)

    def _do(self, task: Task) -> None:
        process = self._own.process
        try:
            pickle.dump(task, process.stdin)
            process.stdin.flush()
            while isinstance(answer := pickle.load(process.stdout), tuple):
                with self._lock:
                    self._tick(*answer)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
            raise OSError(
                f"a worker process ended with status {process.wait()} at {task.out.name}; if the memory is full, use "
                "fewer: --workers"
            ) from error
        if answer is not None:
            raise answer


class _Answers:
    """What a worker tells: how far it is, now and then, and None or an error in the end."""

    def __init__(self, file: BinaryIO):
        self._file, self._due, self._done = file, 0.0, (0, 0)

    def tick(self, documents: int, size_bytes: int) -> None:
        self._done = (self._done[0] + documents, self._done[1] + size_bytes)
        if time.monotonic() > self._due:
            self._flush()

    def end(self, future: Future) -> None:
        error = future.exception()
        if error is not None and not isinstance(error, ValueError | OSError):  # a bug of ours, with its place
            error = RuntimeError("".join(traceback.format_exception(error)))
        self._flush()
        self._send(error)

    def _flush(self) -> None:
        self._send(self._done)
        self._due, self._done = time.monotonic() + SAY_S, (0, 0)

    def _send(self, value: object) -> None:
        with suppress(BrokenPipeError):  # who asked is gone, and `serve` ends
            pickle.dump(value, self._file)
            self._file.flush()


def serve() -> None:
    """Be a worker: do tasks one after the other until the standard input ends, and then end at once."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started us
    answers = _Answers(os.fdopen(os.dup(1), "wb"))
    os.dup2(2, 1)  # what a library prints is no answer
    with ThreadPoolExecutor(1) as thread:
        while True:
            try:
                task = pickle.load(sys.stdin.buffer)
            except EOFError:
                os._exit(0)
            thread.submit(task, answers.tick).add_done_callback(answers.end)


if __name__ == "__main__":
    serve()
