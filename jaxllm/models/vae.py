"""The Transformer VAE: an encoder and a decoder of the one block, with a normal latent per text between them.

The decoder attends to K vectors that are linear in the latent, in every layer. That reads better than adding the latent
to each embedding: a position chooses, by what it has said so far, which part of the latent it looks at. And it is how
an encoder-decoder reads its source, so that training on packed rows and decoding with a cache are what they were.
Source: Kingma and Welling 2014; Bowman et al. 2016 (texts); Li et al. 2020 (Optimus: memory beside embedding).
"""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxllm.layers.cache import Cache, Memory
from jaxllm.layers.linear import Projection, param
from jaxllm.layers.masks import CausalMask, FullMask
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.models.decoder import Transformer


class Posterior(NamedTuple):
    """q(z | x) = N(mean, exp(logvar)), independent dimensions, float32 [..., Z]; a row has S texts in training."""

    mean: Float[Array, "B S Z"]
    logvar: Float[Array, "B S Z"]


class TransformerVae(nnx.Module):
    """p(x | z) = decoder(x before t, slots(z)) and q(z | x) = N(W m, exp(V m)), m = mean of encoder(x) over the text.

    `how` the decoder's parameters are held, see `Transformer`: stacked, columns.
    """

    def __init__(self, config: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs, **how: bool):
        latent, width = config.latent, {"embed": config.d_model}
        self.config = config
        self.compute = compute
        reader = config.model_copy(update={"n_layers": latent.encoder_layers})
        self.encoder = Transformer(reader, compute, rngs, part="encoder")
        self.decoder = Transformer(config, compute, rngs, part="decoder", **how)
        statistic = lambda: Projection(rngs, width, {"latent": latent.size}, bias=True, std=config.init_std)
        self.mean, self.logvar = statistic(), statistic()
        # The slots are of the size of a normalised stream, and apart from the first step on by an offset of each.
        self.slots = Projection(rngs, {"latent": latent.size}, {"slots": latent.slots, **width}, std=latent.size**-0.5)
        self.slot_embed = param(rngs, (latent.slots, config.d_model), ("slots", "embed"), 1.0)

    def posterior(
        self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"], positions: Int[Array, "B T"], texts: int
    ) -> Posterior:
        """Return q of the texts of segments 1 ... `texts` of each row; that of a text that is not there means nothing.

        Args:
          segments: packing id per token, 0 = padding. positions: index within the text, from 0.
        """
        x = self.encoder.embedded(self.decoder.embed(tokens, jnp.dtype(self.compute.dtype)), positions)
        hidden = self.encoder.run(x, positions, FullMask(segments))[0].astype(jnp.float32)
        member = (segments[:, None, :] == jnp.arange(1, texts + 1)[None, :, None]).astype(jnp.float32)
        pooled = jnp.einsum("bst,btd->bsd", member, hidden) / jnp.maximum(jnp.sum(member, -1, keepdims=True), 1.0)
        return Posterior(self.mean(pooled), self.logvar(pooled))

    def memory(self, latents: Float[Array, "B S Z"], segments: Int[Array, "B T"] | None = None) -> Memory:
        """Return what the decoder attends to: K vectors of each latent, for the text of the same number."""
        batch, texts = latents.shape[:2]
        slots = self.slots(latents) + jnp.expand_dims(self.slot_embed[...], (0, 1))
        numbers = jnp.repeat(jnp.arange(1, texts + 1), slots.shape[2])
        states = slots.reshape(batch, -1, slots.shape[-1]).astype(jnp.dtype(self.compute.dtype))
        return Memory(states, jnp.broadcast_to(numbers, states.shape[:2]), segments)

    def states(
        self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"], positions: Int[Array, "B T"],
        latents: Float[Array, "B S Z"], kept: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:  # fmt: skip
        """Return the decoder's hidden states; the texts of a row are those of segments 1, 2, ..., as their latents.

        Args:
          kept: False: the decoder sees zeros in place of this token's embedding (word dropout).
        """
        x = self.decoder.embed(tokens, jnp.dtype(self.compute.dtype))
        x = self.decoder.embedded(x if kept is None else jnp.where(kept[..., None], x, 0), positions)
        return self.decoder.run(x, positions, CausalMask(segments), memory=self.memory(latents, segments))[0]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return float32 logits of hidden states."""
        return self.decoder.logits(hidden)

    def begin(self, latents: Float[Array, "B Z"], slots: int) -> Cache:
        """Return a cache of `slots` empty places for a text of each latent."""
        return self.decoder.memory_cache(self.memory(latents[:, None]), slots)
