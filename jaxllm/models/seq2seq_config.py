"""What an encoder-decoder is: two stacks over one vocabulary, and how hidden states become logits."""

from operator import attrgetter
from typing import Self

from pydantic import Field, model_validator

from jaxllm.core.config import Config
from jaxllm.layers.config import Experts, Rope
from jaxllm.models.config import ModelConfig


class Seq2SeqConfig(Config):
    """Architecture of an encoder-decoder Transformer: the original one, Marian, BART, T5.

    Both halves read one table of tokens, the decoder's.
    """

    encoder: ModelConfig = Field(description="the blocks that read the source, in both directions")
    decoder: ModelConfig = Field(description="the blocks that write the target, the tables of tokens and the head")
    start_token: int = Field(0, ge=0, description="token that the decoder reads first")
    logit_scale: float | None = Field(None, gt=0, description="multiplies hidden states before the head (T5 1.0)")
    logit_bias: bool = Field(False, description="add a number per token to the logits (BART, Marian)")

    @model_validator(mode="after")
    def _check(self) -> Self:
        for name in ("vocab_size", "d_model"):
            one, other = getattr(self.encoder, name), getattr(self.decoder, name)
            if one != other:
                raise ValueError(f"encoder.{name}={one}, decoder.{name}={other}: they must be equal; change one")
        if self.start_token >= self.decoder.vocab_size:
            raise ValueError(f"start_token={self.start_token} is not below decoder.vocab_size={self.vocab_size}")
        for name, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            kinds = isinstance(stack.ffn, Experts) or isinstance(stack.positions, Rope)
            if kinds or stack.window or stack.parallel or stack.mla or stack.latent or stack.logit_softcap:
                raise ValueError(
                    f"{name}: experts, rotary positions, windows, parallel layers, mla, latent and logit_softcap are "
                    "for decoder-only models; leave them out"
                )
        return self

    vocab_size = property(attrgetter("decoder.vocab_size"), doc="Rows of the table of tokens.")
    max_seq_len = property(attrgetter("decoder.max_seq_len"), doc="Longest target, tokens.")
    tie_embeddings = property(attrgetter("decoder.tie_embeddings"), doc="Whether the table of tokens is the head.")

    @property
    def n_layers(self) -> int:
        """Blocks of the deeper half."""
        return max(self.encoder.n_layers, self.decoder.n_layers)

    def explicit(self) -> Self:
        """Return the same architecture with the defaults that follow from other fields written out."""
        return self.model_copy(update={"encoder": self.encoder.explicit(), "decoder": self.decoder.explicit()})

    def room(self, prompt_length: int) -> int:
        """Return how many tokens fit behind the beginning of a target."""
        return self.decoder.room(prompt_length)
