"""Twenty updates on any mesh are those of one device: losses, gradient norms, parameters and what routers did."""

import functools

import jax
import numpy as np
import pytest

from jaxllm.core.batch import Batch
from jaxllm.core.tree import named_leaves
from jaxllm.layers.config import Experts, SlidingWindow
from jaxllm.models.config import ComputeConfig, DenseLayers, ModelConfig, Pipeline
from jaxllm.sharding.config import MeshConfig
from jaxllm.sharding.mesh import make_mesh
from jaxllm.training.config import AdamW, StepConfig
from jaxllm.training.feed import place
from jaxllm.training.optim import optimizer
from jaxllm.training.state import init_state
from jaxllm.training.step import compile_step

ROWS, LENGTH, STEPS = 16, 8, 20
SHAPE = {"vocab_size": 32, "d_model": 16, "n_layers": 4, "n_heads": 4, "d_ff": 32, "max_seq_len": LENGTH}
GROUPED = ModelConfig(**SHAPE, n_kv_heads=2, tie_embeddings=True, init_std=0.2)  # kv_heads < tensor where that is 4
WINDOWS = ModelConfig(**SHAPE, window=SlidingWindow(size=3, layers=(True, False)), bias=True, init_std=0.2)
SPARSE = ModelConfig(**SHAPE, ffn=Experts(number=4, top_k=2, balance=0.1, router_z=0.01), init_std=0.2)
DENSE_FIRST = SPARSE.model_copy(update={"n_layers": 5, "dense": DenseLayers(number=1, d_ff=24)})
ADAMW = AdamW(lr=3e-3, eps=1e-3)  # a large eps: where a gradient is zero, its sign is a matter of rounding


def rows(seed):
    """Rows of two documents each and of padding, with very different numbers of trained tokens."""
    generator = np.random.default_rng(seed)
    tokens = generator.integers(0, 32, (ROWS, LENGTH + 1)).astype(np.int32)
    cut, end = generator.integers(1, 4, (ROWS, 1)), LENGTH - generator.integers(0, 3, (ROWS, 1))
    place = np.arange(LENGTH)[None]
    segments = np.where(place < cut, 1, np.where(place < end, 2, 0)).astype(np.int32)
    positions = np.where(segments == 2, place - cut, place * (segments == 1)).astype(np.int32)
    chosen = generator.random((ROWS, LENGTH)) < np.linspace(0.1, 0.9, ROWS)[:, None]
    return Batch(tokens[:, :-1], tokens[:, 1:], (chosen & (segments > 0)).astype(np.float32), segments, positions)


@functools.cache
def run(model, sizes=(), accumulate=1, **how):
    """Return (metrics of each update, parameters, what the layers of a kernel are split over)."""
    mesh = make_mesh(MeshConfig(data=-1, **dict(sizes)), jax.devices()[: 8 if sizes else 1])
    compute, step = (
        ComputeConfig(dtype="float32", layers="scan", loss_chunk=4, **how),
        StepConfig(accumulate=accumulate),
    )
    with jax.set_mesh(mesh):
        state, shardings = init_state(model, optimizer(ADAMW), mesh, seed=0)
        update = compile_step(model, compute, ADAMW, step, shardings)
        history = []
        for number in range(STEPS):
            batch = jax.tree.map(lambda x: place(x, mesh), rows(number % 2))
            state, metrics = update(state, batch, ADAMW.lr)
            history.append({key: float(value) for key, value in metrics.items()})
        return (
            history,
            jax.device_get(state.params),
            state.params["blocks"]["attention"]["q"]["kernel"].sharding.spec[0],
        )


CASES = {
    "tensor": (GROUPED, {"fsdp": 2, "tensor": 2}, {"accumulate": 2, "remat": "full"}),
    "more-tensor-than-kv": (GROUPED, {"tensor": 4}, {"remat": "dots"}),
    "windows": (WINDOWS, {"fsdp": 2, "tensor": 4}, {}),
    "expert-tensor": (SPARSE, {"expert": 2, "tensor": 2}, {"remat": "dots"}),
    "stage-tensor": (GROUPED, {"stage": 2, "fsdp": 2, "tensor": 2}, {"remat": "full", "pipeline": Pipeline()}),
    "stage-windows": (WINDOWS, {"stage": 4}, {"accumulate": 2, "pipeline": Pipeline(microbatches=4)}),
    "rounds": (WINDOWS, {"stage": 2, "tensor": 2}, {"remat": "dots", "pipeline": Pipeline(microbatches=4, rounds=2)}),
    "context-tensor": (GROUPED, {"context": 2, "tensor": 2}, {}),
    "stage-context": (SPARSE, {"stage": 2, "context": 2, "tensor": 2}, {"pipeline": Pipeline(microbatches=2)}),
    "stage-dense": (DENSE_FIRST, {"stage": 2}, {"pipeline": Pipeline(microbatches=2), "remat": "full"}),
}


@pytest.mark.parametrize(("model", "sizes", "how"), CASES.values(), ids=CASES)
def test_a_mesh_equals_one_device(model, sizes, how):
    history, params, split = run(model, tuple(sizes.items()), **how)
    expected, wanted, _ = run(model)
    assert split == ("stage" if "stage" in sizes else None)
    assert expected[-1]["loss"] < expected[1]["loss"] - 0.1
    for found, one in zip(history, expected, strict=True):
        assert found == pytest.approx(one, rel=1e-4)
    for name, leaf in named_leaves(params).items():
        np.testing.assert_allclose(leaf, named_leaves(wanted)[name], atol=1e-4, err_msg=name)
