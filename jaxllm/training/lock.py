"""One process at a time in a run directory: two would truncate each other's records and checkpoints."""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jaxllm.core.bucket import LOCK, named

log = logging.getLogger(__name__)


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold `run_dir` for this process until the context ends; the kernel lets go when the process dies.

    Raises:
      ValueError: another process has it; the message names that process.
    """
    with open(run_dir / LOCK, "a+", encoding="utf-8") as file:  # open as long as the lock is held
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise ValueError(
                f"{named(run_dir)} is in use by another process ({holder}); stop that one, or choose another `out`"
            ) from None
        except OSError as error:
            log.warning("%s: this file system has no locks (%s); start no second process here", file.name, error)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
