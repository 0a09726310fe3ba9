"""Optimizers: directions from gradients at learning rate one; the step multiplies by the schedule."""

import jax
import optax
import optax.contrib

from jaxllm.core.tree import map_named
from jaxllm.training.config import AdamW, Muon
from jaxllm.training.moments import scale_by_compact_adam


def optimizer(config: AdamW | Muon) -> optax.GradientTransformation:
    """Return the transformation from gradients to updates at learning rate one (already negated)."""
    clip = optax.clip_by_global_norm(config.clip)
    if isinstance(config, AdamW):
        # Weight decay is for matrices: never for biases, norm scales and the gates of ReZero.
        exempt = ("bias", "/scale", "/sinks", "_gate")
        decayed = lambda params: map_named(lambda name, _: not name.endswith(exempt), params)
        rates = config.b1, config.b2, config.eps
        exact = config.moments == "float32"
        adam = optax.scale_by_adam(*rates) if exact else scale_by_compact_adam(*rates, config.moments)
        return optax.chain(clip, adam, optax.add_decayed_weights(config.weight_decay, mask=decayed), optax.scale(-1.0))
    muon = optax.contrib.muon(
        config.matrix_lr, beta=config.momentum, weight_decay=config.weight_decay, mu_dtype=config.moments,
        adam_b2=config.b2, adam_learning_rate=1.0, muon_weight_dimension_numbers=_muon_dimensions,
    )  # fmt: skip
    return optax.chain(clip, muon)


def _muon_dimensions(params: optax.Params) -> optax.Params:
    """Say which axes of each block matrix are inputs and outputs; None = not a matrix of a block, left to AdamW.

    Heads and head_dim form one side of the matrix, and the leading layer axis is a batch of matrices.
    """

    def dimensions(name: str, leaf: jax.Array) -> optax.contrib.MuonDimensionNumbers | None:
        if "/experts/" in name and not name.endswith("bias"):  # as layers are, experts are a batch of matrices
            return optax.contrib.MuonDimensionNumbers((2,), (3,))
        if not ("blocks/" in name and name.endswith("/kernel")):
            return None
        axes = tuple(range(1, leaf.ndim))
        n_inputs = 2 if "/o/" in name else 1  # attention's output projection reads [heads, head_dim]
        return optax.contrib.MuonDimensionNumbers(axes[:n_inputs], axes[n_inputs:])

    return map_named(dimensions, params)
