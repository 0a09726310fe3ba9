import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.tree import map_named
from jaxllm.layers.config import Experts, Gated, Learned, SlidingWindow
from jaxllm.models.build import abstract_params, bind, graph, unstack
from jaxllm.models.config import ComputeConfig, Latent, ModelConfig

CPU = ComputeConfig(dtype="float32", layers="scan")
SIZES = {"vocab_size": 48, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_ff": 24, "max_seq_len": 32}
VAE = ModelConfig(**SIZES, positions=Learned(), latent=Latent(size=6, slots=3, encoder_layers=1))
ROTARY = VAE.model_copy(update={"positions": ModelConfig(**SIZES).positions})
TOKENS = np.random.default_rng(0).integers(1, 48, (1, 9))
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
POSITIONS = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 0]])
LATENTS = np.random.default_rng(1).normal(size=(1, 2, 6)).astype(np.float32)


def noisy_params(config, seed=0):
    generator = np.random.default_rng(seed)
    draw = lambda name, leaf: jnp.asarray(generator.normal(name.endswith("scale"), 0.2, leaf.shape), jnp.float32)
    return map_named(draw, abstract_params(config))


def model(config=VAE):
    return bind(graph(config, CPU)[0], noisy_params(config))


@functools.cache
def posterior_of(texts):
    graphdef, params = graph(VAE, CPU)[0], noisy_params(VAE)
    return jax.jit(lambda *rows: bind(graphdef, params).posterior(*rows, texts))


@functools.cache
def states_to_logits():
    graphdef, params = graph(VAE, CPU)[0], noisy_params(VAE)

    @jax.jit
    def logits(*arrays):
        vae = bind(graphdef, params)
        return vae.logits(vae.states(*arrays))

    return logits


def logits(latents=LATENTS, tokens=TOKENS, segments=SEGMENTS, positions=POSITIONS, kept=None):
    return states_to_logits()(tokens, segments, positions, latents, kept)


def test_packed_texts_have_the_posteriors_of_single_ones_whatever_the_padding():
    packed = posterior_of(2)(TOKENS, SEGMENTS, POSITIONS)
    for number, part in enumerate((slice(0, 4), slice(4, 7))):
        single = posterior_of(1)(TOKENS[:, part], np.ones_like(TOKENS[:, part]), POSITIONS[:, part])
        jax.tree.map(lambda a, b, n=number: np.testing.assert_allclose(a[:, n], b[:, 0], atol=1e-5), packed, single)
    padding = np.where(SEGMENTS == 0, 7, TOKENS)
    jax.tree.map(np.testing.assert_array_equal, posterior_of(2)(padding, SEGMENTS, POSITIONS), packed)
    assert np.isfinite(posterior_of(3)(TOKENS, SEGMENTS, POSITIONS).mean).all()  # a text that is not there


def test_packed_texts_are_decoded_as_single_ones_whatever_the_padding():
    packed = logits()
    for number, part in enumerate((slice(0, 4), slice(4, 7))):
        ones = np.ones_like(TOKENS[:, part])
        single = logits(LATENTS[:, number : number + 1], TOKENS[:, part], ones, POSITIONS[:, part])
        np.testing.assert_allclose(packed[:, part], single, atol=1e-5)
    np.testing.assert_array_equal(logits(tokens=np.where(SEGMENTS == 0, 7, TOKENS))[:, :7], packed[:, :7])


def test_the_decoder_is_causal_and_reads_its_own_latent_alone():
    vae = model()

    def place(latents, embeddings, at):
        x = vae.decoder.embedded(embeddings, POSITIONS)
        memory = vae.memory(latents, jnp.asarray(SEGMENTS))
        from jaxllm.layers.masks import CausalMask

        return jnp.sum(vae.decoder.run(x, POSITIONS, CausalMask(jnp.asarray(SEGMENTS)), memory=memory)[0][0, at] ** 2)

    embeddings = vae.decoder.embed(TOKENS, jnp.float32)
    by_latent, by_token = jax.jit(jax.grad(place, argnums=(0, 1)))(jnp.asarray(LATENTS), embeddings, 2)
    assert np.abs(by_latent[0, 0]).min() > 1e-5  # every dimension of z
    assert not np.any(by_latent[0, 1])
    assert np.abs(by_token[0, :3]).max(-1).min() > 1e-5
    assert not np.any(by_token[0, 3:])


def test_a_dropped_word_is_not_seen():
    kept = np.ones((1, 9), bool)
    kept[0, 1] = False
    other = TOKENS.copy()
    other[0, 1] = 1 + other[0, 1] % 46
    np.testing.assert_array_equal(logits(tokens=other, kept=kept), logits(kept=kept))
    assert np.abs(logits(kept=kept) - logits())[0, 1:4].max() > 1e-3


@pytest.mark.parametrize("config", [VAE, ROTARY], ids=["learned", "rope"])
def test_decoding_with_a_cache_equals_whole_rows(config):
    params, tokens = noisy_params(config), np.tile(TOKENS[:, :7], (2, 1))
    latents, positions = jnp.asarray(LATENTS[0]), np.broadcast_to(np.arange(7), (2, 7))
    whole_graph, cut_graph, layers = graph(config, CPU)[0], graph(config, CPU, stacked=False)[0], unstack(params)

    @jax.jit
    def whole(params):
        vae = bind(whole_graph, params)
        return vae.logits(vae.states(tokens, np.ones_like(tokens), positions, latents[:, None]))

    @jax.jit
    def begin(layers):
        cut = bind(cut_graph, layers)
        hidden, cache = cut.decoder.prefill(tokens[:, :3], positions[:, :3], cut.begin(latents, 8))
        return cut.logits(hidden), cache

    @jax.jit
    def decode(layers, tokens, positions, cache):
        cut = bind(cut_graph, layers)
        hidden, cache = cut.decoder.decode(tokens, positions, cache)
        return cut.logits(hidden), cache

    first, cache = begin(layers)
    found = [first]
    for at in range(3, 7):
        logits, cache = decode(layers, tokens[:, at : at + 1], positions[:, at : at + 1], cache)
        found.append(logits)
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole(params), atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"parallel": True}, {"window": SlidingWindow(size=4)}, {"ffn": Experts(number=2, top_k=1)}]
)
def test_what_a_vae_does_not_compute_is_refused(change):
    with pytest.raises(ValueError, match="latent: a VAE has no experts, windows, parallel layers or mla"):
        ModelConfig(**SIZES, latent=Latent(), **change)
    assert ModelConfig(**SIZES, latent=Latent(encoder_layers=3), ffn=Gated()).depth == 5
