"""What is made of an encoder's hidden states: a distribution over tokens, scores of labels, a vector of the text."""

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.layers.ffn import ACTIVATIONS
from jaxllm.layers.linear import Projection, constant
from jaxllm.layers.norms import Norm
from jaxllm.models.config import ModelConfig
from jaxllm.models.encoder_config import Classes, Embeddings, HeadConfig, MaskedLM


class MaskedLMHead(nnx.Module):
    """logits = norm(act(h W + b)) E^T + c; E is the stack's and comes with the call."""

    def __init__(self, rngs: nnx.Rngs, config: MaskedLM, stack: ModelConfig):
        self.activation = config.activation
        self.dense = _square(rngs, stack)
        self.norm = Norm(stack.norm, stack.d_model)
        self.bias = constant((stack.vocab_size,), ("vocab",), 0.0)

    def states(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Return what the output matrix is multiplied with."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(hidden)))

    def __call__(self, hidden: Float[Array, "B T D"], table: Float[Array, "V D"]) -> Float[Array, "B T V"]:
        """Return float32 logits."""
        states = self.states(hidden)
        logits = jnp.einsum("btd,vd->btv", states, table.astype(states.dtype), preferred_element_type=jnp.float32)
        return logits + jnp.expand_dims(self.bias[...], (0, 1))

    def linear(
        self, hidden: Float[Array, "B T D"], table: Float[Array, "V D"]
    ) -> tuple[Float[Array, "B T D+1"], Float[Array, "V D+1"]]:
        """Return (states, table) whose product alone is the logits; see `joined`."""
        return joined(self.states(hidden), table, self.bias[...])


class Pooler(nnx.Module):
    """y = tanh(h_0 W + b), of the first token's hidden state."""

    def __init__(self, rngs: nnx.Rngs, stack: ModelConfig):
        self.dense = _square(rngs, stack)

    def __call__(self, first: Float[Array, "B 1 D"]) -> Float[Array, "B 1 D"]:
        return jnp.tanh(self.dense(first))


class ClassHead(nnx.Module):
    """logits = pooler(h_0) U + c. BERT calls the two parts pooler and classifier, RoBERTa both of them classifier."""

    def __init__(self, rngs: nnx.Rngs, config: Classes, stack: ModelConfig):
        self.pooler = Pooler(rngs, stack)
        width, labels = {"embed": stack.d_model}, {"labels": len(config.labels)}
        self.out = Projection(rngs, width, labels, bias=True, std=stack.init_std)

    def __call__(self, first: Float[Array, "B 1 D"]) -> Float[Array, "B C"]:
        """Return float32 scores of the labels."""
        return self.out(self.pooler(first))[:, 0].astype(jnp.float32)


def joined(
    states: Float[Array, "B T D"], table: Float[Array, "V D"], bias: Float[Array, "V"]
) -> tuple[Float[Array, "B T D+1"], Float[Array, "V D+1"]]:
    """Return (states, table) whose product has the bias in it, for losses that take none: [s, 1] [E, c]^T."""
    ones = jnp.ones((*states.shape[:-1], 1), states.dtype)
    column = jnp.expand_dims(bias, -1).astype(table.dtype)
    return jnp.concatenate([states, ones], axis=-1), jnp.concatenate([table, column], axis=-1)


def make_head(rngs: nnx.Rngs, config: HeadConfig, stack: ModelConfig) -> MaskedLMHead | ClassHead | Pooler | None:
    """Return the head that `config` describes; None: hidden states are all there is."""
    match config:
        case MaskedLM():
            return MaskedLMHead(rngs, config, stack)
        case Classes():
            return ClassHead(rngs, config, stack)
        case Embeddings():
            return Pooler(rngs, stack) if config.pooler else None


def first_token(hidden: Float[Array, "B T D"], segments: Int[Array, "B T"] | None) -> Float[Array, "B 1 D"]:
    """Return the hidden state of each row's first token that is not padding."""
    if segments is None:
        return hidden[:, :1]
    first = jnp.argmax(segments != 0, axis=-1)
    return jnp.take_along_axis(hidden, jnp.expand_dims(first, (1, 2)), axis=1)


def _square(rngs: nnx.Rngs, stack: ModelConfig) -> Projection:
    width = {"embed": stack.d_model}
    return Projection(rngs, width, width, bias=True, std=stack.init_std)
