"""Attention by cuDNN's flash kernel for NVIDIA GPUs, through `jax.nn.dot_product_attention`."""

import jax
from jaxtyping import Array, Float

from jaxllm.layers.masks import Rule, Segments, fill


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
        q, k, v = (fill(x, 2, 0) for x in (q, k, v))
        own, others = (fill(x, 2, -1) for x in segments)
        same = (own[:, :, None] == others[:, None, :])[:, None]
    window = None if rule.window is None else (rule.window - 1, 0)
    y = jax.nn.dot_product_attention(
        q, k, v, mask=same, scale=rule.scale, is_causal=rule.causal, local_window_size=window, implementation="cudnn"
    )
    return y[:, :rows]
