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
from jaxllm.models.build import Params, bind, graph
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.models.vae import Posterior, TransformerVae
from jaxllm.training.config import Elbo
from jaxllm.training.losses import cross_entropy

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
    """

    reconstruction: Float[Array, ""]
    kl: Float[Array, ""]
    texts: Float[Array, ""]
    mean: Float[Array, "Z"]
    square: Float[Array, "Z"]

    @classmethod
    def zeros(cls, size: int) -> "VaeSums":
        """Return the sums of no text, to add to."""
        return cls(*[jnp.zeros(())] * 3, *[jnp.zeros(size)] * 2)


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
    params: Params, texts: Texts, model: ModelConfig, compute: ComputeConfig, z: float = 0.0, free_bits: float = 0.0
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], VaeSums]]:
    """Return (loss, (nats, sums)) of a batch: what is trained, and -ELBO.

    loss = reconstruction + kl_weight sum_texts sum_j max(KL_j, free_bits): below `free_bits` nats a dimension of a
    text is not pushed towards the prior. Source: Kingma et al. 2016, section 2.7, by text instead of by batch.

    Args:
      z: weight of the squared log-partition term, see `losses.cross_entropy`.
    """
    return _sums(*_forward(params, texts, model, compute), texts, (z, free_bits, compute.loss_chunk))


def elbo_eval_step(
    params: Params, batch: Batch, *, model: ModelConfig, compute: ComputeConfig, texts_per_row: int
) -> dict[str, Array]:
    """Return what `batch` adds up to with one sample of each latent: nats (-ELBO), tokens, those guessed right
    (`correct`: the most likely token after the true ones before it), and `VaeSums`; see `vae_metrics`.
    """
    # Noise of its own for every batch, and the same whenever it is evaluated.
    drawn = draw(batch, Elbo(warmup=0), model.latent.size, jnp.sum(batch.tokens), texts_per_row)
    module, hidden, posterior = _forward(params, drawn, model, compute)
    _, (nats, sums) = _sums(module, hidden, posterior, drawn, (0.0, 0.0, compute.loss_chunk))
    guesses = jax.lax.map(lambda row: jnp.argmax(module.logits(row[None])[0], axis=-1), hidden)
    correct, tokens = jnp.sum(batch.weights * (guesses == batch.targets)), jnp.sum(batch.weights)
    return {"nats": nats, "tokens": tokens, "correct": correct, **sums._asdict()}


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


def _forward(
    params: Params, texts: Texts, model: ModelConfig, compute: ComputeConfig
) -> tuple[TransformerVae, Float[Array, "B T D"], Posterior]:
    """Return (model, hidden states of the decoder given one sample of each latent, q)."""
    batch, module = texts.batch, bind(graph(model, compute)[0], params)
    q = module.posterior(batch.tokens, batch.segments, batch.positions, texts.noise.shape[1])
    latents = q.mean + jnp.exp(0.5 * q.logvar) * texts.noise
    return module, module.states(batch.tokens, batch.segments, batch.positions, latents, texts.kept), q


def _sums(
    module: TransformerVae, hidden: Float[Array, "B T D"], q: Posterior, texts: Texts, how: tuple[float, float, int]
) -> tuple[Float[Array, ""], tuple[Float[Array, ""], VaeSums]]:
    """Return (loss, (nats, sums)); `how` is (z, free_bits, positions of a chunk)."""
    (z, free_bits, chunk), batch, decoder = how, texts.batch, module.decoder
    table, cap = decoder.output_table(), module.config.logit_softcap
    with jax.named_scope("loss"):
        loss, nats = cross_entropy(hidden, table, batch.targets, batch.weights, z, chunk, cap)
        numbers = jnp.arange(1, texts.noise.shape[1] + 1)
        present = jnp.any(batch.segments[:, None, :] == numbers[None, :, None], axis=-1).astype(jnp.float32)
        kl, count = kl_divergence(*q), lambda x: jnp.sum(present[..., None] * x, axis=(0, 1))
        loss += jnp.sum(count(texts.kl_weight[:, None, None] * jnp.maximum(kl, free_bits)))
        kl_nats = jnp.sum(count(kl))
        return loss, (nats + kl_nats, VaeSums(nats, kl_nats, jnp.sum(present), count(q.mean), count(q.mean**2)))
