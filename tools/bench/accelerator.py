"""The real training step and the real decoder of a recipe on the accelerators of this machine, on random tokens.

    RECIPE=configs/llama2-7b/1xh200-pretrain.yaml
    python tools/bench/accelerator.py train $RECIPE optim.moments=float32 data.batch_size=4 step.accumulate=1
    python tools/bench/accelerator.py decode $RECIPE
    python tools/bench/accelerator.py train configs/quickstart/pretrain.yaml       to try the script on a CPU

`train` reports tokens/s, MFU and memory, beside the estimate and the compiler's figure; `decode`, with bfloat16 weights
and one row, the share of the memory bandwidth at which the weights are read. Both print one JSON object last.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from machine import describe

from jaxllm.core.batch import Batch
from jaxllm.inference.decode import Decoder, Limits, Request
from jaxllm.inference.sampling import Sampler
from jaxllm.models import accounting
from jaxllm.models.build import init_params
from jaxllm.planning.aot import Job, on_mesh
from jaxllm.planning.memory import expected
from jaxllm.recipe import Recipe, load_recipe
from jaxllm.sharding import distributed
from jaxllm.sharding.mesh import make_mesh, reader
from jaxllm.training.feed import place
from jaxllm.training.optim import optimizer
from jaxllm.training.state import init_state
from jaxllm.training.step import compile_step, device_bytes

# Bytes/s of the memory of one device, by the start of its kind ("TPU v5" is a v5p), from the makers' data sheets.
BANDWIDTH = {
    "NVIDIA H100": 3.35e12, "NVIDIA H200": 4.8e12, "TPU v4": 1.228e12, "TPU v5 lite": 0.819e12, "TPU v5": 2.765e12,
    "TPU v6 lite": 1.64e12,
}  # fmt: skip
LENGTHS = 32, 160  # new tokens of the two runs whose difference is timed


def main() -> int:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=("train", "decode"))
    parser.add_argument("recipe", help="a recipe; its data is not read")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="as of jaxllm.train")
    parser.add_argument("--steps", type=int, default=20, help="updates, or decoding runs, that are timed")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, arguments.overrides)
    distributed.start(recipe.platform, recipe.data.batch_size // recipe.step.accumulate)
    found = (train if arguments.task == "train" else decode)(recipe, arguments.steps)
    device = jax.devices()[0]
    stats = device.memory_stats() or {}
    found |= {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "peak_gb": stats.get("peak_bytes_in_use", 0) / 1e9,
    }
    sys.stdout.write(json.dumps({"machine": describe(), **found}, indent=2) + "\n")
    return 0


def train(recipe: Recipe, steps: int) -> dict:
    """Time `steps` updates, dispatched as the loop does, after two that warm up."""
    model, data, mesh = recipe.model, recipe.data, make_mesh(recipe.mesh)
    compute = recipe.compute.resolve(jax.default_backend(), model.n_layers)
    jax.set_mesh(mesh)
    state, shardings = init_state(
        model, optimizer(recipe.optim), mesh, seed=0, ema=recipe.step.ema_decay is not None, offload=recipe.step.offload
    )
    parts, count = reader(mesh)
    rows, length = data.batch_size * len(parts) // count, data.packing.seq_len
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (rows, length + 1), dtype=np.int32)
    ones, positions = np.ones((rows, length), np.int32), np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    local = Batch(tokens[:, :-1], tokens[:, 1:], ones.astype(np.float32), ones, positions)
    batch = jax.tree.map(functools.partial(place, mesh=mesh), local)
    losses: list[float] = []
    start, lr = time.perf_counter(), np.float32(1e-5)
    step = compile_step(model, compute, recipe.optim, recipe.step, shardings).lower(state, batch, lr).compile()
    compile_s = time.perf_counter() - start

    def run(count: int) -> float:
        nonlocal state
        start, metrics = time.perf_counter(), []
        for _ in range(count):
            state, found = step(state, batch, lr)
            metrics.append(found["loss"])
        losses.extend(map(float, metrics))
        return time.perf_counter() - start

    run(2)
    seconds = run(steps) / steps
    per_step = data.batch_size * length
    flops = accounting.flops_per_token(model, length) * per_step
    peak = accounting.peak_flops(jax.devices()[0].device_kind)
    job = Job(model, recipe.compute, recipe.optim, recipe.step, recipe.mesh, data.batch_size, length)
    estimate = expected(job, on_mesh(job, mesh), jax.default_backend())
    gb = lambda sizes: {name: size / 1e9 for name, size in sizes.items()}
    return {
        "compile_s": compile_s, "step_s": seconds, "tokens_per_s": per_step / seconds,
        "flops_per_token": flops / per_step, "mfu": peak and flops / seconds / peak / jax.device_count(),
        "loss": [losses[0], losses[-1]], "estimated_on_one_device_gb": gb(estimate),
        "by_the_compiler_gb": gb(device_bytes(step)),
    }  # fmt: skip


def decode(recipe: Recipe, runs: int) -> dict:
    """Time greedy decoding of one row: a token reads every weight once, but for the rows of the embedding table."""
    model = recipe.model
    narrow: Callable = lambda: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), init_params(model, 0))
    params = jax.jit(narrow)()
    decoder = Decoder(model, params, recipe.compute.resolve(jax.default_backend(), model.n_layers))

    def seconds(count: int) -> float:
        start = time.perf_counter()
        decoder.generate([Request([5, 6, 7])], Sampler(temperature=0.0), Limits(count))
        return time.perf_counter() - start

    few, many = LENGTHS
    first_s, _, _ = seconds(few), seconds(many), seconds(few)
    token_s = statistics.median((seconds(many) - seconds(few)) / (many - few) for _ in range(max(1, runs // 4)))
    looked_up = 0 if model.tie_embeddings else model.vocab_size * model.d_model
    read = 2 * (accounting.active_param_count(model) - looked_up)
    kind = jax.devices()[0].device_kind
    peak = next((value for name, value in BANDWIDTH.items() if kind.startswith(name)), None)
    return {
        "first_run_s": first_s, "token_ms": 1e3 * token_s, "read_gb_per_token": read / 1e9,
        "gb_per_s": read / token_s / 1e9, "bandwidth_share": peak and read / token_s / peak,
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
