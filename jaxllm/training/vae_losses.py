"""The evidence lower bound of a Transformer VAE, as sums over tokens and texts: divide after summing, once.

    -ELBO = sum over tokens of -log p(x_t | x before t, z) + sum over texts of KL(q(z | x) || N(0, 1)),  z ~ q(z | x)

Both sums are divided by the number of tokens of the global batch, so that a text weighs what its tokens weigh, and the
bound can be compared with the loss of a language model on the same text.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.core import rng
from jaxllm.core.batch import Batch
from jaxllm.models.build import Drop, Params, bind, graph
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.training.config import Elbo
from jaxllm.training.losses import cross_entropy, token_nats

ACTIVE = 0.01  # variance over texts of a latent's mean, above which it counts. Source: Burda et al. 2016, section 5


class Texts(NamedTuple):
    """A batch with what chance and the schedule add to it, by row, so that any microbatch has its own.

    Attributes:
      noise: standard normal, for S texts of each row. kept: False = the decoder does not see this token; None: all.
      kl_weight: of the KL term, the same for all rows.
    """

    batch: Batch
    noise: Float[Array, "B S Z"]
    kept: Bool[Array, "B T"] | None
    kl_weight: Float[Array, "B"]


class VaeSums(NamedTuple):
    """What the texts of a batch add up to.

    Attributes:
      reconstruction: nats of the tokens given z, weighted. kl: nats, of all texts; texts: how many there are.
      mean, square: of the means of q, and of their squares.
      correct: tokens that are the likeliest after the true ones before them, weighted; 0 where nobody asked.
    """

    reconstruction: Float[Array, ""]
    kl: Float[Array, ""]
    texts: Float[Array, ""]
    mean: Float[Array, "Z"]
    square: Float[Array, "Z"]
    correct: Float[Array, ""]


def kl_weight(config: Elbo, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """Return the weight of the KL term in update number `step` (0 = the first).

    Example, warmup = 2, period = 4, kl_weight = 1: 0.5 1 1 1 0.5 1 1 1 ...
    """
    within = step % config.period if config.period else step
    rise = jnp.minimum(1.0, (within + 1) / config.warmup) if config.warmup else 1.0
    return jnp.asarray(config.kl_weight * rise, jnp.float32)


def kl_divergence(mean: Float[Array, "*B Z"], logvar: Float[Array, "*B Z"]) -> Float[Array, "*B Z"]:
    """Return KL(N(mean, exp(logvar)) || N(0, 1)) per dimension, nats. Source: Kingma and Welling 2014, appendix B."""
    return 0.5 * (mean**2 + jnp.exp(logvar) - 1.0 - logvar)


def draw(batch: Batch, config: Elbo, size: int, step: Int[Array, ""] | int, texts_per_row: int) -> Texts:
    """Add the noise of `texts_per_row` latents of `size` to each row, word dropout and the weight of this update."""
    rows, length = batch.tokens.shape
    noise = jax.random.normal(rng.key(config.seed, "latent", step), (rows, texts_per_row, size))
    kept = None
    if config.word_dropout:
        stays = jax.random.bernoulli(rng.key(config.seed, "words", step), 1 - config.word_dropout, (rows, length))
        kept = stays | (batch.positions == 0)  # the first token says that a text begins, and nothing of it
    return Texts(batch, noise, kept, jnp.broadcast_to(kl_weight(config, step), (rows,)))


def elbo_sums(
    params: Params, texts: Texts, model: ModelConfig, compute: ComputeConfig, z: float = 0.0, free_bits: float = 0.0,
    guess: bool = False, drop: Drop | None = None,
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], VaeSums]]:  # fmt: skip
    """Return (loss, (nats, sums)) of a batch, with one sample of each latent: what is trained, and -ELBO.

    loss = reconstruction + kl_weight sum_texts sum_j max(KL_j, free_bits): below `free_bits` nats a dimension of a
    text is not pushed towards the prior. Source: Kingma et al. 2016, section 2.7, by text instead of by batch.

    Args:
      z: weight of the squared log-partition term, see `losses.cross_entropy`.
      guess: count the tokens that are guessed right.
    """
    batch, module = texts.batch, bind(graph(model, compute)[0], params, drop)
    numbers = jnp.arange(1, texts.noise.shape[1] + 1)[None, :, None]
    present = jnp.any(batch.segments[:, None, :] == numbers, axis=-1, keepdims=True).astype(jnp.float32)
    q = module.posterior(batch.tokens, batch.segments, batch.positions, texts.noise.shape[1])
    latents = q.mean + jnp.exp(0.5 * q.logvar) * texts.noise
    hidden = module.states(batch.tokens, batch.segments, batch.positions, latents, texts.kept)
    with jax.named_scope("loss"):
        table, cap = module.decoder.output_table(), model.logit_softcap
        loss, nats = cross_entropy(hidden, table, batch.targets, batch.weights, z, compute.loss_chunk, cap)
        kl, correct = kl_divergence(*q), jnp.zeros(())
        loss += jnp.sum(present * texts.kl_weight[:, None, None] * jnp.maximum(kl, free_bits))
        if guess:
            _, right = token_nats(hidden, table, batch.targets, compute.loss_chunk, cap)
            correct = jnp.sum(batch.weights * right)
        moments = (jnp.sum(present * x, axis=(0, 1)) for x in (q.mean, q.mean**2))
        sums = VaeSums(nats, jnp.sum(present * kl), jnp.sum(present), *moments, correct)
        return loss, (nats + sums.kl, sums)


def elbo_eval_step(
    params: Params, batch: Batch, *, model: ModelConfig, compute: ComputeConfig, texts_per_row: int
) -> dict[str, Array]:
    """Return what `batch` adds up to: nats (-ELBO), tokens, and `VaeSums`; see `vae_eval_metrics`."""
    # Noise of its own for every batch, and the same whenever it is evaluated.
    texts = draw(batch, Elbo(warmup=0), model.latent.size, jnp.sum(batch.tokens), texts_per_row)
    _, (nats, sums) = elbo_sums(params, texts, model, compute, guess=True)
    return {"nats": nats, "tokens": jnp.sum(batch.weights), **sums._asdict()}


def vae_metrics(sums: VaeSums, tokens: Float[Array, ""]) -> dict[str, Float[Array, ""]]:
    """Return reconstruction (nats per token, given z), kl (nats per text) and active_units.

    Active are the latents of which the mean of q varies over texts by more than `ACTIVE`: those that tell texts apart.
    Source: Burda et al. 2016, section 5.
    """
    texts = jnp.maximum(sums.texts, 1.0)
    variance = sums.square / texts - (sums.mean / texts) ** 2
    return {
        "reconstruction": sums.reconstruction / jnp.maximum(tokens, 1.0), "kl": sums.kl / texts,
        "active_units": jnp.sum(variance > ACTIVE).astype(jnp.float32),
    }  # fmt: skip


def vae_eval_metrics(batches: Sequence[Mapping[str, Array]]) -> dict[str, float]:
    """Return `vae_metrics` of all that `elbo_eval_step` returned, and accuracy: the share of tokens guessed right."""
    total = jax.tree.map(lambda *parts: np.sum(np.asarray(parts, np.float64), axis=0), *batches)
    found = vae_metrics(VaeSums(*(total[name] for name in VaeSums._fields)), total["tokens"])
    return {name: float(value) for name, value in found.items()} | {"accuracy": total["correct"] / total["tokens"]}
