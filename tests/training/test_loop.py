"""The loop with steps that are given: what is reported, refused and rescued."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.batch import Batch
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.training.feed import Feed
from jaxllm.training.loop import Action, Diverged, Observer, run_loop
from jaxllm.training.metrics import read
from jaxllm.training.run_log import MonitorConfig, Position, RunLog
from jaxllm.training.state import TrainState
from jaxllm.training.stop import StopRequest


def batches(count):
    for number in range(count):
        rows = np.arange(16, dtype=np.int32).reshape(8, 2) + 100 * number
        yield Batch(rows, rows, rows.astype(np.float32), rows, rows)


class Loop:
    """Runs the loop on `count` batches, where the steps named `bad` are skipped, and remembers what it reports."""

    def __init__(self, tmp_path, bad=(), actions=(), stop=None, count=9, max_skipped=1):
        self.failed, self.stop = [], stop or StopRequest()
        mesh = make_mesh(MeshConfig(data=2, context=2, tensor=2))  # of each row two halves, and both twice
        config = MonitorConfig(log_every=1, max_skipped=max_skipped)
        state = TrainState(jnp.int32(0), {}, (), None, jnp.float32(0))

        def update(state, batch, step):
            skipped = float(step in bad)
            metrics = {"loss": jnp.float32(step), "grad_norm": jnp.float32(1), "skipped": jnp.float32(skipped)}
            return state._replace(step=state.step + 1), metrics

        with (
            Feed(batches(count), mesh) as feed,
            RunLog(
                tmp_path, "test", config, 6, begin=Position(0, 0, 8), tokens_per_step=16, flops=(1.0, 1e12)
            ) as self.log,
        ):
            observer = Observer(self.log.step, self.log.skipped, lambda step, *_: self.failed.append(step))
            self.state = run_loop(state, update, feed, 6, [Action(2, each) for each in actions], observer, self.stop)


def records(path):
    return [(record["step"], record["sample"]) for record in read(path / "metrics.jsonl")]


def test_each_step_is_recorded_with_its_first_sample(tmp_path):
    loop = Loop(tmp_path)
    assert int(loop.state.step) == 6
    assert records(tmp_path) == [(step, 8 * (step - 1)) for step in range(1, 7)]
    assert all(record["mfu"] > 0 for record in read(tmp_path / "timing.jsonl"))


def test_too_many_skipped_steps_end_the_run_with_state_records_and_batch_kept(tmp_path):
    loop = object.__new__(Loop)
    with pytest.raises(Diverged, match=r"2 steps in a row were refused.*\(step 3: loss=3.*Lower optim.lr"):
        loop.__init__(tmp_path, bad=(2, 3))
    assert loop.failed == [4]  # step 4 was under way
    assert [step for step, _ in records(tmp_path)] == [1, 2, 3, 4]
    with np.load(tmp_path / "skipped" / "step-3-process-0.npz") as dumped:
        np.testing.assert_array_equal(dumped["tokens"], np.arange(16).reshape(8, 2) + 200)  # every row once, in order
        assert dumped["tokens.rows"].tolist() == list(range(8))
        assert dumped["tokens.columns"].tolist() == [0, 1]


def test_a_skipped_step_between_good_ones_is_no_reason_to_stop(tmp_path):
    assert int(Loop(tmp_path, bad=(2, 4)).state.step) == 6


def test_data_that_ends_loses_nothing(tmp_path):
    loop = object.__new__(Loop)
    with pytest.raises(EOFError, match="the data has ended"):
        loop.__init__(tmp_path, count=3)
    assert loop.failed == [3]
    assert [step for step, _ in records(tmp_path)] == [1, 2, 3]


def test_a_stop_comes_before_what_is_due(tmp_path):
    ran, stop = [], StopRequest()

    def action(step, state):
        ran.append(step)
        stop.reason = "SIGTERM"

    loop = Loop(tmp_path, actions=[action], stop=stop)
    assert (ran, int(loop.state.step)) == ([2], 3)
    assert jax.process_count() == 1 and loop.stop.agreed
