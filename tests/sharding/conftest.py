"""Twenty updates on a mesh, and the rows that they learn from: what one device does must be what all of them do."""

import functools

import jax
import numpy as np
import pytest

from jaxllm.core.batch import Batch
from jaxllm.core.tree import named_leaves
from jaxllm.models.config import ComputeConfig
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.training.config import AdamW, StepConfig
from jaxllm.training.feed import place
from jaxllm.training.optim import optimizer
from jaxllm.training.state import init_state
from jaxllm.training.step import compile_step

STEPS = 20
ADAMW = AdamW(lr=3e-3, eps=1e-3)  # a large eps: where a gradient is zero, its sign is a matter of rounding


def rows(seed, count, length):
    """Rows of two documents each and of padding, with very different numbers of trained tokens."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 32, (count, length + 1)).astype(np.int32)
    cut, end = generator.integers(1, length // 2, (count, 1)), length - generator.integers(0, length // 3, (count, 1))
    at = np.arange(length)[None]
    segments = np.where(at < cut, 1, np.where(at < end, 2, 0)).astype(np.int32)
    positions = np.where(segments == 2, at - cut, at * (segments == 1)).astype(np.int32)
    chosen = generator.random((count, length)) < np.linspace(0.1, 0.9, count)[:, None]
    return Batch(tokens[:, :-1], tokens[:, 1:], (chosen & (segments > 0)).astype(np.float32), segments, positions)


@functools.cache
def run(model, mesh, count, accumulate=1, chunk=4, **how):
    """Return (metrics of each update, parameters)."""
    mesh = make_mesh(mesh, jax.devices()[: 1 if mesh == MeshConfig() else 8])
    compute = ComputeConfig(dtype="float32", layers="scan", loss_chunk=chunk, **how)
    with jax.set_mesh(mesh):
        state, shardings = init_state(model, optimizer(ADAMW), mesh, seed=0)
        batches = [place(rows(seed, count, model.max_seq_len), mesh) for seed in (0, 1)]
        update, history = compile_step(model, compute, ADAMW, StepConfig(accumulate=accumulate), shardings), []
        for number in range(STEPS):
            state, metrics = update(state, batches[number % 2], ADAMW.lr)
            history.append({key: float(value) for key, value in metrics.items()})
    return history, state.params


@pytest.fixture(scope="session")
def equals_one_device():
    """Return what runs a model on a mesh, compares that with one device, and returns its parameters."""

    def check(model, mesh, count, **how):
        history, params = run(model, mesh, count, **how)
        expected, wanted = run(model, MeshConfig(), count)
        assert expected[-1]["loss"] < expected[1]["loss"] - 0.1
        for found, one in zip(history, expected, strict=True):
            assert found == pytest.approx(one, rel=1e-4)
        for name, leaf in named_leaves(params).items():
            np.testing.assert_allclose(leaf, named_leaves(wanted)[name], atol=1e-4, err_msg=name)
        return params

    return check
