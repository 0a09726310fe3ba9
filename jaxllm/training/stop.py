"""Asking a run to end: SIGTERM and Ctrl-C, in one process or in many that must stop after the same step."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# `make` and other launchers pass on a Ctrl-C that the terminal has sent already; a person is not that fast.
ECHO_S = 0.3


class StopRequest:
    """Set by SIGTERM and Ctrl-C; the loop ends after the current step. A second signal leaves at once.

    Signals are read by a thread, because the main thread may be in XLA for minutes, where no Python handler runs.
    Saving is collective, so that several processes stop only when a vote that rides along with a step says so.

    Args:
      mesh: devices of all processes; needed where there are several.
      last_words: returns the line that is said when a second signal leaves at once; it must not wait for other threads.

    Attributes:
      reason: name of the signal, or "".
    """

    def __init__(self, mesh: Mesh | None = None, last_words: Callable[[], str] = lambda: "left without saving"):
        self.reason, self._last_words = "", last_words
        self._mesh = mesh
        self._voted = False
        self._alone = jax.process_count() == 1
        self._any = None if self._alone else jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def __enter__(self) -> "StopRequest":
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)  # a signal handler must not wait
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # A handler in Python, though it does nothing, is what makes CPython write to the pipe.
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._before)
        os.close(self._write)  # the thread reads the end and is done
        self._thread.join()
        os.close(self._read)

    @property
    def agreed(self) -> bool:
        """Whether to stop now; of several processes, the same in all after each `count`."""
        return bool(self.reason) if self._alone else self._voted

    def vote(self) -> jax.Array | None:
        """Dispatch whether any process was asked to stop; to be read by `count` when the step has ended anyway."""
        if self._alone:
            return None
        sharding = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        mine = np.full(len(self._mesh.local_devices), bool(self.reason))
        return self._any(jax.make_array_from_process_local_data(sharding, mine, (self._mesh.size,)))

    def count(self, votes: jax.Array | None) -> None:
        """Read a vote; all processes read the same ones in the same order."""
        if votes is not None and bool(votes):
            self._voted = True
            self.reason = self.reason or "a signal to another process"

    def _watch(self) -> None:
        first_s = 0.0
        while number := os.read(self._read, 1):
            if number[0] not in SIGNALS:  # somebody else's
                continue
            name = signal.Signals(number[0])
            if not self.reason:
                self.reason, first_s = name.name, time.monotonic()
                sys.stderr.write(f"\n{name.name}: saving after this step; again: leave at once without saving\n")
                sys.stderr.flush()
            elif time.monotonic() - first_s > ECHO_S:
                leave(128 + name, self._last_words)


def leave(status: int, last_words: Callable[[], str]) -> None:
    """Exit at once with a last line, straight to the descriptors: the main thread may hold the streams' locks."""
    try:
        if os.isatty(1):
            os.write(1, b"\x1b[?25h")  # a live line hides the cursor
        os.write(2, f"\n{last_words()}\n".encode())
    finally:
        os._exit(status)
