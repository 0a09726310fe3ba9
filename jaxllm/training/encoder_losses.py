"""Losses of encoders, as sums over weighted tokens or texts: divide after summing over microbatches and devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.core.batch import Batch
from jaxllm.models.build import Params, bind, graph
from jaxllm.models.config import ComputeConfig
from jaxllm.models.encoder import TransformerEncoder
from jaxllm.models.encoder_config import Classes, EncoderConfig, MaskedLM
from jaxllm.training.losses import Sums, cross_entropy


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
