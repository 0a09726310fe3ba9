"""Optimizers: directions from gradients at learning rate one; the step multiplies by the schedule."""

from typing import Annotated, Literal

import jax
import optax
import optax.contrib
from pydantic import Field

from jaxllm.core.config import Config
from jaxllm.core.tree import map_named, match
from jaxllm.training.schedules import Cosine, ScheduleConfig

# Weight decay is for matrices: never for biases and norm scales. First match wins.
DECAYED = ((r".*/(bias|scale)", False), (r".*", True))


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


OptimConfig = Annotated[AdamW | Muon, Field(discriminator="kind")]


def optimizer(config: AdamW | Muon) -> optax.GradientTransformation:
    """Return the transformation from gradients to updates at learning rate one (already negated)."""
    clip = optax.clip_by_global_norm(config.clip)
    if isinstance(config, AdamW):
        decayed = lambda params: map_named(lambda name, _: match(DECAYED, name), params)
        return optax.chain(
            clip,
            optax.scale_by_adam(config.b1, config.b2, config.eps),
            optax.add_decayed_weights(config.weight_decay, mask=decayed),
            optax.scale(-1.0),
        )
    muon = optax.contrib.muon(
        config.matrix_lr,
        beta=config.momentum,
        weight_decay=config.weight_decay,
        adam_b2=config.b2,
        adam_learning_rate=1.0,
        muon_weight_dimension_numbers=_muon_dimensions,
    )
    return optax.chain(clip, muon)


def _muon_dimensions(params: optax.Params) -> optax.Params:
    """Say which axes of each block matrix are inputs and outputs; None = not a matrix of a block, left to AdamW.

    Heads and head_dim form one side of the matrix, and the leading layer axis is a batch of matrices.
    """

    def dimensions(name: str, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        if not (name.startswith("blocks/") and name.endswith("/kernel")):
            return None
        axes = tuple(range(1, leaf.ndim))
        n_inputs = 2 if "/o/" in name else 1  # attention's output projection reads [heads, head_dim]
        return optax.contrib.MuonDimensionNumbers(axes[:n_inputs], axes[n_inputs:])

    return map_named(dimensions, params)
