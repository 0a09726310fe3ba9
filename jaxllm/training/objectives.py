"""What a model learns and how it is measured, whatever kind it is: sums over the weighted tokens or texts of a batch.

Divide after summing over microbatches and devices. `z` and `smoothing` are those of `losses.cross_entropy`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.core.batch import Batch, LabelledTexts, TextPairs
from jaxllm.models.balance import router_loss
from jaxllm.models.build import AnyConfig, Drop, Params, bind, graph
from jaxllm.models.config import ComputeConfig, is_vae
from jaxllm.models.encoder_config import Classes, EncoderConfig, MaskedLM
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.training.losses import cross_entropy, token_nats
from jaxllm.training.vae_losses import elbo_eval_step, vae_eval_metrics

AnyBatch = Batch | TextPairs | LabelledTexts  # what the loader makes for the model that learns from it


def linear(
    params: Params, batch: Batch | TextPairs, model: AnyConfig, compute: ComputeConfig, drop: Drop | None = None
) -> tuple[Float[Array, "B T D"], Float[Array, "V D"], float | None, Any]:
    """Return (hidden, table, cap, router sums or None): the logits of a batch's targets are hidden table^T, capped.

    Of an encoder, tokens have some of them masked, targets are what was there, and weights are 0 where nothing is to be
    guessed (`data.masking`).

    Raises:
      TypeError: an encoder has no masked-LM head.
    """
    if isinstance(model, EncoderConfig) and not isinstance(model.head, MaskedLM):
        raise TypeError(f"head {model.head.kind} guesses no tokens; this loss needs one of kind masked_lm")
    module = bind(graph(model, compute)[0], params, drop)
    match model:
        case EncoderConfig():
            hidden = module.states(batch.tokens, batch.segments, positions=batch.positions)
            with jax.named_scope("loss"):
                return *module.head.linear(hidden, module.stack.output_table()), None, None
        case Seq2SeqConfig():
            inputs = shifted(batch.targets, batch.segments, model.start_token)
            hidden = module.states(batch.sources, inputs, batch.source_segments, batch.segments)
            with jax.named_scope("loss"):
                return *module.linear(hidden), None, None
    hidden, routers = module.routed_states(batch.tokens, batch.segments, batch.positions)
    return hidden, module.output_table(), model.logit_softcap, routers


def label_logits(
    params: Params, batch: LabelledTexts, model: EncoderConfig, compute: ComputeConfig, drop: Drop | None = None
) -> Float[Array, "B C"]:
    """Return the scores of each text's labels.

    Raises:
      TypeError: the encoder has no labels.
    """
    if not isinstance(model.head, Classes):
        raise TypeError(f"head {model.head.kind} has no labels; this loss needs one of kind classes")
    module = bind(graph(model, compute)[0], params, drop)
    return module.logits(module.text_states(batch.tokens, batch.segments), batch.segments)


def loss_sums(
    params: Params, batch: AnyBatch, model: AnyConfig, compute: ComputeConfig, z: float = 0.0, smoothing: float = 0.0,
    drop: Drop | None = None,
) -> tuple:  # fmt: skip
    """Return (loss, (nats, router sums)), summed over the weights of `batch`; see `losses.cross_entropy`.

    Experts add their `balance.router_loss`, times the weights, to the loss; the router sums of other models are None.
    """
    if isinstance(batch, LabelledTexts):
        log_probs = jax.nn.log_softmax(label_logits(params, batch, model, compute, drop), axis=-1)
        chosen = jnp.take_along_axis(log_probs, jnp.expand_dims(batch.labels, -1), axis=-1)[:, 0]
        nats, spread = (-jnp.sum(batch.weights * each) for each in (chosen, jnp.mean(log_probs, axis=-1)))
        return (1.0 - smoothing) * nats + smoothing * spread, (nats, None)
    hidden, table, cap, routers = linear(params, batch, model, compute, drop)
    with jax.named_scope("loss"):
        loss, nats = cross_entropy(hidden, table, batch.targets, batch.weights, z, compute.loss_chunk, cap, smoothing)
        if routers is not None:
            loss += router_loss(routers, model.ffn) * jnp.sum(batch.weights)
        return loss, (nats, routers)


def eval_step(
    params: Params, batch: AnyBatch, *, model: AnyConfig, compute: ComputeConfig, texts_per_row: int = 1
) -> dict[str, Array]:
    """Return the summed nats and weights of `batch`, to add over batches; of some models more, for `eval_metrics`.

    Of a VAE it is `vae_losses.elbo_eval_step`. Of an encoder there is also what was guessed of what is right: hits [],
    or of labels the table [right, guessed].
    """
    if is_vae(model):
        return elbo_eval_step(params, batch, model=model, compute=compute, texts_per_row=texts_per_row)
    tokens = jnp.sum(batch.weights)
    if isinstance(batch, LabelledTexts):
        logits = label_logits(params, batch, model, compute)
        hot = lambda labels: jax.nn.one_hot(labels, logits.shape[-1])
        nats = -jnp.einsum("b,bc,bc->", batch.weights, hot(batch.labels), jax.nn.log_softmax(logits))
        guesses = hot(jnp.argmax(logits, axis=-1))
        table = jnp.einsum("b,bc,bd->cd", batch.weights, hot(batch.labels), guesses)
        return {"nats": nats, "table": table, "tokens": tokens}
    if isinstance(model, EncoderConfig):
        nats, right = token_losses(params, batch, model=model, compute=compute)
        return {"nats": jnp.sum(batch.weights * nats), "hits": jnp.sum(batch.weights * right), "tokens": tokens}
    return {"nats": loss_sums(params, batch, model, compute)[1][0], "tokens": tokens}


def eval_metrics(batches: Sequence[Mapping[str, Array]], model: AnyConfig) -> dict[str, float]:
    """Return what is measured beside the loss, of all that `eval_step` returned.

    Of a VAE it is `vae_eval_metrics`, of an encoder the accuracy, and of labels also macro_f1 and the f1 of each:
    f1 = 2 hits / (right + guessed), and macro_f1 its mean over labels that are right or guessed at least once.
    """
    if is_vae(model):
        return vae_eval_metrics(batches)
    if not isinstance(model, EncoderConfig):
        return {}
    total = {name: sum(np.asarray(each[name], np.float64) for each in batches) for name in batches[0]}
    if "hits" in total:
        return {"accuracy": float(total["hits"] / total["tokens"])}
    table, labels = total["table"], model.head.labels
    sides, hits = table.sum(0) + table.sum(1), table.diagonal()
    f1 = {label: float(2 * hit / side) for label, hit, side in zip(labels, hits, sides, strict=True) if side}
    return {
        "accuracy": float(hits.sum() / table.sum()), "macro_f1": sum(f1.values()) / len(f1),
        **{f"f1 {label}": value for label, value in f1.items()},
    }  # fmt: skip


def token_losses(
    params: Params, batch: Batch, *, model: AnyConfig, compute: ComputeConfig
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Return the nats of each target of `batch`: times the weights, what `eval_step` sums; and which were guessed."""
    hidden, table, cap, _ = linear(params, batch, model, compute)
    return token_nats(hidden, table, batch.targets, compute.loss_chunk, cap)


def shifted(targets: Int[Array, "B T"], segments: Int[Array, "B T"], start: int) -> Int[Array, "B T"]:
    """Return what the decoder reads: the token before each target, and before the first of a segment `start`.

    Example, start = 0:

        targets 4 2 5 6 2   segments 1 1 2 2 2   ->   0 4 0 5 6
    """
    before = lambda x: jnp.pad(x[:, :-1], ((0, 0), (1, 0)))
    return jnp.where(segments == before(segments), before(targets), start)
