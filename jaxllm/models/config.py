"""What a model is (ModelConfig) and how it is computed (ComputeConfig): two questions, two configs."""

import math
from typing import Literal, NamedTuple, Self

from pydantic import Field, model_validator

from jaxllm.core.config import Config
from jaxllm.layers.config import (
    Experts,
    FfnConfig,
    Gated,
    Kernel,
    LatentAttention,
    LongRopeScaling,
    NormConfig,
    PositionConfig,
    RMSNorm,
    Rope,
    SlidingWindow,
    YarnScaling,
)


class Latent(Config):
    """A normal latent per text, between an encoder of the same blocks and the decoder."""

    size: int = Field(32, ge=1, description="dimensions of the latent of a text, Z")
    slots: int = Field(8, ge=1, description="vectors made of the latent, which every layer of the decoder attends to")
    encoder_layers: int = Field(2, ge=1, description="blocks that read the text, in both directions")


class DenseLayers(Config):
    """The first layers of a model with experts, which have a gated feed-forward layer in their place (DeepSeek)."""

    number: int = Field(ge=1, description="how many")
    d_ff: int = Field(ge=1, description="width of their feed-forward layer")


class Stack(NamedTuple):
    """Layers of one kind, whose parameters are stacked on an L of their own.

    Attributes:
      name: of their parameters in the tree. layers: their numbers. config: of a model with only this kind of layer.
    """

    name: str
    layers: range
    config: "ModelConfig"


