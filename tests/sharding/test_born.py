"""A state is made in its place: no device ever has more of a parameter, or of a moment, than what it keeps."""

import math
import re

import jax
import pytest

from jaxllm.layers.config import Experts
from jaxllm.models.config import ModelConfig
from jaxllm.sharding.config import MeshConfig
from jaxllm.sharding.mesh import make_mesh
from jaxllm.training.config import AdamW, Muon
from jaxllm.training.optim import optimizer
from jaxllm.training.state import init_state

MODEL = ModelConfig(vocab_size=512, d_model=64, n_layers=4, n_heads=8, n_kv_heads=4, d_ff=192, max_seq_len=512)
SPARSE = MODEL.model_copy(update={"ffn": Experts(number=8, top_k=2)})


@pytest.mark.parametrize(
    ("model", "sizes", "optim", "parts"),
    [
        (MODEL, {"fsdp": 8}, AdamW(), 8),
        (MODEL, {"stage": 2, "fsdp": 2, "tensor": 2}, Muon(), 6),
        (SPARSE, {"data": 2, "stage": 2, "expert": 2}, AdamW(), 4),
    ],
    ids=["fsdp", "stage", "expert"],
)
def test_the_program_that_makes_a_state_has_no_array_larger_than_a_part(model, sizes, optim, parts):
    mesh = make_mesh(MeshConfig(**{"data": 1, **sizes}))
    with jax.set_mesh(mesh), jax.transfer_guard("disallow"):
        make = lambda: init_state(model, optimizer(optim), mesh, seed=0, ema=True)
        program = jax.jit(lambda: make()[0]).lower().compile().as_text()
        state, shardings = make()
    leaves, places = jax.tree.leaves(state), jax.tree.leaves(shardings)
    largest = max(math.prod(place.shard_shape(leaf.shape)) for leaf, place in zip(leaves, places, strict=True))
    assert largest * parts <= max(leaf.size for leaf in leaves)
    assert max(math.prod(map(int, shape.split(","))) for shape in re.findall(r"\w\[([0-9,]+)\]", program)) == largest
    assert all(leaf.sharding == place for leaf, place in zip(leaves, places, strict=True))
