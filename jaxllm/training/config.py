"""What a recipe says about training: optimizer, update, checkpoints, monitoring. Without JAX: --help is quick."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from jaxllm.core.bucket import is_url
from jaxllm.core.config import Config
from jaxllm.training.schedules import Cosine, ScheduleConfig


class AdamW(Config):
    """Adam with decoupled weight decay. Source: Loshchilov and Hutter 2019."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    schedule: ScheduleConfig = Field(Cosine(), description="learning rate over the steps")
    b1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    b2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay of matrices, times the learning rate")
    clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    moments: Literal["float32", "bfloat16", "int8"] = Field(
        "float32",
        description="how the two moments are kept: 8, 4 or about 2 bytes per parameter (Dettmers et al. 2022)",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.moments == "bfloat16" and self.b2 > 0.99:
            raise ValueError(
                f"moments=bfloat16 loses changes below 1/256 of a number, and b2={self.b2:g} makes only such; set b2 "
                "to 0.99 or less, or moments to int8 or float32"
            )
        return self


class Muon(Config):
    """Muon on the matrices of the blocks, AdamW on embeddings, head, norms and biases. Source: Jordan et al. 2024."""

    kind: Literal["muon"] = "muon"
    lr: float = Field(3e-3, gt=0, description="peak learning rate of the AdamW part")
    matrix_lr: float = Field(5.0, gt=0, description="learning rate of the Muon part, as a multiple of lr")
    schedule: ScheduleConfig = Field(Cosine(), description="learning rate over the steps")
    momentum: float = Field(0.95, ge=0, lt=1, description="decay of Muon's momentum")
    b2: float = Field(0.98, ge=0, lt=1, description="decay of the second moment of the AdamW part")
    weight_decay: float = Field(0.05, ge=0, description="decoupled weight decay of the Muon part")
    clip: float = Field(1.0, gt=0, description="largest global gradient norm")
    moments: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of the momentum and of the first moment of the AdamW part"
    )


OptimConfig = Annotated[AdamW | Muon, Field(discriminator="kind")]


class Elbo(Config):
    """How a VAE is kept from ignoring its latent: annealing and free bits of the KL term, word dropout."""

    kl_weight: float = Field(1.0, ge=0, description="weight of the KL term; 1 = the evidence lower bound itself")
    warmup: int = Field(1000, ge=0, description="steps over which that weight rises from zero (Bowman et al. 2016)")
    period: int | None = Field(None, ge=1, description="steps until it rises again (Fu et al. 2019); none = once")
    free_bits: float = Field(0.0, ge=0, description="KL that each latent of a text may have for nothing, nats")
    word_dropout: float = Field(0.0, ge=0, lt=1, description="share of the tokens that the decoder does not see")
    seed: int = Field(0, ge=0, description="decides the noise of the latents and which tokens are not seen")


class Dropout(Config):
    """What is set to zero while training, of the embeddings and of what each part of a layer adds to the stream."""

    rate: float = Field(0.0, ge=0, lt=1, description="share of the numbers (Vaswani et al.: 0.1); 0 = off")
    seed: int = Field(0, ge=0, description="decides which ones, with the number of the step")


class StepConfig(Config):
    """What an update does beside the optimizer."""

    accumulate: int = Field(1, ge=1, description="microbatches per step; divides memory, changes a balance loss alone")
    z_loss: float = Field(0.0, ge=0, description="weight of the squared log-partition term (PaLM: 1e-4)")
    label_smoothing: float = Field(
        0.0, ge=0, lt=1, description="share of each target that is spread over the vocabulary (Vaswani et al.: 0.1)"
    )
    dropout: Dropout = Field(Dropout(), description="against learning a small text by heart")
    elbo: Elbo = Field(Elbo(), description="the loss of a VAE (model.latent)")
    ema_decay: float | None = Field(
        None, gt=0, lt=1, description="decay of a moving average of parameters, shorter at first; none = off"
    )
    spike_factor: float | None = Field(
        None, gt=1, description="skip a step whose gradient norm exceeds this many running means; none = only NaN, Inf"
    )
    offload: bool = Field(
        False,
        description="keep the optimizer's state in the host's memory (TPU, GPU), and move it for the update alone",
    )
    block_norms: bool = Field(False, description="write down the norms of gradient and update of each block")
    router_bias_step: float = Field(
        1e-3, ge=0, description="how far biases of experts move towards an even load, where model.ffn.biased"
    )


class FastConfig(Config):
    """Checkpoints that each host keeps for itself, beside the others: for crashes that it survives."""

    directory: str | None = Field(
        None, description="where, on every host, such as /dev/shm/jaxllm (its memory holds up to three); none = off"
    )
    every: int = Field(50, ge=1, description="steps between them; removed when the run ends in order")


class CheckpointConfig(Config):
    """When checkpoints are written and which are kept."""

    every: int = Field(500, ge=1, description="steps between checkpoints; the last step is always saved")
    fast: FastConfig = Field(FastConfig(), description="a second tier, saved more often")
    keep_last: int = Field(2, ge=1, description="most recent checkpoints to keep")
    keep_best: int = Field(
        1, ge=0, description="checkpoints of lowest validation loss (the last one before the save) to keep besides"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        where, every = self.fast.directory, self.fast.every
        if where is not None and is_url(where):
            raise ValueError(f"fast.directory={where} is in a bucket; give a directory that each host has for itself")
        if where is not None and every >= self.every:
            raise ValueError(f"fast.every={every} must be less than every={self.every}, or nothing there is ever newer")
        return self


class MonitorConfig(Config):
    """What is written down and looked at while training."""

    log_every: int = Field(10, ge=1, description="steps between lines in timing.jsonl, TensorBoard and on the screen")
    evaluate_every: int = Field(250, ge=1, description="steps between validation losses; the last step has one as well")
    evaluate_batches: int | None = Field(
        None, ge=1,
        description="validation batches; none = the whole split (bits per byte then counts bytes as its average does)",
    )  # fmt: skip
    sample_every: int = Field(500, ge=1, description="steps between sampled texts")
    prompts: tuple[str, ...] = Field((), description="texts to continue (or instructions to answer) as samples")
    sample_tokens: int = Field(64, ge=1, description="length of sampled texts, tokens")
    max_skipped: int = Field(5, ge=0, description="steps in a row that the guard may skip before the run stops")
    profile: str | None = Field(
        None,
        pattern=r"^[1-9]\d*:[1-9]\d*$",
        description='steps to trace with the profiler, such as "10:15" (RUN/profile)',
    )
    wandb: str | None = Field(
        None, description="project of Weights & Biases that gets what TensorBoard gets; none = off"
    )
    loss_spike: float | None = Field(
        6.0, gt=0, description="write down the documents of a step whose loss is so many standard deviations above the "
        "moving mean; none = never",
    )  # fmt: skip

    @property
    def profiled(self) -> tuple[int, int] | None:
        """First and last of the steps to trace."""
        first, _, last = (self.profile or "").partition(":")
        return (int(first), int(last)) if first else None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.profiled and self.profiled[0] > self.profiled[1]:
            raise ValueError(f"profile={self.profile} ends before it begins; give FIRST:LAST, such as 10:15")
        return self
