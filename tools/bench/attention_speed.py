"""python tools/bench/attention_speed.py: the attention kernels of this machine's accelerator, by length of rows.

Each is compared with the plain one, output and gradients, and then timed, forward and backward. One line of JSON per
length, kernel and kind of rows; TFLOP/s count what a causal mask shows: 7 T (T + 1) H a head (2 products of
2 T (T + 1) H / 2 forward and 5 backward).
"""

import argparse
import functools
import json
import statistics
import time

import jax
import jax.numpy as jnp
import machine
import numpy as np

from jaxllm.layers.kernels import Scores, attend
from jaxllm.layers.masks import CausalMask

DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}


def gradients(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, *, kernel: str, window: int | None
) -> tuple[jax.Array, ...]:
    """Return the output and the gradients of the sum of its squares."""
    mask, scores = CausalMask(segments, window), Scores(q.shape[-1] ** -0.5, kernel=kernel)
    total = lambda *x: (jnp.sum(jnp.square(y := attend(*x, mask, scores).astype(jnp.float32))), y)
    (_, y), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
    return y, *grads


def measure(kernel: str, arrays: tuple[jax.Array | None, ...], window: int | None, repeats: int) -> dict[str, object]:
    """Return milliseconds, TFLOP/s, and the largest difference from the plain kernel, relative to its largest value."""
    run, plain = (jax.jit(functools.partial(gradients, kernel=each, window=window)) for each in (kernel, "xla"))
    try:
        found = jax.block_until_ready(run(*arrays))
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        return {"error": str(error)[:300]}
    expected = plain(*arrays) if kernel != "xla" else found
    off = lambda x, y: float(jnp.max(jnp.abs(x.astype(jnp.float32) - y)) / jnp.max(jnp.abs(y.astype(jnp.float32))))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run(*arrays))
        times.append(time.perf_counter() - start)
    seconds, (batch, length, heads, width) = statistics.median(times), arrays[0].shape
    flops = 7 * batch * heads * length * (length + 1) * width
    differences = [round(off(x, y), 5) for x, y in zip(found, expected, strict=True)]
    return {"ms": 1e3 * seconds, "tflops": flops / seconds / 1e12, "off_y_dq_dk_dv": differences}


def main() -> None:
    """Print the lines."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    arguments.add_argument("--tokens", type=int, default=16_384, help="in all rows")
    arguments.add_argument("--heads", type=int, nargs=3, default=[32, 8, 128], metavar=("N", "K", "H"))
    arguments.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    arguments.add_argument("--repeats", type=int, default=10)
    given = arguments.parse_args()
    device, (heads, groups, width) = jax.devices()[0], given.heads
    kernels = ["xla", *{"tpu": ["splash"], "gpu": ["cudnn"]}.get(device.platform, [])]
    print(json.dumps({"device": device.device_kind, "jax": jax.__version__, **machine.describe()}))
    for length in given.lengths:
        batch = max(1, given.tokens // length)
        draw = functools.partial(np.random.default_rng(0).standard_normal, dtype=np.float32)
        shapes = [(batch, length, n, width) for n in (heads, groups, groups)]
        arrays = tuple(jnp.asarray(draw(shape), DTYPES[given.dtype]) for shape in shapes)
        packed = jnp.asarray(np.sort(np.random.default_rng(1).integers(1, 5, (batch, length)), axis=-1), jnp.int32)
        for name, segments, window in (("one text", None, None), ("packed", packed, None), ("window", None, 1024)):
            for kernel in kernels:
                line = {"length": length, "rows": batch, "mask": name, "kernel": kernel}
                print(json.dumps(line | measure(kernel, (*arrays, segments), window, given.repeats)), flush=True)


if __name__ == "__main__":
    main()
