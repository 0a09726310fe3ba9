"""Rows that devices share: twenty updates equal those of one device, and a row of a million tokens compiles."""

import math
import re

import jax
import pytest

from jaxllm.core.batch import Batch
from jaxllm.layers.config import Learned, SlidingWindow
from jaxllm.models.build import abstract_params
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.training.objectives import loss_sums

SHAPE = {"vocab_size": 32, "d_model": 16, "n_layers": 2, "n_heads": 4, "d_ff": 32, "max_seq_len": 16, "init_std": 0.2}
MIXED = ModelConfig(
    **SHAPE, n_kv_heads=2, window=SlidingWindow(size=5, layers=(True, False)), score_softcap=5.0, sinks=True
)
LEARNED = ModelConfig(**SHAPE, positions=Learned(), bias=True, tie_embeddings=True)
CASES = {
    "windows": (MIXED, MeshConfig(data=2, context=2, tensor=2), {"remat": "full"}),
    "fsdp": (LEARNED, MeshConfig(fsdp=2, context=4, data=1), {"remat": "dots", "accumulate": 2}),
}


@pytest.mark.parametrize(("model", "mesh", "how"), CASES.values(), ids=CASES)
def test_twenty_updates_are_those_of_one_device(model, mesh, how, equals_one_device):
    equals_one_device(model, mesh, 4, chunk=3, **how)


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=1, context=4, tensor=2)], ids=["one", "shared"])
def test_nothing_of_a_row_of_a_million_tokens_grows_with_its_square(mesh):
    length = 2**20
    model = ModelConfig(**SHAPE | {"max_seq_len": length})
    compute = ComputeConfig(dtype="float32", layers="scan", remat="full", loss_chunk=1024)
    with jax.set_mesh(make_mesh(mesh, jax.devices()[: 8 if mesh.context > 1 else 1])):
        of_type = lambda dtype: jax.ShapeDtypeStruct((1, length), dtype)
        batch = Batch(*(of_type(dtype) for dtype in ("int32", "int32", "float32", "int32", "int32")))
        gradient = jax.grad(lambda params, batch: loss_sums(params, batch, model, compute)[0])
        program = str(jax.make_jaxpr(gradient)(abstract_params(model), batch))
    shapes = {tuple(map(int, found.split(","))) for found in re.findall(r"\[([\d,]+)\]", program)}
    assert max(math.prod(shape) for shape in shapes) <= 2 * length * SHAPE["d_ff"]
