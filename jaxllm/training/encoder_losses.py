"""Losses of encoders and encoder-decoders, as sums over weighted tokens or texts.

Divide after summing over microbatches and devices. `z` and `smoothing` are those of `losses.cross_entropy`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxllm.core.batch import Batch, LabelledTexts, TextPairs
from jaxllm.models.build import Params, bind, graph
from jaxllm.models.config import ComputeConfig
from jaxllm.models.encoder import TransformerEncoder
from jaxllm.models.encoder_config import Classes, EncoderConfig, MaskedLM
from jaxllm.models.seq2seq import Seq2Seq
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.training.losses import Sums, cross_entropy


def masked_lm_sums(
    params: Params, batch: Batch, config: EncoderConfig, compute: ComputeConfig,
    types: Int[Array, "B T"] | None = None, *, z: float = 0.0, smoothing: float = 0.0,
) -> Sums:  # fmt: skip
    """Return (loss, nats) summed over the weighted tokens of `batch`.

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
        return cross_entropy(states, table, batch.targets, batch.weights, z, compute.loss_chunk, None, smoothing)


def class_sums(
    params: Params, batch: LabelledTexts, config: EncoderConfig, compute: ComputeConfig,
    types: Int[Array, "B T"] | None = None, *, smoothing: float = 0.0,
) -> Sums:  # fmt: skip
    """Return (loss, nats) of the right labels, summed over the weighted texts of `batch`.

    Raises:
      TypeError: the encoder has no labels.
    """
    if not isinstance(config.head, Classes):
        raise TypeError(f"head {config.head.kind} has no labels; this loss needs one of kind classes")
    model: TransformerEncoder = bind(graph(config, compute)[0], params)
    hidden = model.text_states(batch.tokens, batch.segments, types)
    log_probs = jax.nn.log_softmax(model.logits(hidden, batch.segments), axis=-1)
    chosen = jnp.take_along_axis(log_probs, jnp.expand_dims(batch.labels, -1), axis=-1)[:, 0]
    nats, spread = (-jnp.sum(batch.weights * each) for each in (chosen, jnp.mean(log_probs, axis=-1)))
    return (1.0 - smoothing) * nats + smoothing * spread, nats


def target_sums(
    params: Params, batch: TextPairs, config: Seq2SeqConfig, compute: ComputeConfig, z: float = 0.0,
    smoothing: float = 0.0,
) -> Sums:  # fmt: skip
    """Return (loss, nats) summed over the weighted tokens of the targets."""
    model: Seq2Seq = bind(graph(config, compute)[0], params)
    inputs = shifted(batch.targets, batch.segments, config.start_token)
    hidden = model.states(batch.sources, inputs, batch.source_segments, batch.segments)
    with jax.named_scope("loss"):
        return cross_entropy(
            *model.linear(hidden), batch.targets, batch.weights, z, compute.loss_chunk, None, smoothing
        )


def shifted(targets: Int[Array, "B T"], segments: Int[Array, "B T"], start: int) -> Int[Array, "B T"]:
    """Return what the decoder reads: the token before each target, and before the first of a segment `start`.

    Example, start = 0:

        targets 4 2 5 6 2   segments 1 1 2 2 2   ->   0 4 0 5 6
    """
    before = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(segments == before(segments), before(targets), start)
