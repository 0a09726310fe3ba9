"""Where the memory of a device goes: what the shapes say, beside the figure of the compiler."""

import math
from typing import Any

import jax

from jaxllm.models import accounting
from jaxllm.planning.aot import Abstract, Job
from jaxllm.sharding.config import batch_parts

EXACT = ("parameters", "optimizer", "moving average")  # categories of `expected` that are no estimates


def of_device(tree: Any) -> float:
    """Return the bytes of a device's part of a tree of shapes with shardings."""
    part = lambda leaf: math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return float(sum(part(leaf) for leaf in jax.tree.leaves(tree)))


def expected(job: Job, parts: Abstract, kind: str) -> dict[str, float]:
    """Return bytes of a device by category, before anything is compiled.

    Parameters, optimizer and batch are exact; gradients are as parameters, or twice that: a sum over microbatches, and
    what is added to it. Activations and logits are the estimate of `accounting.activation_bytes` for the rows of a
    microbatch on a device. What of the optimizer lies in the host's memory does not count, but on a CPU.

    Args:
      kind: of the platform, such as "gpu".
    """
    sizes = parts.mesh.shape
    rows = max(1, job.rows // job.step.accumulate // batch_parts(sizes))
    compute = job.compute.resolve(kind, job.model.n_layers)
    square = kind != "tpu" or compute.kernel == "xla"  # plans for GPUs have XLA's attention
    guessed = accounting.activation_bytes(job.model, compute, rows, job.seq_len, square)
    parameters, shared = of_device(parts.state.params), sizes["tensor"] * sizes["context"]
    own = lambda leaf: kind == "cpu" or leaf.sharding.memory_kind != "pinned_host"
    found = {
        "parameters": parameters,
        "optimizer": of_device([leaf for leaf in jax.tree.leaves(parts.state.opt_state) if own(leaf)]),
        "moving average": of_device(parts.state.ema),
        "gradients": parameters * min(job.step.accumulate, 2),
        "activations": guessed["activations"] / shared,
        "logits": guessed["logits"] / shared,
        "batch": of_device(parts.batch),
    }
    return {name: size for name, size in found.items() if size}


def by_category(sizes: dict[str, float], total: float) -> dict[str, float]:
    """Return `expected` sizes with what the compiler needs besides as "temporary", so that the sum is its `total`.

    Where that is less than what is expected, the estimates were too large: of activations first, then of logits.
    """
    sizes = {**sizes, "temporary": max(0.0, total - sum(sizes.values()))}
    for name in ("activations", "logits", "gradients"):
        sizes[name] = max(0.0, sizes.get(name, 0.0) - max(0.0, sum(sizes.values()) - total))
    return {name: size for name, size in sizes.items() if size}
