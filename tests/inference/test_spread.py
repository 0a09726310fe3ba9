import jax
import numpy as np
import pytest

from jaxllm.inference.decode import Decoder, Limits, Request, tensor_mesh
from jaxllm.inference.sampling import Sampler
from jaxllm.models import presets
from jaxllm.models.build import init_params
from jaxllm.models.config import ComputeConfig
from jaxllm.sharding.config import MeshConfig
from jaxllm.sharding.mesh import make_mesh
from jaxllm.training.state import param_shardings


def test_small_models_stay_on_one_device_and_large_ones_are_cut():
    assert tensor_mesh(presets.get("quickstart")) is None
    assert tensor_mesh(presets.get("llama-15m")).shape["tensor"] == jax.device_count()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_parts_on_two_devices_write_what_one_device_writes(temperature):
    model = presets.get("tiny")
    compute = ComputeConfig().resolve("cpu", model.n_layers)
    params = jax.jit(lambda: init_params(model, 0))()
    mesh = make_mesh(MeshConfig(data=1, tensor=2), jax.devices()[:2])
    split = jax.device_put(params, param_shardings(model, mesh))
    requests, sampler = [Request([5, 6, 7])], Sampler(temperature=temperature, seed=1)
    whole, parts = (Decoder(model, p, compute).generate(requests, sampler, Limits(12))[0] for p in (params, split))
    assert parts.tokens == whole.tokens
    np.testing.assert_allclose(parts.logprobs, whole.logprobs, atol=1e-4)
