import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.batch import Batch
from jaxllm.models.build import init_params
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.sharding import shards
from jaxllm.sharding.config import MeshConfig
from jaxllm.sharding.mesh import make_mesh
from jaxllm.training.config import StepConfig
from jaxllm.training.step import gradient_sums

MODEL = ModelConfig(vocab_size=32, d_model=16, n_layers=2, n_heads=2, d_ff=24, max_seq_len=16)
COMPUTE = ComputeConfig(dtype="float32", layers="scan", remat="dots", kernel="xla")


@pytest.mark.parametrize("mesh", [{}, {"data": 2, "fsdp": 2, "tensor": 2}, {"stage": 2, "data": 2, "tensor": 2}])
def test_what_the_compiler_is_told_changes_no_value(mesh, monkeypatch):
    tokens = jax.random.randint(jax.random.key(1), (16, 16), 0, 32)
    ones = jnp.ones((16, 16), jnp.int32)
    batch = Batch(tokens, tokens, ones.astype(jnp.float32), ones, jnp.broadcast_to(jnp.arange(16), (16, 16)))
    params = init_params(MODEL, 0)
    found = make_mesh(MeshConfig(**{"data": 1, **mesh}), jax.devices()[: 8 if mesh else 1])

    def run(platform):
        monkeypatch.setattr(shards, "platform", lambda: platform)
        sums = functools.partial(gradient_sums, model=MODEL, compute=COMPUTE, step=StepConfig())
        with jax.set_mesh(found):
            lowered = jax.jit(sums).lower(params, batch)
            return lowered.compile()(params, batch), lowered.as_text()

    (plain, text), (told, told_text) = run("cpu"), run("tpu")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), plain, told)
    for word in ("optimization_barrier", "LayoutConstraint"):
        assert word in told_text and word not in text
