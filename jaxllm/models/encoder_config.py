"""What an encoder is: a stack of blocks, what is added to its embeddings, and what is made of its hidden states."""

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
    """Architecture of a Transformer encoder: BERT, and RoBERTa with `position_offset`."""

    stack: ModelConfig = Field(description="the blocks, and the tables of tokens and positions")
    n_types: int = Field(2, ge=1, description="token types: first and second text of a pair")
    position_offset: int = Field(0, ge=0, description="row of the position table of a text's first token (RoBERTa: 2)")
    head: HeadConfig = Field(MaskedLM(), description="what is made of hidden states")

    @model_validator(mode="after")
    def _check(self) -> Self:
        stack = self.stack
        if not isinstance(stack.positions, Learned) or stack.norm_placement != "post":
            raise ValueError(
                f"positions.kind={stack.positions.kind} and norm_placement={stack.norm_placement}: the stack of an "
                "encoder has learned positions and norms in place post"
            )
        if isinstance(stack.ffn, Experts):
            raise ValueError("ffn.kind=experts: an encoder has no loss that keeps experts in use; take gated or plain")
        if unused := [name for name in ("window", "embed_scale", "logit_softcap") if stack.model_dump()[name]]:
            raise ValueError(f"{', '.join(unused)} of the stack: an encoder does not compute it; leave it out")
        if self.max_seq_len < 1:
            raise ValueError(
                f"stack.max_seq_len={self.stack.max_seq_len} rows of positions, of which the first "
                f"position_offset={self.position_offset} are not used, leave no room for a token"
            )
        return self

    @property
    def max_seq_len(self) -> int:
        """Longest sequence, tokens: the rows of the position table behind the offset."""
        return self.stack.max_seq_len - self.position_offset

    @property
    def tie_embeddings(self) -> bool:
        """Whether the token embedding is the output matrix."""
        return self.stack.tie_embeddings

    def explicit(self) -> Self:
        """Return the same architecture with the defaults that follow from other fields written out."""
        return self.model_copy(update={"stack": self.stack.explicit()})
