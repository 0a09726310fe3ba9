"""What is learned from a row: the next token, hidden tokens, the target of a source, the label of a text."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jaxllm.core.config import Config


class NextToken(Config):
    """Each token of a text, or of what the assistant says, from those before it: for decoders."""

    kind: Literal["next_token"] = "next_token"


class HiddenTokens(Config):
    """Tokens of a text that are hidden, from all others: masked language modelling, for encoders.

    Which ones, is a function of data.seed and the number of the sample. Source: Devlin et al. 2019 (BERT), section 3.1.
    """

    kind: Literal["masked"] = "masked"
    rate: float = Field(0.15, gt=0, le=1, description="share of the tokens that are to be guessed")
    hidden: float = Field(0.8, ge=0, le=1, description="share of these in whose place the mask stands")
    random: float = Field(0.1, ge=0, le=1, description="share of these in whose place any token stands; the rest stays")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.hidden + self.random > 1:
            raise ValueError(f"hidden={self.hidden} and random={self.random} are more than 1 together; lower one")
        return self


class Pairs(Config):
    """What the assistant says, from what it is told: for encoder-decoders, on conversations of one answer.

    The source is the text of all messages before the answer, without the special tokens of the chat template, and eos.
    """

    kind: Literal["pairs"] = "pairs"


class Labels(Config):
    """Which of the labels the assistant says, of what it is told: sequence classification, for encoders."""

    kind: Literal["labels"] = "labels"
    labels: tuple[str, ...] = Field(min_length=2, description="all answers that there are, as in model.head.labels")


Objective = Annotated[NextToken | HiddenTokens | Pairs | Labels, Field(discriminator="kind")]
