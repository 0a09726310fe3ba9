import functools
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxllm.core.batch import Batch
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.training.feed import place
from jaxllm.training.optim import AdamW, Muon, optimizer
from jaxllm.training.schedules import Cosine, learning_rate
from jaxllm.training.state import init_state
from jaxllm.training.step import StepConfig, compile_step

MODEL = ModelConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=64, max_seq_len=32)
CPU = ComputeConfig(dtype="float32", layers="scan", loss_chunk=8)
ADAMW = AdamW(lr=1e-2, schedule=Cosine(warmup=2))


def batch(rows=8, length=16, seed=0):
    """Rows with very different numbers of trained tokens, two segments each."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 64, (rows, length + 1)).astype(np.int32)
    weights = (generator.random((rows, length)) < np.linspace(0.05, 0.95, rows)[:, None]).astype(np.float32)
    half = length // 2
    segments = np.tile(np.repeat([1, 2], half), (rows, 1)).astype(np.int32)
    positions = np.tile(np.arange(half), (rows, 2)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:], weights, segments, positions)


def run(mesh=None, devices=1, optim=ADAMW, step=None, batches=None, compute=CPU):
    """Losses, last metrics and parameters of a few updates."""
    mesh = make_mesh(mesh or MeshConfig(), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        step = step or StepConfig()
        state, shardings = init_state(MODEL, optimizer(optim), mesh, seed=0, ema=step.ema_decay is not None)
        update = compile_step(MODEL, compute, optim, step, shardings)
        history = []
        for number, each in enumerate(batches or [batch()] * 4):
            lr = learning_rate(optim.schedule, optim.lr, number, 10)
            state, metrics = update(state, place(each, mesh), lr)
            history.append({key: float(value) for key, value in metrics.items()})
        return history, jax.device_get(state)


PLAIN = functools.cache(lambda optim: run(optim=optim))


MUON = Muon(lr=3e-3)


# AdamW over tensors and microbatches of two rows, over twenty updates: sharding/test_parity.py.
@pytest.mark.parametrize(
    ("mesh", "optim"),
    [
        (MeshConfig(), ADAMW), (MeshConfig(fsdp=4), ADAMW), (MeshConfig(), MUON), (MeshConfig(fsdp=4), MUON),
        (MeshConfig(data=2, fsdp=2, tensor=2), MUON),
    ],
    ids=["data-adamw", "fsdp-adamw", "data-muon", "fsdp-muon", "tensor-muon"],
)  # fmt: skip
def test_sharded_equals_one_device(mesh, optim):
    history, state = run(mesh, 8, optim)
    expected, expected_state = PLAIN(optim)
    np.testing.assert_allclose([m["loss"] for m in history], [m["loss"] for m in expected], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, expected_state.params)


def test_parameters_that_are_computed_again_where_they_are_kept_are_the_same(monkeypatch):
    monkeypatch.setattr("jaxllm.training.step.shards", SimpleNamespace(platform=lambda: "gpu"))  # as on accelerators
    history, state = run()
    expected, expected_state = PLAIN(ADAMW)
    np.testing.assert_allclose([m["grad_norm"] for m in history], [m["grad_norm"] for m in expected], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, expected_state.params)


def test_accumulation_equals_one_batch_though_microbatches_hold_different_numbers_of_tokens():
    history, state = run(step=StepConfig(accumulate=8))
    expected, expected_state = PLAIN(ADAMW)
    np.testing.assert_allclose([m["loss"] for m in history], [m["loss"] for m in expected], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, expected_state.params)


def test_loss_is_the_mean_over_weighted_tokens():
    one = batch()
    history, _ = run(batches=[one])
    assert history[0]["tokens"] == one.weights.sum()
    assert history[0]["loss"] == pytest.approx(np.log(64), abs=0.1)


def test_weight_decay_touches_matrices_only():
    _, decayed = run(optim=AdamW(lr=1e-2, weight_decay=10.0), batches=[batch()])
    _, plain = run(optim=AdamW(lr=1e-2, weight_decay=0.0), batches=[batch()])
    np.testing.assert_array_equal(decayed.params["final_norm"]["scale"], plain.params["final_norm"]["scale"])
    assert np.abs(decayed.params["head"] - plain.params["head"]).max() > 1e-4


def test_a_step_without_usable_gradient_changes_nothing_and_is_reported():
    bad = batch()._replace(weights=np.full((8, 16), np.nan, np.float32))
    history, after_bad = run(batches=[batch(), bad])
    _, before = run(batches=[batch()])
    assert [m["skipped"] for m in history] == [0, 1]
    jax.tree.map(np.testing.assert_array_equal, after_bad.params, before.params)
    jax.tree.map(np.testing.assert_array_equal, after_bad.opt_state, before.opt_state)
    assert after_bad.step == 2


def test_an_update_that_would_overflow_is_skipped():
    history, state = run(optim=AdamW(lr=1e30), batches=[batch()])
    assert history[0]["skipped"] == 1
    assert all(np.isfinite(leaf).all() and np.abs(leaf).max() < 10 for leaf in jax.tree.leaves(state.params))


def test_a_spike_is_skipped():
    loud = batch()._replace(weights=1e4 * batch().weights, targets=np.zeros((8, 16), np.int32))
    quiet = [batch()] * 3
    spike = StepConfig(spike_factor=2.0)
    history, _ = run(batches=[*quiet, loud, *quiet], step=spike)
    assert [m["skipped"] for m in history] == [0, 0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(("decay", "of_the_second"), [(0.9, 2 / 11), (0.15, 0.15)])
def test_moving_average_formula(decay, of_the_second):
    step = StepConfig(ema_decay=decay)  # at most (1 + step) / (10 + step)
    _, first = run(batches=[batch()], step=step)
    _, second = run(batches=[batch()] * 2, step=step)
    d = of_the_second
    jax.tree.map(
        lambda e2, e1, p2: np.testing.assert_allclose(e2, d * e1 + (1 - d) * p2, atol=1e-6),
        second.ema,
        first.ema,
        second.params,
    )


def test_training_learns_a_repeated_batch():
    history, _ = run(batches=[batch()] * 10)
    assert history[-1]["loss"] < history[0]["loss"] - 0.5
