"""The training loop: dispatch a step, read the metrics of the one before, do what is due.

It knows steps, batches and actions; nothing of text, files formats or the command line.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax
import numpy as np

from jaxllm.core.batch import Batch
from jaxllm.training.feed import Feed
from jaxllm.training.state import TrainState

StepFunction = Callable[
    [TrainState, Batch, int], tuple[TrainState, dict]
]  # (state, batch, number of this update from 1)


class Diverged(ValueError):
    """Training cannot go on: too many steps in a row were skipped."""


@dataclass(frozen=True)
class Action:
    """Something done every `every` steps and after the last one: evaluate, sample, save."""

    every: int
    run: Callable[[int, TrainState], None]

    def due(self, step: int, last: int) -> bool:
        """Whether to run after update `step` of `last`."""
        return step % self.every == 0 or step == last


class Observer(NamedTuple):
    """Where the loop reports to.

    Attributes:
      step: called with (step, metrics as floats, seconds, seconds waited for data) once per step, in order.
      skipped: called with (step, batch as NumPy, metrics) when an update was refused.
    """

    step: Callable[[int, dict[str, float], float, float], None]
    skipped: Callable[[int, Batch, dict[str, float]], None]


@dataclass
class StopRequest:
    """Set by SIGTERM and Ctrl-C; the loop ends after the current step. A second Ctrl-C leaves at once."""

    reason: str = ""
    _previous: dict = field(default_factory=dict)

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        if self.reason and number == signal.SIGINT:
            os._exit(130)
        self.reason = signal.Signals(number).name
        sys.stderr.write(
            f"\n{self.reason}: saving after this step; press Ctrl-C again to leave at once without saving\n"
        )


def run_loop(
    state: TrainState, step_function: StepFunction, feed: Feed, steps: int, actions: Sequence[Action],
    observer: Observer, stop: StopRequest,
) -> TrainState:  # fmt: skip
    """Update `state` until it has completed `steps` updates, or `stop` is requested; return the last state.

    The step t+1 is dispatched before the metrics of step t are read, so that the device never waits for the host; only
    an action that is due (which reads the parameters anyway) waits for its own step.
    """
    pending: tuple[int, dict, Batch] | None = None
    clock = _Clock(feed)

    def settle() -> None:
        nonlocal pending
        if pending is not None:
            _report(*pending, clock, observer)
            pending = None

    for step in range(int(state.step) + 1, steps + 1):
        batch = feed.next()
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            state, metrics = step_function(state, batch, step)
        settle()
        pending = (step, metrics, batch)
        due = [action for action in actions if action.due(step, steps)]
        if due or stop.reason:
            settle()
            for action in due:
                action.run(step, state)
            clock.restart()
        if stop.reason:
            break
    settle()
    return state


class _Clock:
    """Wall seconds per step, without the time that actions take."""

    def __init__(self, feed: Feed):
        self._feed = feed
        self.restart()

    def restart(self) -> None:
        self._last, self._waited = time.perf_counter(), self._feed.waited_s

    def lap(self) -> tuple[float, float]:
        now, waited = time.perf_counter(), self._feed.waited_s
        result = (now - self._last, waited - self._waited)
        self._last, self._waited = now, waited
        return result


def _report(step: int, metrics: dict, batch: Batch, clock: _Clock, observer: Observer) -> None:
    values = {key: float(value) for key, value in jax.device_get(metrics).items()}  # waits for this step to end
    observer.step(step, values, *clock.lap())
    if values["skipped"]:
        local = jax.tree.map(lambda x: np.concatenate([shard.data for shard in x.addressable_shards]), batch)
        observer.skipped(step, local, values)
