"""How much faster the loader is than training, and what a step waits for it.

    python tools/bench/loader_speed.py DATASET [DATASET ...] --shape 15M --steps 20

Batches alone, read as fast as they come, against a run of the same data, mixture and row length. DATASET: a directory
that `prepare` wrote.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from machine import describe
from shapes import BATCHES, OPTIMIZER, SHAPES

from jaxllm.data.loader import Loader
from jaxllm.data.shards import read_manifest
from jaxllm.recipe import Recipe
from jaxllm.wiring import train


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datasets", nargs="+")
    parser.add_argument("--shape", choices=SHAPES, default="15M")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batches", type=int, default=2000)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    sys.stdout.write(json.dumps(describe()) + "\n")
    with tempfile.TemporaryDirectory() as directory:
        recipe = Recipe(
            out=f"{directory}/run", steps=arguments.steps, optim=OPTIMIZER,
            model={**shape, "vocab_size": read_manifest(arguments.datasets[0]).vocab_size},
            data={
                "sources": [{"path": path} for path in arguments.datasets], "batch_size": BATCHES[arguments.shape],
                "packing": {"seq_len": shape["max_seq_len"], "long": "drop"},
            },
            monitor={"log_every": arguments.steps, "evaluate_batches": 1},
        )  # fmt: skip
        loader = Loader(recipe.data)
        next(loader)
        start = time.perf_counter()
        for _ in range(arguments.batches):
            next(loader)
        alone = (time.perf_counter() - start) / arguments.batches
        train(recipe)
        timing = next(
            record for line in Path(recipe.out, "timing.jsonl").read_text().splitlines()
            if "step_s" in (record := json.loads(line))
        )  # fmt: skip
    step, wait = timing["step_s"], timing["data_wait_s"]
    sys.stdout.write(
        f"a batch {alone * 1e3:.3f} ms, a step {step * 1e3:.1f} ms: {step / alone:.0f} batches in the time of a step\n"
        f"of a step, {wait * 1e3:.3f} ms ({wait / step:.2%}) are waiting for the data\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
