"""Normalisation over the model width or head width, always computed in float32."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxllm.layers.config import LayerNorm, RMSNorm
from jaxllm.layers.linear import constant
from jaxllm.layers.tpu import gradient_once


class Norm(nnx.Module):
    """The norm that `config` describes, over the last axis of size `width`."""

    def __init__(self, config: RMSNorm | LayerNorm, width: int):
        self.config = config
        self.offset = config.offset if isinstance(config, RMSNorm) else 0.0
        self.scale = constant((width,), ("norm",), 1.0 - self.offset)
        self.bias = constant((width,), ("norm",), 0.0) if isinstance(config, LayerNorm) else None

    def __call__(self, x: Float[Array, "*B W"]) -> Float[Array, "*B W"]:
        # float32: a bfloat16 mean of squares loses the small channels.
        y = x.astype(jnp.float32)
        if self.bias is not None:
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        scale = self.scale[...] + self.offset if self.offset else self.scale[...]
        y = _scale_to_unit(y, self.config.eps) * jnp.expand_dims(scale, tuple(range(x.ndim - 1)))
        if self.bias is not None:
            y = y + jnp.expand_dims(self.bias[...], tuple(range(x.ndim - 1)))
        return gradient_once(y.astype(x.dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _scale_to_unit(x: Float[Array, "*B W"], eps: float) -> Float[Array, "*B W"]:
    """y = x r with r = 1 / sqrt(mean(x^2) + eps); dx = r (dy - y mean(y dy))."""
    return _unit_forward(x, eps)[0]


def _unit_forward(x: Array, eps: float) -> tuple[Array, tuple[Array, Array]]:
    r = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    y = x * r
    return y, (y, r)


def _unit_backward(eps: float, residuals: tuple[Array, Array], dy: Array) -> tuple[Array]:
    y, r = residuals
    # A product of rows, not a sum of products, which XLA would compute ten times slower on a CPU.
    inner = jnp.einsum("...w,...w->...", y, dy)[..., None] / y.shape[-1]
    return (r * (dy - y * inner),)


_scale_to_unit.defvjp(_unit_forward, _unit_backward)
