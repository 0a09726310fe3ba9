"""Attention by cuDNN's flash kernel for NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.layers.masks import Rule, Segments


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"],
    segments: Segments | None, rule: Rule,
) -> Float[Array, "B T N H"]:  # fmt: skip
    """Return the attention output of whole rows, in bfloat16.

    Segments become a mask that is written out, [B, 1, T, S]: the kernel adds it to scores, which it does not write.
    What the causal mask or the window hides is still skipped.
    """
    rows, same = q.shape[1], None
    if segments is not None:  # with a mask, its gradient takes even lengths alone
        q, k, v = (_even(x, 0) for x in (q, k, v))
        own, others = (_even(x, -1) for x in segments)
        same = (own[:, :, None] == others[:, None, :])[:, None]
    window = None if rule.window is None else (rule.window - 1, 0)
    y = jax.nn.dot_product_attention(
        q, k, v, mask=same, scale=rule.scale, is_causal=rule.causal, local_window_size=window, implementation="cudnn"
    )
    return y[:, :rows]


def _even(x: Array, value: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), *((0, 0),) * (x.ndim - 2)), constant_values=value)
