"""Learning rate as a function of the step.

Plain numbers on the host: the rate is an argument of the compiled step, so that another schedule or a longer run does
not compile again.
"""

import math
from typing import Annotated, Literal

from pydantic import Field

from jaxllm.core.config import Config

WARMUP = "steps of linear warm-up from zero, or below 1 their share of all steps"


class Cosine(Config):
    """Linear warm-up, then half a cosine down to `final`. Source: Loshchilov and Hutter 2017, SGDR."""

    kind: Literal["cosine"] = "cosine"
    warmup: float = Field(100, ge=0, description=WARMUP)
    final: float = Field(0.1, ge=0, le=1, description="last learning rate as a fraction of the peak")


class WarmupStableDecay(Config):
    """Linear warm-up, constant, then linear to `final` over the last part. Source: Hu et al. 2024, MiniCPM."""

    kind: Literal["wsd"] = "wsd"
    warmup: float = Field(100, ge=0, description=WARMUP)
    decay: float = Field(0.2, gt=0, le=1, description="share of all steps spent on the final decay")
    final: float = Field(0.0, ge=0, le=1, description="last learning rate as a fraction of the peak")


ScheduleConfig = Annotated[Cosine | WarmupStableDecay, Field(discriminator="kind")]


def warmup_steps(config: Cosine | WarmupStableDecay, steps: int) -> float:
    """Return for how many of `steps` the learning rate rises."""
    return min(config.warmup * (steps if config.warmup < 1 else 1), steps)


def learning_rate(config: Cosine | WarmupStableDecay, peak: float, step: int, steps: int) -> float:
    """Return the learning rate for update number `step` (0 = the first) of `steps`; constant after the last."""
    warmup = warmup_steps(config, steps)
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if isinstance(config, Cosine):
        progress = min(max((step - warmup) / max(1, steps - warmup), 0.0), 1.0)
        fall = config.final + (1 - config.final) * 0.5 * (1 + math.cos(math.pi * progress))
    else:
        length = max(1.0, config.decay * steps)
        progress = min(max((step - (steps - length)) / length, 0.0), 1.0)
        fall = 1.0 - (1.0 - config.final) * progress
    return peak * rise * fall
