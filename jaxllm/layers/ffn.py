"""Position-wise feed-forward layers."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.layers.config import Gated, Plain
from jaxllm.layers.linear import Projection
from jaxllm.layers.tpu import computed_once, gradient_once
from jaxllm.sharding.rules import constrain

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}


class Ffn(nnx.Module):
    """The feed-forward layer that `config` describes, d_model -> d_ff -> d_model."""

    def __init__(
        self, rngs: nnx.Rngs, config: Gated | Plain, *, d_model: int, d_ff: int, bias: bool = False,
        std: float = 0.02, out_std: float = 0.02,
    ):  # fmt: skip
        wide, narrow = {"mlp": d_ff}, {"embed": d_model}
        self.activation = config.activation
        self.gate = Projection(rngs, narrow, wide, bias=bias, std=std) if isinstance(config, Gated) else None
        self.up = Projection(rngs, narrow, wide, bias=bias, std=std)
        self.down = Projection(rngs, wide, narrow, bias=bias, std=out_std)

    def join(self) -> None:
        """Hold up in gate, as one projection, and down with its longer lines."""
        if self.gate is not None:
            self.gate.join(self.up)
            self.up = None
        self.down.turn()

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        activation = ACTIVATIONS[self.activation]
        with jax.named_scope("ffn"):
            if self.gate is None:
                hidden = activation(self.up(x))
            else:
                gate, up = jnp.split(self.gate(x), 2, axis=-1) if self.up is None else (self.gate(x), self.up(x))
                gate, up = gradient_once((gate, up))
                hidden = activation(gate) * up
            return self.down(constrain(computed_once(hidden), "batch", "length", "mlp"))