class ModelConfig(Config):
    """Architecture of a decoder-only Transformer; Llama-type by default, GPT-type by choice of the variants."""

    vocab_size: int = Field(ge=1, description="rows of the embedding table, tokens")
    d_model: int = Field(ge=1, description="model width")
    n_layers: int = Field(ge=1, description="number of blocks")
    n_heads: int = Field(ge=1, description="query heads")
    n_kv_heads: int | None = Field(None, ge=1, description="key/value heads; none = n_heads (no grouping)")
    head_dim: int | None = Field(None, ge=1, description="width of a head; none = d_model / n_heads")
    d_ff: int = Field(ge=1, description="width of the feed-forward layer, or of each of its experts")
    max_seq_len: int = Field(ge=1, description="longest sequence the model is made for, tokens")
    norm: NormConfig = Field(RMSNorm(), description="normalisation around attention and feed-forward, before the head")
    norm_placement: Literal["pre", "out", "sandwich", "post", "none"] = Field(
        "pre",
        description="norms before attention and feed-forward, on what they put out (OLMo-2), both (Gemma 2), or after "
        "the sum of either with x, and then none before the head (BERT); none = no norm at all (with residual_gate)",
    )
    residual_gate: bool = Field(
        False, description="multiply what attention and feed-forward add by a learned number, 0 at first (ReZero)"
    )
    embed_norm: bool = Field(False, description="normalise the embeddings before the first block (BART)")
    parallel: bool = Field(False, description="attention and feed-forward read the same x (GPT-NeoX)")
    positions: PositionConfig = Field(Rope(), description="position encoding")
    ffn: FfnConfig = Field(Gated(), description="feed-forward variant")
    dense: DenseLayers | None = Field(None, description="first layers without experts; none = experts in every layer")
    mla: LatentAttention | None = Field(None, description="keys and values from a latent (MLA); none = straight from x")
    window: SlidingWindow | None = Field(
        None, description="sliding window of some or all layers; none = see everything"
    )
    qk_norm: Literal["none", "head", "width"] = Field(
        "none", description="normalise queries and keys over each head (Qwen3) or over all heads at once (OLMo-2)"
    )
    score_scale: float | None = Field(
        None, gt=0, description="factor on attention scores; none = 1 / sqrt(head_dim), times what YaRN adds"
    )
    score_softcap: float | None = Field(None, gt=0, description="bends attention scores to below this (Gemma 2)")
    sinks: bool = Field(
        False, description="a learned score per head that takes part in the softmax and has no value (gpt-oss)"
    )
    logit_softcap: float | None = Field(None, gt=0, description="bends logits to below this (Gemma 2)")
    bias: bool | Literal["attention", "qkv"] = Field(
        False,
        description="biases on all projections (GPT-2; of experts and router, too), those of attention, or its q, k "
        "and v alone (Qwen2)",
    )
    tie_embeddings: bool = Field(False, description="use the token embedding as output matrix")
    embed_scale: float | None = Field(None, gt=0, description="multiplies token embeddings; none = 1")
    init_std: float = Field(0.02, gt=0, description="standard deviation of initial weights")
    latent: Latent | None = Field(None, description="makes it the decoder of a variational autoencoder; none = no VAE")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_dim is None and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model={self.d_model} is not divisible by n_heads={self.n_heads}; change one, or set head_dim"
            )
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not a multiple of n_kv_heads={self.kv_heads}")
        if self.norm_placement == "none" and not self.residual_gate:
            raise ValueError("norm_placement=none does not train without residual_gate=true; set it, or take pre")
        if self.parallel and self.norm_placement == "post":
            raise ValueError("norm_placement=post normalises x between attention and ffn; parallel must be false")
        if self.latent and (isinstance(self.ffn, Experts) or self.window or self.parallel or self.mla):
            raise ValueError("latent: a VAE has no experts, windows, parallel layers or mla; leave them out")
        if self.dense and not (isinstance(self.ffn, Experts) and self.dense.number < self.n_layers):
            raise ValueError(f"dense is for the first of n_layers={self.n_layers} layers with experts; leave it out")
        if self.dense and self.ffn.clamped:
            raise ValueError("dense layers have no clamped gates; leave ffn.clamped out, or dense")
        if self.mla:
            if self.head_width <= self.mla.rotated:
                raise ValueError(f"head_dim={self.head_width} must be more than mla.rotated={self.mla.rotated}")
            if self.kv_heads != self.n_heads or self.qk_norm != "none":
                raise ValueError("mla has keys for each head and a norm of its own: no n_kv_heads, qk_norm=none")
        if isinstance(self.positions, Rope):
            rotated = int(self.rotary_width * self.positions.fraction)
            if rotated % 2 or not rotated:
                raise ValueError(f"rotary positions need an even number of dimensions of a head, not {rotated}")
            if self.positions.local_theta is not None and self.window is None:
                raise ValueError("positions.local_theta is for layers with a window; set window, or leave it out")
        return self

    @property
    def kv_heads(self) -> int:
        """Key/value heads, K."""
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def depth(self) -> int:
        """Number of blocks, those of a VAE's encoder included."""
        return self.n_layers + (self.latent.encoder_layers if self.latent else 0)

    def explicit(self) -> Self:
        """Return the same architecture with the defaults that follow from other fields written out."""
        written = {"n_kv_heads": self.kv_heads, "head_dim": self.head_width, "score_scale": self.scale}
        return self.model_copy(update=written)

    def room(self, prompt_length: int) -> int:
        """Return how many tokens fit behind a prompt."""
        longest = self.max_seq_len
        match self.positions:
            # Beyond it all keys so far would have to be rotated anew, by the long factors.
            case Rope(scaling=LongRopeScaling(original_len=original)) if prompt_length < original:
                longest = min(longest, original)
        return longest - prompt_length

    def stacks(self) -> list[Stack]:
        """Return the layers by kind, in their order."""
        first = self.dense.number if self.dense else 0
        stacks = [Stack("blocks", range(first, self.n_layers), self)]
        if self.dense:
            kind = {"ffn": Gated(activation=self.ffn.activation), "d_ff": self.dense.d_ff, "dense": None}
            stacks.insert(0, Stack("dense_blocks", range(first), self.model_copy(update=kind)))
        return stacks

    @property
    def scale(self) -> float:
        """Factor on attention scores."""
        match self.positions:
            case Rope(scaling=YarnScaling() as yarn) if self.score_scale is None and yarn.factor > 1:
                return self.head_width**-0.5 * (0.1 * yarn.score_mscale * math.log(yarn.factor) + 1.0) ** 2
        return self.head_width**-0.5 if self.score_scale is None else self.score_scale

    @property
    def head_width(self) -> int:
        """Width of one head, H."""
        return self.d_model // self.n_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_width(self) -> int:
        """Width of the part of a head that `positions` is about."""
        return self.mla.rotated if self.mla else self.head_width

    @property
    def value_width(self) -> int:
        """Width of one head of values, U."""
        return self.mla.value_dim if self.mla else self.head_width


