"""The choices inside a block, as types: norm, positions, window, feed-forward. Without JAX: --help stays quick."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jaxllm.core.config import Config

Activation = Literal["silu", "gelu", "gelu_tanh", "relu"]
Kernel = Literal["auto", "xla", "splash", "cudnn"]  # of attention
KERNELS = {"splash": "tpu", "cudnn": "gpu"}  # the kernels that are for one platform
Pattern = tuple[bool, ...]  # which layers, repeated over the stack: (True, False) = every other one, from the first


class RMSNorm(Config):
    """y = x / sqrt(mean(x^2) + eps) * (offset + scale). Source: Zhang and Sennrich 2019."""

    kind: Literal["rms"] = "rms"
    eps: float = Field(1e-6, gt=0, description="added to the mean square before the root")
    offset: float = Field(0.0, description="added to the stored scale (Gemma: 1)")


class LayerNorm(Config):
    """y = (x - mean(x)) / sqrt(var(x) + eps) * scale + bias. Source: Ba et al. 2016."""

    kind: Literal["layer"] = "layer"
    eps: float = Field(1e-5, gt=0, description="added to the variance before the root")


NormConfig = Annotated[RMSNorm | LayerNorm, Field(discriminator="kind")]


class LinearScaling(Config):
    """All wavelengths times `factor`. Source: Chen et al. 2023 (position interpolation)."""

    kind: Literal["linear"] = "linear"
    factor: float = Field(gt=0, description="how many times longer a sequence may be")


class Llama3Scaling(Config):
    """Long wavelengths times `factor`, short ones as they are, between them a blend. Source: Llama 3.1."""

    kind: Literal["llama3"] = "llama3"
    factor: float = Field(gt=0, description="how many times longer a sequence may be")
    low: float = Field(1.0, gt=0, description="wavelengths above original_len / low are scaled whole")
    high: float = Field(4.0, gt=0, description="wavelengths below original_len / high are not scaled")
    original_len: int = Field(ge=1, description="longest sequence before scaling, tokens")


class YarnScaling(Config):
    """As `Llama3Scaling`, blended by turns within the original length, and scores scaled. Source: Peng et al. 2023."""

    kind: Literal["yarn"] = "yarn"
    factor: float = Field(gt=0, description="how many times longer a sequence may be")
    original_len: int = Field(ge=1, description="longest sequence before scaling, tokens")
    beta_fast: float = Field(32.0, gt=0, description="pairs of more turns than this are not scaled")
    beta_slow: float = Field(1.0, gt=0, description="pairs of fewer turns than this are scaled whole")
    magnitude: float = Field(1.0, gt=0, description="factor on cosines and sines (Hugging Face: attention_factor)")
    truncate: bool = Field(True, description="round the ends of the blend to whole pairs")
    score_mscale: float = Field(0.0, ge=0, description="m: scores times (0.1 m ln(factor) + 1)^2 (DeepSeek)")


class LongRopeScaling(Config):
    """A factor of its own for each pair, one set up to the original length, one beyond. Source: Ding et al. 2024."""

    kind: Literal["longrope"] = "longrope"
    short_factors: tuple[float, ...] = Field(description="one per pair, for sequences up to original_len")
    long_factors: tuple[float, ...] = Field(description="one per pair, for longer sequences")
    original_len: int = Field(ge=1, description="longest sequence before scaling, tokens")
    magnitude: float = Field(1.0, gt=0, description="factor on cosines and sines (Hugging Face: attention_factor)")


RopeScaling = Annotated[LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling, Field(discriminator="kind")]


class Rope(Config):
    """Rotary position embedding on queries and keys. Source: Su et al. 2021."""

    kind: Literal["rope"] = "rope"
    theta: float = Field(10_000.0, gt=0, description="base of the geometric series of wavelengths")
    scaling: RopeScaling | None = Field(None, description="how wavelengths were stretched for longer sequences")
    fraction: float = Field(1.0, gt=0, le=1, description="share of each head that is rotated (Pythia: 0.25)")
    local_theta: float | None = Field(
        None, gt=0, description="theta of the layers with a window, unscaled (Gemma 3); none = theta of all layers"
    )
    skipped: Pattern = Field((False,), min_length=1, description="layers without any rotation (SmolLM3), repeated")
    interleaved: bool = Field(
        False, description="pairs are neighbours (the paper, DeepSeek); false = they are half a head apart (GPT-NeoX)"
    )


class Learned(Config):
    """A trained vector per position, added to the token embedding (GPT-2). Source: Vaswani et al. 2017, section 3.5."""

    kind: Literal["learned"] = "learned"
    offset: int = Field(0, ge=0, description="row of the first position; those before are not used (BART: 2)")


class NoPositions(Config):
    """No position signal but the causal mask. Source: Kazemnejad et al. 2023."""

    kind: Literal["none"] = "none"


class Sinusoids(Config):
    """Embeddings get sin(p / 10000^(2i/D)) and the cosine of it added. Source: Vaswani et al. 2017, section 3.5."""

    kind: Literal["sinusoids"] = "sinusoids"
    interleaved: bool = Field(True, description="sine and cosine in turns; false = all sines first (Marian)")


class RelativeBias(Config):
    """Scores get a learned number for the distance of key and query, one per head. Source: Raffel et al. 2020 (T5).

    Half of the buckets hold one distance each, the others hold ranges that grow, up to `max_distance`.
    """

    kind: Literal["relative"] = "relative"
    buckets: int = Field(32, ge=4, description="numbers per head; an encoder has half of them for either direction")
    max_distance: int = Field(128, ge=2, description="from here on all distances share one number")


PositionConfig = Annotated[Rope | Learned | NoPositions | Sinusoids | RelativeBias, Field(discriminator="kind")]


class SlidingWindow(Config):
    """A token sees itself and the `size` - 1 tokens before it. Source: Beltagy et al. 2020; Mistral 7B."""

    size: int = Field(ge=1, description="tokens that are seen, the token itself included")
    layers: Pattern = Field((True,), min_length=1, description="layers that have the window, repeated")


class LatentAttention(Config):
    """Keys and values of all heads are products of one narrow vector per token, which a cache keeps in their place.

    A part of each key, the same for all heads, comes straight from x and has the rotary position; that of each query
    meets it. The latents are normalised (RMSNorm, eps 1e-6). Source: DeepSeek-V2, 2024, section 2.1 (MLA).
    """

    rank: int = Field(ge=1, description="width of the latent of keys and values")
    query_rank: int | None = Field(None, ge=1, description="width of the latent of queries; none = straight from x")
    rotated: int = Field(ge=2, multiple_of=2, description="dimensions of a head, of model.head_dim, with positions")
    value_dim: int = Field(ge=1, description="width of a head of values")


class Gated(Config):
    """y = (act(x W_gate) * x W_up) W_down. Source: Shazeer 2020, GLU Variants; SwiGLU with silu."""

    kind: Literal["gated"] = "gated"
    activation: Activation = Field("silu", description="nonlinearity of the gate")


class Plain(Config):
    """y = act(x W_up) W_down. Source: Vaswani et al. 2017, section 3.3."""

    kind: Literal["plain"] = "plain"
    activation: Activation = Field("gelu_tanh", description="nonlinearity between the two products")


class Groups(Config):
    """Experts stand in groups; a token only uses experts of its `top_k` groups, by the sum of their best two scores."""

    number: int = Field(ge=1, description="groups, of equally many experts")
    top_k: int = Field(ge=1, description="groups that a token may use")


class ClampedGate(Config):
    """h = g sigmoid(alpha g) (u + 1), with g <= `limit` and -limit <= u <= limit. Source: OpenAI 2025 (gpt-oss)."""

    alpha: float = Field(1.702, gt=0, description="steepness of the sigmoid; 1.702 makes it nearly GELU")
    limit: float = Field(7.0, gt=0, description="largest value of the gate, and of either sign of what it multiplies")


class Experts(Config):
    """`number` gated layers side by side, of which each token goes through the `top_k` that a router chooses for it.

    y = sum_i w_i expert_i(x), with p = softmax(x W_router) over all experts, i over the top_k of p, and w_i = p_i,
    divided by their sum where `renormalise`. Source: Shazeer et al. 2017; Jiang et al. 2024 (Mixtral). What comes after
    `router_z`, of DeepSeek-V3: 2024, section 2.1.2.
    """

    kind: Literal["experts"] = "experts"
    number: int = Field(ge=1, description="experts of a layer; model.d_ff is the width of one")
    top_k: int = Field(ge=1, description="experts that a token goes through")
    activation: Activation = Field("silu", description="nonlinearity of the gates")
    clamped: ClampedGate | None = Field(None, description="in place of activation(gate) * up (gpt-oss)")
    renormalise: bool = Field(True, description="weights of the chosen experts sum to one (Mixtral)")
    balance: float = Field(
        0.01, ge=0, description="weight of the load-balancing loss in training (Switch Transformer: 0.01)"
    )
    router_z: float = Field(
        0.0, ge=0, description="weight of the squared log-partition of the router in training (ST-MoE: 0.001)"
    )
    score: Literal["softmax", "sigmoid"] = Field("softmax", description="what makes p of the router's products")
    biased: bool = Field(
        False, description="add a bias to p for the choice alone, which training moves (step.router_bias_step)"
    )
    groups: Groups | None = Field(None, description="choose groups of experts first; none = choose among all")
    scale: float = Field(1.0, gt=0, description="factor on the weights of the chosen experts")
    shared: int = Field(0, ge=0, description="experts more that all tokens go through, as one layer of their width")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.top_k > self.number:
            raise ValueError(f"top_k={self.top_k} is more than number={self.number} experts; lower top_k")
        if self.clamped and (self.shared or self.activation != "silu"):
            raise ValueError(
                f"clamped gates have a nonlinearity of their own, and no shared experts beside them; leave out "
                f"shared={self.shared} and activation={self.activation}"
            )
        if self.groups:
            size, rest = divmod(self.number, self.groups.number)
            if rest or size < 2 or not self.top_k <= size * self.groups.top_k <= self.number:
                raise ValueError(
                    f"{self.groups} of number={self.number} experts: groups have the same number of them, two or more, "
                    f"and the chosen groups at least top_k={self.top_k}"
                )
        return self


FfnConfig = Annotated[Gated | Plain | Experts, Field(discriminator="kind")]
