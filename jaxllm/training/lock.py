"""One process at a time in a run directory: two would truncate each other's records and checkpoints."""

import fcntl
import logging
import os
import socket
from pathlib import Path

log = logging.getLogger(__name__)
FILE_NAME = ".lock"


class RunLock:
    """Holds `run_dir` for this process until the context ends; the kernel lets go when the process dies.

    Raises:
      ValueError: another process has it; the message names that process.
    """

    def __init__(self, run_dir: Path):
        self._path = Path(run_dir) / FILE_NAME

    def __enter__(self) -> "RunLock":
        self._file = open(self._path, "a+", encoding="utf-8")  # open as long as the lock is held
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise ValueError(
                f"{self._path.parent} is in use by another process ({holder}); stop that one, or choose another `out`"
            ) from None
        except OSError as error:
            log.warning("%s: this file system has no locks (%s); start no second process here", self._path, error)
        self._file.truncate(0)
        self._file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
