"""What differs from layer to layer of one stack beside the weights: how far a token sees, and how it is rotated."""

from itertools import cycle, islice
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from jaxllm.layers.config import Pattern, Rope
from jaxllm.layers.masks import LayerWindow, Mask
from jaxllm.layers.positions import rope_angles
from jaxllm.models.config import ModelConfig

Angles = tuple[Array, Array]


class Traits(NamedTuple):
    """Facts about one layer: Python's, or arrays where a loop runs over layers that differ."""

    windowed: bool | Bool[Array, ""]
    rotated: bool | Bool[Array, ""]


def layer_traits(config: ModelConfig) -> list[Traits]:
    """Return the traits of each layer, from the first."""
    spread = lambda pattern: islice(cycle(pattern), config.n_layers)
    windowed: Pattern = config.window.layers if config.window else (False,)
    skipped: Pattern = config.positions.skipped if isinstance(config.positions, Rope) else (True,)
    return [Traits(seen, not skips) for seen, skips in zip(spread(windowed), spread(skipped), strict=True)]


class Views:
    """The masks and rotary angles of one batch, each made once and handed to the layers that use it."""

    def __init__(self, config: ModelConfig, mask: Mask, positions: Int[Array, "B T"]):
        rope = config.positions
        self._mask = mask
        self._window = config.window.size if config.window else None
        width = config.rotary_width
        self._angles = rope_angles(positions, width, rope) if isinstance(rope, Rope) else None
        local = isinstance(rope, Rope) and rope.local_theta is not None
        self._local = rope_angles(positions, width, rope, local=True) if local else None

    def of(self, traits: Traits) -> tuple[Mask, Angles | None]:
        """Return the mask and the angles of a layer."""
        mask, angles = self._mask, self._angles
        if self._window is not None:
            size, on = self._window, traits.windowed
            mask = mask._replace(window=(size if on else None) if isinstance(on, bool) else LayerWindow(size, on))
        if angles is None or traits.rotated is False:
            return mask, None
        if self._local is not None:
            angles = tuple(_choose(traits.windowed, a, b) for a, b in zip(self._local, angles, strict=True))
        if traits.rotated is not True:  # the rotation by an angle of zero
            angles = jnp.where(traits.rotated, angles[0], 1.0), jnp.where(traits.rotated, angles[1], 0.0)
        return mask, angles


def _choose(flag: bool | Array, yes: Array, no: Array) -> Array:
    """Return `yes` or `no`: one of them now, or either in the loop."""
    if isinstance(flag, bool):
        return yes if flag else no
    return jnp.where(flag, yes, no)
