"""Normalisation over the model width or head width, always computed in float32."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.layers.config import LayerNorm, RMSNorm
from jaxllm.layers.linear import constant


class Norm(nnx.Module):
    """The norm that `config` describes, over the last axis of size `width`."""

    def __init__(self, config: RMSNorm | LayerNorm, width: int):
        self.config = config
        self.scale = constant((width,), ("norm",), 1.0)
        self.bias = constant((width,), ("norm",), 0.0) if isinstance(config, LayerNorm) else None

    def __call__(self, x: Float[Array, "*B W"]) -> Float[Array, "*B W"]:
        # float32: a bfloat16 mean of squares loses the small channels.
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.config.eps)
        y = y * jnp.expand_dims(self.scale[...], tuple(range(x.ndim - 1)))
        if self.bias is not None:
            y = y + jnp.expand_dims(self.bias[...], tuple(range(x.ndim - 1)))
        return y.astype(x.dtype)
