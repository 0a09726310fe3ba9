"""The Transformer encoder (BERT, RoBERTa): the decoder's stack of blocks under a mask that looks both ways.

The stack is a `Transformer`, entered behind its embeddings: an encoder adds token types and a norm to them, counts
positions from an offset, and has a head of its own. There is no second attention and no second block.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.core import rng
from jaxllm.layers.linear import Embed
from jaxllm.layers.masks import FullMask
from jaxllm.layers.norms import Norm
from jaxllm.models.config import ComputeConfig
from jaxllm.models.decoder import Params, Transformer, axes_of
from jaxllm.models.encoder_config import EncoderConfig
from jaxllm.models.heads import ClassHead, MaskedLMHead, Pooler, first_token, make_head
from jaxllm.models.views import Views
from jaxllm.sharding.rules import constrain


class TransformerEncoder(nnx.Module):
    """h = stack(norm(E[tokens] + P[positions + offset] + Y[types])). Source: Devlin et al. 2019; Liu et al. 2019."""

    def __init__(self, config: EncoderConfig, compute: ComputeConfig, rngs: nnx.Rngs):
        stack = config.stack
        self.config = config
        self.compute = compute
        self.stack = Transformer(stack, compute, rngs)
        self.type_embed = Embed(rngs, config.n_types, stack.d_model, axis="types", std=stack.init_std)
        self.embed_norm = Norm(stack.norm, stack.d_model)
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
        dtype = jnp.dtype(self.compute.dtype)
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        types = jnp.zeros_like(tokens) if types is None else types
        x = self.stack.embed(tokens, dtype) + self.type_embed(types, dtype)
        x = x + self.stack.position_embed(positions + self.config.position_offset, dtype)
        x = self.embed_norm(constrain(x, "batch", "length", None))
        return self.stack.run_blocks(x, Views(self.config.stack, FullMask(segments), positions))[0]

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


def graph(config: EncoderConfig, compute: ComputeConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Return (graph definition, abstract parameters with their logical axes); `decoder.bind` joins it to parameters."""
    return nnx.split(nnx.eval_shape(lambda: TransformerEncoder(config, compute, nnx.Rngs(0))), nnx.Param)


def init_params(config: EncoderConfig, seed: int) -> Params:
    """Draw the initial parameters; call under jit with out_shardings to have them born sharded."""
    model = TransformerEncoder(config, ComputeConfig(), nnx.Rngs(rng.key(seed, "init")))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def logical_axes(config: EncoderConfig) -> dict[str, Any]:
    """Return the tree of logical axis names of `init_params`."""
    return axes_of(graph(config, ComputeConfig())[1])


def abstract_params(config: EncoderConfig) -> Params:
    """Return ShapeDtypeStructs of the parameters without allocating them."""
    return jax.eval_shape(lambda: init_params(config, 0))
