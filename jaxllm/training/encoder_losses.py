"""Losses of encoders and encoder-decoders, as sums over weighted tokens or texts.

Divide after summing over microbatches and devices. `z` and `smoothing` are those of `losses.cross_entropy`.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxllm.core.batch import Batch, LabelledTexts, TextPairs
from jaxllm.models.build import Drop, Params, bind, graph
from jaxllm.models.config import ComputeConfig
from jaxllm.models.encoder import TransformerEncoder
from jaxllm.models.encoder_config import Classes, EncoderConfig, HeadConfig, MaskedLM
from jaxllm.models.seq2seq import Seq2Seq
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.training.losses import Sums, cross_entropy, token_nats


def masked_lm_sums(
    params: Params, batch: Batch, config: EncoderConfig, compute: ComputeConfig,
    types: Int[Array, "B T"] | None = None, *, z: float = 0.0, smoothing: float = 0.0, drop: Drop | None = None,
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
    model: TransformerEncoder = bind(graph(config, compute)[0], params, drop)
    hidden = model.states(batch.tokens, batch.segments, types, batch.positions)
    with jax.named_scope("loss"):
        states, table = model.head.linear(hidden, model.stack.output_table())
        return cross_entropy(states, table, batch.targets, batch.weights, z, compute.loss_chunk, None, smoothing)


def class_sums(
    params: Params, batch: LabelledTexts, config: EncoderConfig, compute: ComputeConfig,
    types: Int[Array, "B T"] | None = None, *, smoothing: float = 0.0, drop: Drop | None = None,
) -> Sums:  # fmt: skip
    """Return (loss, nats) of the right labels, summed over the weighted texts of `batch`.

    Raises:
      TypeError: the encoder has no labels.
    """
    if not isinstance(config.head, Classes):
        raise TypeError(f"head {config.head.kind} has no labels; this loss needs one of kind classes")
    model: TransformerEncoder = bind(graph(config, compute)[0], params, drop)
    hidden = model.text_states(batch.tokens, batch.segments, types)
    log_probs = jax.nn.log_softmax(model.logits(hidden, batch.segments), axis=-1)
    chosen = jnp.take_along_axis(log_probs, jnp.expand_dims(batch.labels, -1), axis=-1)[:, 0]
    nats, spread = (-jnp.sum(batch.weights * each) for each in (chosen, jnp.mean(log_probs, axis=-1)))
    return (1.0 - smoothing) * nats + smoothing * spread, nats


def answer_sums(
    params: Params, batch: Batch | LabelledTexts, config: EncoderConfig, compute: ComputeConfig
) -> dict[str, Array]:
    """Return nats, and what was guessed of what is right: hits [], or of labels the table [right, guessed]."""
    model: TransformerEncoder = bind(graph(config, compute)[0], params)
    if isinstance(batch, LabelledTexts):
        logits = model.logits(model.text_states(batch.tokens, batch.segments), batch.segments)
        hot = lambda labels: jax.nn.one_hot(labels, logits.shape[-1])
        nats = -jnp.einsum("b,bc,bc->", batch.weights, hot(batch.labels), jax.nn.log_softmax(logits))
        guesses = hot(jnp.argmax(logits, axis=-1))
        return {"nats": nats, "table": jnp.einsum("b,bc,bd->cd", batch.weights, hot(batch.labels), guesses)}
    hidden = model.states(batch.tokens, batch.segments, positions=batch.positions)
    linear = model.head.linear(hidden, model.stack.output_table())
    nats, right = token_nats(*linear, batch.targets, compute.loss_chunk)
    return {"nats": jnp.sum(batch.weights * nats), "hits": jnp.sum(batch.weights * right)}


def answer_metrics(batches: Sequence[Mapping[str, Array]], head: HeadConfig) -> dict[str, float]:
    """Return the accuracy of all that `eval_step` returned of an encoder; of labels also macro_f1 and the f1 of each.

    f1 = 2 hits / (right + guessed), and macro_f1 its mean over labels that are right or guessed at least once.
    """
    total = {name: sum(np.asarray(each[name], np.float64) for each in batches) for name in batches[0]}
    if "hits" in total:
        return {"accuracy": float(total["hits"] / total["tokens"])}
    table = total["table"]
    sides, hits = table.sum(0) + table.sum(1), table.diagonal()
    f1 = {label: float(2 * hit / side) for label, hit, side in zip(head.labels, hits, sides, strict=True) if side}
    return {
        "accuracy": float(hits.sum() / table.sum()), "macro_f1": sum(f1.values()) / len(f1),
        **{f"f1 {label}": value for label, value in f1.items()},
    }  # fmt: skip


def target_sums(
    params: Params, batch: TextPairs, config: Seq2SeqConfig, compute: ComputeConfig, z: float = 0.0,
    smoothing: float = 0.0, drop: Drop | None = None,
) -> Sums:  # fmt: skip
    """Return (loss, nats) summed over the weighted tokens of the targets."""
    model: Seq2Seq = bind(graph(config, compute)[0], params, drop)
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
