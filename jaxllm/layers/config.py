"""The choices inside a block, as types: norm, positions, feed-forward. Without JAX, so that --help is quick."""

from typing import Annotated, Literal

from pydantic import Field

from jaxllm.core.config import Config

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]


class RMSNorm(Config):
    """y = x / sqrt(mean(x^2) + eps) * scale. Source: Zhang and Sennrich 2019."""

    kind: Literal["rms"] = "rms"
    eps: float = Field(1e-6, gt=0, description="added to the mean square before the root")


class LayerNorm(Config):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias. Source: Ba et al. 2016."""

    kind: Literal["layer"] = "layer"
    eps: float = Field(1e-5, gt=0, description="added to the variance before the root")


NormConfig = Annotated[RMSNorm | LayerNorm, Field(discriminator="kind")]


class Rope(Config):
    """Rotary position embedding on queries and keys. Source: Su et al. 2021; halves rotated as in GPT-NeoX."""

    kind: Literal["rope"] = "rope"
    theta: float = Field(10_000.0, gt=0, description="base of the geometric series of wavelengths")


class Learned(Config):
    """A trained vector per position, added to the token embedding (GPT-2). Source: Vaswani et al. 2017, section 3.5."""

    kind: Literal["learned"] = "learned"


class NoPositions(Config):
    """No position signal but the causal mask. Source: Kazemnejad et al. 2023."""

    kind: Literal["none"] = "none"


PositionConfig = Annotated[Rope | Learned | NoPositions, Field(discriminator="kind")]


class Gated(Config):
    """y = (act(x W_gate) * x W_up) W_down. Source: Shazeer 2020, GLU Variants; SwiGLU with silu."""

    kind: Literal["gated"] = "gated"
    activation: Activation = Field("silu", description="nonlinearity of the gate")


class Plain(Config):
    """y = act(x W_up) W_down. Source: Vaswani et al. 2017, section 3.3."""

    kind: Literal["plain"] = "plain"
    activation: Activation = Field("gelu_tanh", description="nonlinearity between the two products")


FfnConfig = Annotated[Gated | Plain, Field(discriminator="kind")]
