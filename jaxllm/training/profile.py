"""A profiler trace of some updates of a run, for TensorBoard or xprof: RUN/profile.

Parts of an update have names there (jax.named_scope): embedding, attention, ffn, moe, loss, optimizer; the backward
pass of each is transpose(jvp(NAME)).
"""

from pathlib import Path

import jax


class Profile:
    """Traces the updates `first` to `last`; on the first process alone, for all do the same.

    Args:
      span: (first, last), or None: no trace.
    """

    def __init__(self, run_dir: Path, span: tuple[int, int] | None):
        self._directory = str(run_dir / "profile")
        self._first, self._last = span if span is not None and jax.process_index() == 0 else (0, 0)
        self._running = False

    def before(self, step: int, state: object) -> None:
        """Begin the trace, if `step` is in it and it has not begun; `state` is what that update reads."""
        if self._first <= step <= self._last and not self._running:  # a resumed run may begin in the midst of it
            jax.block_until_ready(state)
            jax.profiler.start_trace(self._directory)
            self._running = True

    def after(self, step: int, state: object) -> None:
        """End the trace when update `step`, if it is the last that is in it, has made `state`."""
        if self._running and step == self._last:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """End a trace that a stop has cut short."""
        if self._running:
            jax.profiler.stop_trace()
            self._running = False
