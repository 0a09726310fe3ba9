import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.batch import Batch, LabelledTexts
from jaxllm.core.tree import map_named
from jaxllm.layers.config import LayerNorm, Learned, Plain
from jaxllm.models.build import abstract_params, bind, graph
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.models.encoder_config import Classes, EncoderConfig, MaskedLM
from jaxllm.training.objectives import eval_metrics, loss_sums

STACK = ModelConfig(
    vocab_size=31, d_model=8, n_layers=1, n_heads=2, d_ff=12, max_seq_len=10, norm=LayerNorm(), embed_norm=True,
    positions=Learned(),
    norm_placement="post", ffn=Plain(activation="relu"), bias=True, tie_embeddings=True,
)  # fmt: skip
COMPUTE = ComputeConfig(dtype="float32", layers="scan", loss_chunk=4)
TOKENS, TARGETS = np.random.default_rng(0).integers(0, 31, (2, 3, 9))
MASK = np.arange(9)[None] < np.array([[9], [6], [4]])
TOKEN_HEAD, LABEL_HEAD = MaskedLM(activation="relu"), Classes(labels=("a", "b", "c"))


def built(head):
    """Return (config, random parameters)."""
    config, generator = EncoderConfig(stack=STACK, head=head), np.random.default_rng(2)
    draw = lambda name, leaf: jnp.asarray(generator.normal(name.endswith("scale"), 0.4, leaf.shape), jnp.float32)
    return config, map_named(draw, abstract_params(config))


def log_probs(config, params):
    module = bind(graph(config, COMPUTE)[0], params)
    logits = np.asarray(module(jnp.asarray(TOKENS), jnp.asarray(MASK, jnp.int32)), np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def test_the_masked_lm_loss_is_the_cross_entropy_of_the_logits_with_their_bias():
    config, params = built(TOKEN_HEAD)
    weights = (np.random.default_rng(3).random((3, 9)) < 0.5) * MASK
    batch = Batch(TOKENS, TARGETS, weights.astype(np.float32), MASK.astype(int), np.tile(np.arange(9), (3, 1)))
    loss, (nats, _) = jax.jit(lambda params: loss_sums(params, batch, config, COMPUTE))(params)
    chosen = np.take_along_axis(log_probs(config, params), TARGETS[..., None], -1)[..., 0]
    np.testing.assert_allclose([loss, nats], [-(weights * chosen).sum()] * 2, rtol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_of_labels(smoothing):
    config, params = built(LABEL_HEAD)
    batch = LabelledTexts(TOKENS, MASK * 1, np.array([2, 0, 1]), np.array([1, 1, 0.5], np.float32))
    loss, (nats, _) = jax.jit(lambda params: loss_sums(params, batch, config, COMPUTE, smoothing=smoothing))(params)
    right = np.eye(3)[batch.labels] * batch.weights[:, None]
    chosen = -(right * log_probs(config, params)).sum()
    spread = -(batch.weights[:, None] / 3 * log_probs(config, params)).sum()
    np.testing.assert_allclose([loss, nats], [(1 - smoothing) * chosen + smoothing * spread, chosen], rtol=1e-5)


def test_heads_that_do_not_fit():
    tokens, labels = Batch(*[TOKENS] * 5), LabelledTexts(*[TOKENS] * 4)
    with pytest.raises(TypeError, match="head classes guesses no tokens"):
        loss_sums({}, tokens, EncoderConfig(stack=STACK, head=LABEL_HEAD), COMPUTE)
    with pytest.raises(TypeError, match="head masked_lm has no labels"):
        loss_sums({}, labels, EncoderConfig(stack=STACK, head=TOKEN_HEAD), COMPUTE)


def test_right_answers_are_counted_by_label():
    table = np.array([[3, 1, 0], [2, 4, 0], [0, 0, 0]])
    labels, tokens = (EncoderConfig(stack=STACK, head=head) for head in (LABEL_HEAD, TOKEN_HEAD))
    found = eval_metrics([{"table": table, "tokens": 10}, {"table": table, "tokens": 10}], labels)
    assert found == pytest.approx({"accuracy": 0.7, "f1 a": 6 / 9, "f1 b": 8 / 11, "macro_f1": (6 / 9 + 8 / 11) / 2})
    assert eval_metrics([{"hits": 3.0, "tokens": 4}, {"hits": 1, "tokens": 4}], tokens) == {"accuracy": 0.5}
