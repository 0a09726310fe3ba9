"""What an encoder is: a stack of blocks, what is added to its embeddings, and what is made of its hidden states."""

from operator import attrgetter
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jaxllm.core.config import Config
from jaxllm.layers.config import Activation, Experts, Learned
from jaxllm.models.config import ModelConfig


class MaskedLM(Config):
    """Which token stands at each position: norm(act(h W + b)) E^T + c, with E the output matrix of the stack.

    Source: Devlin et al. 2019 (BERT), section 3.1.
    """

    kind: Literal["masked_lm"] = "masked_lm"
    activation: Activation = Field("gelu", description="nonlinearity before the norm")


class Classes(Config):
    """Which label a text has: tanh(h_0 W + b) U + c, of the first token's hidden state."""

    kind: Literal["classes"] = "classes"
    labels: tuple[str, ...] = Field(min_length=1, description="name of each output, in order")
    problem: Literal["single_label_classification", "multi_label_classification", "regression"] = Field(
        "single_label_classification",
        description="what the outputs are: scores of labels of which one is right, or any number; or plain values",
    )


class Embeddings(Config):
    """Hidden states, and nothing on top of them but perhaps a pooler: tanh(h_0 W + b), of the first token."""

    kind: Literal["embeddings"] = "embeddings"
    pooler: bool = Field(True, description="the checkpoint has a pooler")


HeadConfig = Annotated[MaskedLM | Classes | Embeddings, Field(discriminator="kind")]


class EncoderConfig(Config):
    """Architecture of a Transformer encoder: BERT and RoBERTa."""

    stack: ModelConfig = Field(description="the blocks, and the tables of tokens and positions")
    n_types: int = Field(2, ge=1, description="token types: first and second text of a pair")
    head: HeadConfig = Field(MaskedLM(), description="what is made of hidden states")

    @model_validator(mode="after")
    def _check(self) -> Self:
        stack = self.stack
        if not isinstance(stack.positions, Learned) or stack.norm_placement != "post" or not stack.embed_norm:
            raise ValueError(
                f"positions.kind={stack.positions.kind}, norm_placement={stack.norm_placement} and "
                f"embed_norm={stack.embed_norm}: the stack of an encoder has learned, post and true"
            )
        if isinstance(stack.ffn, Experts):
            raise ValueError("ffn.kind=experts: an encoder has no loss that keeps experts in use; take gated or plain")
        if unused := [
            name for name in ("window", "embed_scale", "logit_softcap", "mla", "latent") if stack.model_dump()[name]
        ]:
            raise ValueError(f"{', '.join(unused)} of the stack: an encoder does not compute it; leave it out")
        return self

    vocab_size = property(attrgetter("stack.vocab_size"), doc="Rows of the table of tokens.")
    n_layers = property(attrgetter("stack.n_layers"), doc="Number of blocks.")
    max_seq_len = property(attrgetter("stack.max_seq_len"), doc="Longest sequence, tokens.")
    tie_embeddings = property(attrgetter("stack.tie_embeddings"), doc="Whether the table of tokens is the head.")

    def explicit(self) -> Self:
        """Return the same architecture with the defaults that follow from other fields written out."""
        return self.model_copy(update={"stack": self.stack.explicit()})
