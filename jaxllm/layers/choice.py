"""Which kernel computes an attention: what each of them can do, and why it cannot do the rest."""

import functools
import importlib.util
import sys
from typing import NamedTuple

import jax

from jaxllm.layers.config import KERNELS, Kernel

MASKED_ROWS = 8192  # the longest rows that a written-out mask, [B, T, S], is made for: 128 MB in bfloat16


class Asked(NamedTuple):
    """What is asked of a kernel.

    Attributes:
      platform: what the program is for: "cpu", "gpu" or "tpu".
      dtype: of queries, keys and values. length: of rows. width, value_width: of a head.
      segments: whether rows hold several texts, or padding.
      softcap, sinks, bias: whether scores have them.
      parts: how many devices share a row.
    """

    platform: str
    dtype: str
    length: int
    width: int
    value_width: int
    segments: bool
    softcap: bool = False
    sinks: bool = False
    bias: bool = False
    parts: int = 1


def choose(kernel: Kernel, asked: Asked) -> Kernel:
    """Return the kernel to use, "xla" where "auto" finds no better one; what it finds on accelerators is said once.

    Raises:
      ValueError: the kernel that is named cannot do it, or none can.
    """
    if kernel != "auto":
        if why := refusal(kernel, asked):
            raise ValueError(f"compute.kernel={kernel} cannot compute this attention: {why}; take auto")
        return kernel
    fast = {"tpu": "splash", "gpu": "cudnn"}.get(asked.platform)
    why = refusal(fast, asked) if fast else None
    if (why or not fast) and (other := refusal("xla", asked)):
        refused = f"{fast}: {why}; xla: {other}" if why else f"xla: {other}"
        raise ValueError(f"no kernel can compute this attention: {refused}")
    if fast:
        _say(f"attention on {asked.platform}: {fast if why is None else f'xla ({fast}: {why})'}")
    return "xla" if fast is None or why else fast


def refusal(kernel: Kernel, asked: Asked) -> str | None:
    """Return why a kernel cannot do what is asked, or None."""
    if kernel == "xla":
        return "a bias on scores, when devices share rows (mesh.context)" if asked.bias and asked.parts > 1 else None
    if asked.platform != KERNELS[kernel]:
        return f"it is for a {KERNELS[kernel]}, and this is a {asked.platform}"
    found = {"a bias on scores (relative positions)": asked.bias}
    if kernel == "splash" and asked.parts > 1:
        found[f"chunks of {asked.length} / {2 * asked.parts} tokens (multiples of 128 it does)"] = asked.length % (
            256 * asked.parts
        )
    if kernel == "cudnn":
        found |= {
            "scores with a softcap": asked.softcap,
            "sinks": asked.sinks,
            f"{asked.dtype} (compute.dtype=bfloat16 it can)": asked.dtype not in ("bfloat16", "float16"),
            f"heads of {asked.width} (multiples of 8 up to 128 it can)": asked.width % 8 or asked.width > 128,
            "values of another width than keys": asked.width != asked.value_width,
            f"several texts in rows of more than {MASKED_ROWS}": asked.segments and asked.length > MASKED_ROWS,
            "rows that devices share (mesh.context)": asked.parts > 1,
            "anything without JAX's CUDA plugin, which has cuDNN": not _has_cudnn(),
        }
    return next((f"it does not do {what}" for what, wrong in found.items() if wrong), None)


def _has_cudnn() -> bool:
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


@functools.cache
def _say(text: str) -> None:
    if jax.process_index() == 0:
        sys.stderr.write(f"{text}\n")