def is_vae(config: Config) -> bool:
    """Whether the configuration of a model is that of a variational autoencoder."""
    return isinstance(config, ModelConfig) and config.latent is not None


class Pipeline(Config):
    """How rows go through the stages of mesh.stage; read where there is more than one."""

    microbatches: int | None = Field(
        None, ge=1, description="parts that the rows of a step go through the stages in; none = 4 for each stage"
    )
    rounds: int = Field(
        1, ge=1, description="times that each goes through all stages: less idle time, more communication"
    )

    def parts(self, stages: int) -> int:
        """Return the number of microbatches."""
        return 4 * stages if self.microbatches is None else self.microbatches

    def idle(self, stages: int) -> float:
        """Return the share of a step's turns in which a stage has nothing to do: (s - 1) / (m r + s - 1).

        Source: Narayanan et al. 2021, section 2.2.2, where it is given as a multiple of the rest, (s - 1) / (m r).
        """
        return (stages - 1) / (self.parts(stages) * self.rounds + stages - 1)

    def check(self, stages: int, layers: int, rows: int, parts: int) -> None:
        """Refuse what cannot be dealt out evenly.

        Args:
          rows: of a step's batch, or of a part of it where gradients are accumulated.
          parts: into which the mesh splits the rows that a stage works on.
        Raises:
          ValueError: layers or rows are no multiple of what they are dealt out to.
        """
        number = self.parts(stages)
        if layers % (stages * self.rounds):
            raise ValueError(
                f"{layers} layers are not divisible by mesh.stage={stages} x compute.pipeline.rounds={self.rounds}; "
                "change one"
            )
        if number % stages:
            raise ValueError(f"compute.pipeline.microbatches={number} is not a multiple of mesh.stage={stages}")
        if rows % (number * parts):
            raise ValueError(
                f"{rows} rows are not divisible by {number} microbatches (compute.pipeline) x {parts} parts of each "
                f"(mesh: data x fsdp x expert); use a multiple of {number * parts}, or fewer "
                f"microbatches, a multiple of mesh.stage={stages}: compute.pipeline.microbatches={stages}"
            )


class ComputeConfig(Config):
    """How the same model is computed: precision and memory, nothing that changes what it is."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="activations and matrix products; auto = bfloat16 on TPU and GPU, float32 on CPU"
    )
    remat: Literal["none", "dots", "offload", "full"] = Field(
        "none",
        description="what the backward pass recomputes: nothing, all but matrix products (offload: which wait in the "
        "host's memory), or the whole block",
    )
    layers: Literal["auto", "scan", "unroll"] = Field(
        "auto", description="compile one block and loop, or all blocks; auto = unroll on CPU up to 16 layers, else scan"
    )
    kernel: Kernel = Field(
        "auto",
        description="of attention: cudnn for NVIDIA GPUs, splash for TPUs, xla for all; auto = the platform's, or xla "
        "where that cannot do what the model asks",
    )
    loss_chunk: int = Field(512, ge=1, description="tokens of a row whose logits exist at one time, in training")
    pipeline: Pipeline = Field(Pipeline(), description="how rows go through the stages of a mesh that has some")

    def elsewhere(self) -> "ComputeConfig":
        """Return what a model that was trained so is read with: the kernel was for that machine, and that mesh."""
        return self.model_copy(update={"kernel": "auto"})

    def resolve(self, platform: str, n_layers: int) -> "ComputeConfig":
        """Replace each auto by the choice for `platform` ("cpu", "gpu", "tpu")."""
        dtype = ("float32" if platform == "cpu" else "bfloat16") if self.dtype == "auto" else self.dtype
        layers = (
            ("unroll" if platform == "cpu" and n_layers <= 16 else "scan") if self.layers == "auto" else self.layers
        )
        return self.model_copy(update={"dtype": dtype, "layers": layers})
