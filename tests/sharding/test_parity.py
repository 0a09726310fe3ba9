"""Twenty updates on any mesh are those of one device: losses, gradient norms, parameters and what routers did."""

import pytest

from jaxllm.layers.config import Experts, SlidingWindow
from jaxllm.models.config import DenseLayers, ModelConfig, Pipeline
from jaxllm.sharding.config import MeshConfig

SHAPE = {"vocab_size": 32, "d_model": 16, "n_layers": 4, "n_heads": 4, "d_ff": 32, "max_seq_len": 8, "init_std": 0.2}
GROUPED = ModelConfig(**SHAPE, n_kv_heads=2, tie_embeddings=True)  # kv_heads < tensor where that is 4
WINDOWS = ModelConfig(**SHAPE, window=SlidingWindow(size=3, layers=(True, False)), bias=True)
SPARSE = ModelConfig(**SHAPE, ffn=Experts(number=4, top_k=2, balance=0.1, router_z=0.01))
DENSE_FIRST = SPARSE.model_copy(update={"n_layers": 5, "dense": DenseLayers(number=1, d_ff=24)})
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
def test_a_mesh_equals_one_device(model, sizes, how, equals_one_device):
    params = equals_one_device(model, MeshConfig(data=-1, **sizes), 16, **how)
    split = params["blocks"]["attention"]["q"]["kernel"].sharding.spec[0]
    assert split == ("stage" if "stage" in sizes else None)
