"""The training loop: dispatch a step, read the metrics of the one before, do what is due.

It knows steps, batches and actions; nothing of text, files formats or the command line.
"""

import collections
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.core.batch import Batch
from jaxllm.training.feed import Feed
from jaxllm.training.state import TrainState
from jaxllm.training.stop import StopRequest

StepFunction = Callable[[TrainState, Batch, int], tuple[TrainState, dict]]  # the int: number of this update from 1


class Diverged(ValueError):
    """Training cannot go on: too many steps in a row were skipped."""


@dataclass(frozen=True)
class Action:
    """Something done every `every` steps and after the last one: evaluate, sample, save.

    Attributes:
      phase: what it is called in heartbeats.
    """

    every: int
    run: Callable[[int, TrainState], None]
    phase: str = "save"

    def due(self, step: int, last: int) -> bool:
        """Whether to run after update `step` of `last`."""
        return step % self.every == 0 or step == last


class Observer(NamedTuple):
    """Where the loop reports to.

    Attributes:
      step: called with (step, metrics as floats or lists of them, seconds, seconds waited for data) once per step, in
        order.
      skipped: called with (step, what this process holds of the batch, see `local_part`, metrics) when an update was
        refused.
      failed: called with (step, state, error) before an error of the data or `Diverged` ends the loop.
      phase: called with (phase, step) before the data is waited for, an update is dispatched, an action runs.
    """

    step: Callable[[int, dict[str, float], float, float], None]
    skipped: Callable[[int, dict[str, np.ndarray], dict[str, float]], None]
    failed: Callable[[int, TrainState, Exception], None]
    phase: Callable[[str, int], None] = lambda phase, step: None


def run_loop(
    state: TrainState, step_function: StepFunction, feed: Feed, steps: int, actions: Sequence[Action],
    observer: Observer, stop: StopRequest,
) -> TrainState:  # fmt: skip
    """Update `state` until it has completed `steps` updates, or all processes agree to stop; return the last state.

    The step t+1 is dispatched before the metrics of step t are read, so that the device never waits for the host; only
    an action that is due (which reads the parameters anyway) waits for its own step. A stop comes before what is due:
    the time until the process is killed belongs to the caller's checkpoint, and `missed` actions are for the next one.

    Raises:
      Diverged, or what the feed raises: after `observer.failed` has got the last state.
    """
    pending: collections.deque[tuple[int, dict, Batch, jax.Array | None]] = collections.deque()
    clock = _Clock(feed)

    def settle(leave: int = 0) -> None:
        while len(pending) > leave:
            *what, votes = pending.popleft()
            stop.count(votes)
            _report(*what, clock, observer)

    def rescue(error: Exception) -> None:
        with suppress(Diverged):
            settle()
        observer.failed(int(state.step), state, error)

    try:
        for step in range(int(state.step) + 1, steps + 1):
            observer.phase("data", step)
            try:
                batch = feed.next()
            except (ValueError, OSError, EOFError) as error:
                rescue(error)
                raise
            observer.phase("step", step)
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                state, metrics = step_function(state, batch, step)
            pending.append((step, metrics, batch, stop.vote()))
            settle(leave=1)
            due = [action for action in actions if action.due(step, steps)]
            if due or stop.agreed:
                settle()
            if stop.agreed:
                break
            for action in due:
                observer.phase(action.phase, step)
                action.run(step, state)
            if due:
                clock.lap()
        settle()
    except Diverged as error:
        rescue(error)
        raise
    return state


class _Clock:
    """Wall seconds per step, and those spent waiting for data, without the time that actions take."""

    def __init__(self, feed: Feed):
        self._feed, self._last = feed, (time.perf_counter(), feed.waited_s)

    def lap(self) -> tuple[float, float]:
        before, self._last = self._last, (time.perf_counter(), self._feed.waited_s)
        return self._last[0] - before[0], self._last[1] - before[1]


def _report(step: int, metrics: dict, batch: Batch, clock: _Clock, observer: Observer) -> None:
    values = {key: value.tolist() for key, value in jax.device_get(metrics).items()}  # waits for this step to end
    observer.step(step, values, *clock.lap())
    if values["skipped"]:
        observer.skipped(step, local_part(batch), values)


def local_part(batch: Batch) -> dict[str, np.ndarray]:
    """Return what this process holds of each field [B, ...], and where it lies in the whole.

    `FIELD.rows` are the numbers of the rows in the batch and `FIELD.columns` the places in them, which processes share
    where mesh.context goes over several. A place that only others hold is 0.
    """
    found: dict[str, np.ndarray] = {}
    for name, field in batch._asdict().items():
        found[name], *places = _local(field)
        found |= {f"{name}.{along}": place for along, place in zip(("rows", "columns"), places, strict=False)}
    return found


def _local(x: jax.Array) -> tuple[np.ndarray, ...]:
    """Return what this process holds of a global array, once, for mesh axes copy and cut it, and its indices."""
    parts = {tuple(cut.start or 0 for cut in shard.index): shard.data for shard in x.addressable_shards}
    starts = [sorted(set(along)) for along in zip(*parts, strict=True)]
    size = next(iter(parts.values())).shape
    rows = np.zeros([len(along) * length for along, length in zip(starts, size, strict=True)], x.dtype)
    for start, part in parts.items():
        first = [along.index(at) * length for along, at, length in zip(starts, start, size, strict=True)]
        rows[tuple(slice(at, at + length) for at, length in zip(first, size, strict=True))] = part
    places = ([at + n for at in along for n in range(length)] for along, length in zip(starts, size, strict=True))
    return rows, *map(np.array, places)
