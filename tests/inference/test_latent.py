"""Decoding with latents in the cache, over two stacks of layers: what a full forward without any cache computes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.inference.decode import Decoder, Limits, Request
from jaxllm.inference.sampling import Sampler
from jaxllm.layers.config import Experts, Groups, LatentAttention, Rope, YarnScaling
from jaxllm.models.build import bind, graph, init_params, unstack
from jaxllm.models.config import ComputeConfig, DenseLayers, ModelConfig
from jaxllm.sharding.config import MeshConfig
from jaxllm.sharding.mesh import make_mesh
from jaxllm.training.state import param_shardings

LATENT = LatentAttention(rank=16, query_rank=24, rotated=4, value_dim=10)
CONFIG = ModelConfig(
    vocab_size=61, d_model=32, n_layers=3, n_heads=4, head_dim=12, d_ff=24, max_seq_len=80, mla=LATENT,
    dense=DenseLayers(number=1, d_ff=48), bias="attention",
    positions=Rope(interleaved=True, scaling=YarnScaling(factor=4, original_len=16, score_mscale=1.0)),
    ffn=Experts(number=8, top_k=3, score="sigmoid", biased=True, groups=Groups(number=4, top_k=2), shared=2),
)  # fmt: skip
COMPUTE = ComputeConfig(dtype="float32", layers="unroll")
STRAIGHT = CONFIG.model_copy(update={"mla": LATENT.model_copy(update={"query_rank": None})})
TOKENS = np.random.default_rng(0).integers(3, 61, (2, 20))


@functools.cache
def params(config=CONFIG):
    """Weights with every norm and bias off its start."""
    noise = lambda leaf: leaf + 0.2 * jax.random.normal(jax.random.key(leaf.size), leaf.shape)
    return jax.jit(lambda: jax.tree.map(noise, init_params(config, 3)))()


@functools.cache
def forward(config=CONFIG):
    return jax.jit(lambda params, tokens: bind(graph(config, COMPUTE)[0], params)(tokens))


@pytest.mark.parametrize("config", [CONFIG, STRAIGHT], ids=["query_latent", "straight"])
def test_cached_logits_equal_the_full_forward(config):
    graphdef, values = graph(config, COMPUTE, stacked=False)[0], unstack(params(config))
    model = bind(graphdef, values)
    prefill = jax.jit(lambda values, *rows: bind(graphdef, values).prefill(*rows))
    decode = jax.jit(lambda values, *rows: bind(graphdef, values).decode(*rows))
    positions, cache = np.arange(20)[None].repeat(2, 0), model.empty_cache(2, 32)
    assert {layer.keys.shape for layer in cache} == {(2, 32, LATENT.rank + LATENT.rotated)}
    assert len(jax.tree.leaves(cache)) == 3  # nothing else per token and layer
    first, cache = prefill(values, TOKENS[:, :9], positions[:, :9], cache)
    parts = [first]
    for start, stop in ((9, 12), (12, 13), (13, 14), (14, 17), (17, 20)):  # several tokens at once, too
        hidden, cache = decode(values, TOKENS[:, start:stop], positions[:, start:stop], cache)
        parts.append(hidden)
    expected = forward(config)(params(config), TOKENS)
    np.testing.assert_allclose(model.logits(jnp.concatenate(parts, axis=1)), expected, atol=2e-5)


def greedy(prompt, count):
    tokens = list(prompt)
    for _ in range(count):
        row = np.zeros((1, 80), np.int32)
        row[0, : len(tokens)] = tokens
        tokens.append(int(np.argmax(forward()(params(), row)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("devices", [1, 2])
def test_greedy_text_is_that_of_the_forward_without_cache_on_one_device_and_on_two(devices):
    mesh = make_mesh(MeshConfig(data=1, tensor=devices), jax.devices()[:devices])
    placed = jax.device_put(params(), param_shardings(CONFIG, mesh))
    prompts = [TOKENS[0, :5].tolist(), TOKENS[1, :17].tolist()]
    found = Decoder(CONFIG, placed, COMPUTE).generate([Request(p) for p in prompts], Sampler(temperature=0), Limits(16))
    assert [answer.tokens for answer in found] == [greedy(prompt, 16) for prompt in prompts]


def test_a_cut_decoder_in_bfloat16_keeps_norms_and_biases_of_the_choice_exact():
    half = Decoder(CONFIG, params(), COMPUTE.model_copy(update={"dtype": "bfloat16"})).params
    assert sorted(half["dense_blocks"]) == [0]
    assert sorted(half["blocks"]) == [0, 1]
    assert half["blocks"][0]["attention"]["q_up"]["kernel"].dtype == "bfloat16"
    assert half["blocks"][0]["ffn"]["choice_bias"].dtype == "float32"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ffn": {"kind": "gated"}}, "dense is for the first of n_layers=3 layers with experts"),
        ({"dense": {"number": 3, "d_ff": 8}}, "dense is for the first of n_layers=3"),
        ({"head_dim": 4}, "head_dim=4 must be more than mla.rotated=4"),
        ({"n_kv_heads": 2}, "mla has keys for each head"),
        ({"qk_norm": "head"}, "mla has keys for each head"),
    ],
)
def test_what_does_not_fit_a_latent_or_dense_layers_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate(CONFIG.model_dump() | change)
