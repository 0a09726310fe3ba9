"""Losses of encoders and encoder-decoders, as sums over weighted tokens or texts.

Divide after summing over microbatches and devices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.core.batch import Batch
from jaxllm.models.build import Params, bind, graph
from jaxllm.models.config import ComputeConfig
from jaxllm.models.encoder import TransformerEncoder
from jaxllm.models.encoder_config import Classes, EncoderConfig, MaskedLM
from jaxllm.models.seq2seq import Seq2Seq
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.training.losses import Sums, chunks, cross_entropy


class LabelledTexts(NamedTuple):
    """Texts and which label is right.

    Attributes:
      segments: 1 = token, 0 = padding, on either side of a row. types: token types; None: all 0.
    """

    tokens: Int[Array, "B T"]
    segments: Int[Array, "B T"]
    labels: Int[Array, "B"]
    types: Int[Array, "B T"] | None = None


def masked_lm_sums(
    params: Params, batch: Batch, config: EncoderConfig, compute: ComputeConfig,
    types: Int[Array, "B T"] | None = None, z: float = 0.0,
) -> Sums:  # fmt: skip
    """Return (loss, nats) summed over the weighted tokens of `batch`; see `losses.cross_entropy`.

    Args:
      batch: tokens with some of them masked; targets are the tokens that were there, at the same place, and weights are
        0 where nothing is to be guessed (`data.masking`).
      types: token types; None: all 0.
    Raises:
      TypeError: the encoder has no masked-LM head.
    """
    if not isinstance(config.head, MaskedLM):
        raise TypeError(f"head {config.head.kind} guesses no tokens; this loss needs one of kind masked_lm")
    model: TransformerEncoder = bind(graph(config, compute)[0], params)
    hidden = model.states(batch.tokens, batch.segments, types, batch.positions)
    with jax.named_scope("loss"):
        states, table = model.head.linear(hidden, model.stack.output_table())
        return cross_entropy(states, table, batch.targets, batch.weights, z, compute.loss_chunk)


def class_sums(params: Params, batch: LabelledTexts, config: EncoderConfig, compute: ComputeConfig) -> Float[Array, ""]:
    """Return the cross-entropy of the right label, summed over texts, nats.

    Raises:
      TypeError: the encoder has no labels.
    """
    if not isinstance(config.head, Classes):
        raise TypeError(f"head {config.head.kind} has no labels; this loss needs one of kind classes")
    model: TransformerEncoder = bind(graph(config, compute)[0], params)
    hidden = model.text_states(batch.tokens, batch.segments, batch.types)
    log_probs = jax.nn.log_softmax(model.logits(hidden, batch.segments), axis=-1)
    return -jnp.sum(jnp.take_along_axis(log_probs, jnp.expand_dims(batch.labels, -1), axis=-1))


class TextPairs(NamedTuple):
    """Sources and their targets, which may be packed: a target reads the source of its segment's number.

    Attributes:
      sources: int32 [B, S]; source_segments: 1, 2, ... per text, 0 = padding.
      inputs: int32 [B, T], what the decoder reads: the start token, then the target without its last token.
      targets: int32 [B, T], the token that follows each of `inputs`; weights: float32, 0 = not trained (padding).
      segments: int32 [B, T], of `inputs`.
    """

    sources: Int[Array, "B S"]
    source_segments: Int[Array, "B S"]
    inputs: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    segments: Int[Array, "B T"]


def target_sums(
    params: Params, batch: TextPairs, config: Seq2SeqConfig, compute: ComputeConfig, smoothing: float = 0.0
) -> Sums:
    """Return (loss, nats) summed over the weighted tokens of the targets.

    nats = -sum_bt w_bt log p_bt[target_bt], and loss = (1 - e) nats - e / V sum_btv w_bt log p_bt[v] for a smoothing e:
    the cross-entropy with a target that is right with 1 - e and spreads e over the vocabulary. Only `loss` is trained.

    Only the logits of `compute.loss_chunk` positions exist at a time; the backward pass computes them again.
    Source: Szegedy et al. 2016, section 7; Vaswani et al. 2017, section 5.4 (e = 0.1).

    Raises:
      ValueError: smoothing is not in [0, 1).
    """
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing={smoothing} must be at least 0 and below 1")
    model: Seq2Seq = bind(graph(config, compute)[0], params)
    hidden = model.states(batch.sources, batch.inputs, batch.source_segments, batch.segments)

    @jax.checkpoint
    def part(hidden: Array, targets: Array, weights: Array) -> Sums:
        log_probs = jax.nn.log_softmax(model.logits(hidden), axis=-1)
        chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        nats = -jnp.sum(weights * chosen)
        spread = -jnp.sum(weights * jnp.mean(log_probs, axis=-1)) if smoothing else 0.0
        return (1.0 - smoothing) * nats + smoothing * spread, nats

    def add(sums: Sums, inputs: tuple[Array, ...]) -> tuple[Sums, None]:
        loss, nats = part(*inputs)
        return (sums[0] + loss, sums[1] + nats), None

    with jax.named_scope("loss"):
        start = (jnp.zeros(()), jnp.zeros(()))
        return jax.lax.scan(add, start, chunks((hidden, batch.targets, batch.weights), compute.loss_chunk))[0]
