"""The Transformer encoder (BERT, RoBERTa): the decoder's stack of blocks under a mask that looks both ways.

The stack is a `Transformer`, entered behind its table of tokens: an encoder adds token types, and has a head of its
own. There is no second attention and no second block.
"""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.layers.linear import Embed
from jaxllm.layers.masks import FullMask
from jaxllm.models.config import ComputeConfig
from jaxllm.models.decoder import Transformer
from jaxllm.models.encoder_config import EncoderConfig
from jaxllm.models.heads import ClassHead, MaskedLMHead, Pooler, first_token, make_head


class TransformerEncoder(nnx.Module):
    """h = stack(norm(E[tokens] + Y[types] + P[positions])). Source: Devlin et al. 2019; Liu et al. 2019."""

    def __init__(self, config: EncoderConfig, compute: ComputeConfig, rngs: nnx.Rngs):
        stack = config.stack
        self.config = config
        self.compute = compute
        self.stack = Transformer(stack, compute, rngs)
        self.type_embed = Embed(rngs, config.n_types, stack.d_model, axis="types", std=stack.init_std)
        self.head = make_head(rngs, config.head, stack)

    def states(
        self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None = None,
        types: Int[Array, "B T"] | None = None, positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:  # fmt: skip
        """Return the hidden states of whole rows.

        Args:
          segments: packing id per token, 0 = padding; None: each row is one text without padding.
          types: token types; None: all 0.
          positions: index within the text, from 0; None: 0 ... T-1.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        types = jnp.zeros_like(tokens) if types is None else types
        dtype = jnp.dtype(self.compute.dtype)
        x = self.stack.embedded(self.stack.embed(tokens, dtype) + self.type_embed(types, dtype), positions)
        return self.stack.run(x, positions, FullMask(segments))[0]

    def text_states(
        self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"], types: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """Return the hidden states of rows of one text each, with padding (segment 0) on either side of it."""
        positions = jnp.maximum(jnp.cumsum(segments, axis=-1) - 1, 0)
        return self.states(tokens, segments, types, positions)

    def logits(
        self, hidden: Float[Array, "B T D"], segments: Int[Array, "B T"] | None = None
    ) -> Float[Array, "B T V"] | Float[Array, "B C"]:
        """Return what the head says of hidden states, float32: of each token, or of each row's first one.

        Raises:
          TypeError: the head scores nothing.
        """
        match self.head:
            case MaskedLMHead():
                return self.head(hidden, self.stack.output_table())
            case ClassHead():
                return self.head(first_token(hidden, segments))
        raise TypeError("this encoder has no head that gives logits; use its hidden states")

    def pooled(self, hidden: Float[Array, "B T D"], segments: Int[Array, "B T"] | None = None) -> Float[Array, "B D"]:
        """Return what the pooler makes of each row's first token.

        Raises:
          TypeError: there is none.
        """
        pooler = self.head.pooler if isinstance(self.head, ClassHead) else self.head
        if not isinstance(pooler, Pooler):
            raise TypeError("this encoder has no pooler; pool its hidden states")
        return pooler(first_token(hidden, segments))[:, 0]

    def __call__(
        self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None = None,
        types: Int[Array, "B T"] | None = None, positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"] | Float[Array, "B C"]:  # fmt: skip
        """Return the logits of whole rows; arguments as of `states`."""
        return self.logits(self.states(tokens, segments, types, positions), segments)
