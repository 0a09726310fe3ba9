"""The encoder-decoder Transformer: two stacks of the one block, of which the second also attends to the first."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.layers.cache import Cache, Memory
from jaxllm.layers.linear import constant
from jaxllm.layers.masks import CausalMask, FullMask
from jaxllm.models.config import ComputeConfig
from jaxllm.models.decoder import Transformer
from jaxllm.models.heads import joined
from jaxllm.models.seq2seq_config import Seq2SeqConfig


class Seq2Seq(nnx.Module):
    """logits = head(decoder(targets, encoder(sources))). Source: Vaswani et al. 2017, section 3.1.

    `how` the decoder's parameters are held, see `Transformer`: stacked, columns.
    """

    def __init__(self, config: Seq2SeqConfig, compute: ComputeConfig, rngs: nnx.Rngs, **how: bool):
        self.config = config
        self.compute = compute
        self.encoder = Transformer(config.encoder, compute, rngs, part="encoder")
        self.decoder = Transformer(config.decoder, compute, rngs, part="decoder", **how)
        self.logit_bias = constant((config.vocab_size,), ("vocab",), 0.0) if config.logit_bias else None

    def encode(self, sources: Int[Array, "B S"], segments: Int[Array, "B S"] | None = None) -> Memory:
        """Return what a decoder reads of sources.

        Args:
          segments: packing id per token, 0 = padding; None: each row is one text without padding.
        """
        positions = _positions(sources, segments)
        x = self.encoder.embedded(self._lookup(sources), positions)
        states, _, _ = self.encoder.run(x, positions, FullMask(segments))
        return Memory(states, jnp.ones_like(sources) if segments is None else segments)

    def states(
        self, sources: Int[Array, "B S"], targets: Int[Array, "B T"], segments: Int[Array, "B S"] | None = None,
        target_segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:  # fmt: skip
        """Return the decoder's hidden states after its final norm.

        Args:
          targets: what the decoder reads: the start token, then the target without its last token.
          segments, target_segments: packing ids; a target attends to the source of the same number. 0 = padding.
        """
        memory = self.encode(sources, segments)._replace(targets=target_segments)
        positions = _positions(targets, target_segments)
        x = self.decoder.embedded(self._lookup(targets), positions)
        return self.decoder.run(x, positions, CausalMask(target_segments), memory=memory)[0]

    def linear(self, hidden: Float[Array, "B T D"]) -> tuple[Float[Array, "B T D+"], Float[Array, "V D+"]]:
        """Return (states, table) whose product alone is the logits, for losses that take no scale and no bias."""
        states, table = self._scaled(hidden), self.decoder.output_table()
        return (states, table) if self.logit_bias is None else joined(states, table, self.logit_bias[...])

    def _scaled(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        scale = self.config.logit_scale
        return hidden if scale is None else hidden * jnp.asarray(scale, hidden.dtype)

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return float32 logits of hidden states."""
        logits = self.decoder.logits(self._scaled(hidden))
        return logits if self.logit_bias is None else logits + self.logit_bias[...][None, None, :]

    def __call__(
        self, sources: Int[Array, "B S"], targets: Int[Array, "B T"], segments: Int[Array, "B S"] | None = None,
        target_segments: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:  # fmt: skip
        """Return float32 next-token logits of whole targets; arguments as of `states`."""
        return self.logits(self.states(sources, targets, segments, target_segments))

    def begin(self, sources: Int[Array, "B S"], segments: Int[Array, "B S"], slots: int) -> Cache:
        """Read the sources; return a cache of `slots` empty places for a target, with the source's keys and values."""
        return self.decoder.memory_cache(self.encode(sources, segments), slots)

    def _lookup(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.decoder.embed(tokens, jnp.dtype(self.compute.dtype))


def _positions(tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None) -> Int[Array, "B T"]:
    """Return the index of each token within its segment."""
    index = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    if segments is None:
        return index
    first = jnp.concatenate([jnp.ones_like(segments[:, :1]), segments[:, 1:] != segments[:, :-1]], axis=1)
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1)
