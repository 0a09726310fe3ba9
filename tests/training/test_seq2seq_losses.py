"""The loss of encoder-decoders: formula, chunks, packing, and that the original Transformer learns with it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxllm.core.batch import TextPairs
from jaxllm.inference.decode import Decoder, Limits, Request
from jaxllm.inference.sampling import Sampler
from jaxllm.layers.config import LayerNorm, Plain, Sinusoids
from jaxllm.models.build import bind, graph, init_params
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.training.objectives import loss_sums, shifted

# Vaswani et al. 2017, small: sinusoids, post-norm, ReLU, one table for both halves and the output.
STACK = ModelConfig(
    vocab_size=16, d_model=32, n_layers=1, n_heads=4, d_ff=64, max_seq_len=16, norm=LayerNorm(), norm_placement="post",
    positions=Sinusoids(), ffn=Plain(activation="relu"), bias=True, tie_embeddings=True, embed_scale=32**0.5,
    init_std=32**-0.5,
)  # fmt: skip
ORIGINAL = Seq2SeqConfig(encoder=STACK, decoder=STACK, start_token=1)
COMPUTE = ComputeConfig(dtype="float32", layers="scan", loss_chunk=3)


def reversed_pairs(seed, rows=16, length=5):
    """Return texts and the same texts backwards, with 0 as the end."""
    texts = np.random.default_rng(seed).integers(2, 16, (rows, length)).astype(np.int32)
    targets = np.concatenate([texts[:, ::-1], np.zeros((rows, 1), np.int32)], 1)
    ones = np.ones_like(targets)
    return TextPairs(texts, np.ones_like(texts), targets, ones.astype(np.float32), ones)


def log_probabilities(config, params, sources, inputs):
    forward = jax.jit(lambda params: jax.nn.log_softmax(bind(graph(config, COMPUTE)[0], params)(sources, inputs)))
    return np.asarray(forward(params), np.float64)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_formula_whatever_the_chunk(smoothing):
    params, batch = jax.jit(lambda: init_params(ORIGINAL, 0))(), reversed_pairs(0)
    batch = batch._replace(weights=batch.weights * np.linspace(0, 1, 6, dtype=np.float32)[None])
    sums = jax.jit(
        lambda params, compute: loss_sums(params, batch, ORIGINAL, compute, smoothing=smoothing), static_argnums=1
    )
    loss, (nats, _) = sums(params, COMPUTE)
    inputs = np.concatenate([np.ones((16, 1), np.int32), batch.targets[:, :-1]], 1)
    log_probs = log_probabilities(ORIGINAL, params, batch.sources, inputs)
    right = np.eye(16)[batch.targets] * (1 - smoothing) + smoothing / 16
    np.testing.assert_allclose(loss, -(batch.weights[..., None] * right * log_probs).sum(), rtol=1e-5)
    one_chunk = COMPUTE.model_copy(update={"loss_chunk": 100})
    whole, (whole_nats, _) = sums(params, one_chunk)
    np.testing.assert_allclose([whole, whole_nats], (loss, nats), rtol=1e-6)


def test_packed_pairs_have_the_loss_of_single_ones():
    params, batch = jax.jit(lambda: init_params(ORIGINAL, 0))(), reversed_pairs(0, rows=2)
    joined = TextPairs(*(x.reshape(1, -1) for x in batch))
    numbered = lambda x: np.repeat([[1, 2]], x.shape[1] // 2, axis=1)
    packed = joined._replace(source_segments=numbered(joined.sources), segments=numbered(joined.targets))
    sums = jax.jit(lambda batch: loss_sums(params, batch, ORIGINAL, COMPUTE, smoothing=0.1))
    found = lambda batch: jax.tree.leaves(sums(batch))
    np.testing.assert_allclose(found(packed), found(batch), rtol=1e-5)


def test_the_decoder_reads_each_target_one_place_later():
    found = shifted(np.array([[4, 2, 5, 6, 2, 0]]), np.array([[1, 1, 2, 2, 2, 0]]), 9)
    assert found.tolist() == [[9, 4, 9, 5, 6, 9]]


def test_scale_and_bias_of_the_logits_are_in_the_loss():
    scaled = ORIGINAL.model_copy(update={"logit_scale": 0.5, "logit_bias": True})
    params, batch = jax.jit(lambda: init_params(scaled, 0))(), reversed_pairs(0)
    params["logit_bias"] = np.random.default_rng(1).normal(size=16).astype(np.float32)
    inputs = np.concatenate([np.ones((16, 1), np.int32), batch.targets[:, :-1]], 1)
    log_probs = log_probabilities(scaled, params, batch.sources, inputs)
    expected = -np.take_along_axis(log_probs, batch.targets[..., None], -1).sum()
    found = jax.jit(lambda params: loss_sums(params, batch, scaled, COMPUTE))(params)
    np.testing.assert_allclose(jax.tree.leaves(found), [expected] * 2, rtol=1e-5)


def test_the_original_transformer_learns_to_turn_texts_around():
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, batch):
        def mean(params):
            return loss_sums(params, batch, ORIGINAL, COMPUTE, smoothing=0.1)[0] / batch.weights.sum()

        loss, gradient = jax.value_and_grad(mean)(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, loss

    params = jax.jit(lambda: init_params(ORIGINAL, 0))()
    state = optimizer.init(params)
    for index in range(300):
        params, state, _ = step(params, state, jax.tree.map(jnp.asarray, reversed_pairs(index, rows=64)))
    unseen = reversed_pairs(10_000, rows=40)
    requests = [Request([1], 0, source.tolist()) for source in unseen.sources]
    found = Decoder(ORIGINAL, params, COMPUTE).generate(requests, Sampler(temperature=0.0), Limits(8, (0,)))
    right = [answer.tokens == target.tolist() for answer, target in zip(found, unseen.targets, strict=True)]
    assert np.mean(right) > 0.9
