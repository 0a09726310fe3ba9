"""Training throughput against plain PyTorch, paired: A B A B ... between two persistent processes.

    python tools/bench/train_speed.py --shape 15M --steps 5 --pairs 10 --out results/train_15M.json

Both sides start from equal weights and see equal batches, so that --parity can show that they compute the same thing.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from machine import compare, describe, report, warn
from shapes import BATCHES, SHAPES
from workers import Worker, add_arguments, peer_environment


def main() -> int:
    """Measure, print, write."""
    arguments = _parser().parse_args()
    shape = {
        **SHAPES[arguments.shape],
        "tie_embeddings": not arguments.untied and SHAPES[arguments.shape]["tie_embeddings"],
    }
    rows = arguments.rows or BATCHES[arguments.shape]
    machine = describe()
    settings = {"task": "train", "shape": shape, "rows": rows, "steps": 1000}
    peer_settings = {**settings, "compile": arguments.compile, "threads": arguments.threads}
    ours = Worker(arguments.python, "jax_worker.py", {**settings, "devices": arguments.devices})
    peer = Worker(arguments.peer_python, "torch_worker.py", peer_settings, peer_environment(arguments))
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "weights.npz")
        counts = ours.call("save", path=path), peer.call("load", path=path)
    if counts[0] != counts[1]:
        raise ValueError(f"the models differ: {counts}")
    parity = _parity(peer, ours, arguments.parity)
    tokens = rows * shape["max_seq_len"]
    sys.stdout.write(
        f"shape {arguments.shape}: {counts[0]['parameters'] / 1e6:.2f}M parameters, {tokens} tokens/step\n"
        "pair     torch tok/s  cpu-s/step  foreign      jaxllm tok/s  cpu-s/step  foreign    ratio wall   cpu\n"
    )
    blocks = []
    for pair in range(arguments.pairs):
        a, b = (worker.measure("run", steps=arguments.steps) for worker in (peer, ours))
        blocks.append({"torch": a, "jaxllm": b})
        cells = "   ".join(
            f"{tokens * arguments.steps / x['wall_s']:12,.0f} {x['cpu_s'] / arguments.steps:10.3f}  {x['foreign']:7.0%}"
            for x in (a, b)
        )
        sys.stdout.write(f"{pair:4d} {cells}   {a['wall_s'] / b['wall_s']:10.3f} {a['cpu_s'] / b['cpu_s']:5.3f}\n")
        sys.stdout.flush()
    for worker in (peer, ours):
        worker.close()
    result = {
        "machine": machine, "versions": {"torch": peer.versions, "jaxllm": ours.versions},
        "shape": shape, "rows": rows, "steps_per_block": arguments.steps, "parity": parity,
        "speed": _speed(blocks, tokens * arguments.steps), "blocks": blocks,
    }  # fmt: skip
    for key, value in result["speed"].items():
        sys.stdout.write(f"{key}: {value}\n")
    warn([x["foreign"] for block in blocks for x in block.values()], arguments.omp_wait_policy)
    report(result, arguments.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", choices=tuple(SHAPES), default="3M", help="model and sequence length (default: %(default)s)"
    )
    parser.add_argument("--rows", type=int, help="rows per step (default: that of the shape)")
    parser.add_argument("--untied", action="store_true", help="a head of its own instead of the embedding table")
    parser.add_argument("--steps", type=int, default=5, help="steps per block (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of blocks (default: %(default)s)")
    parser.add_argument(
        "--parity", type=int, default=4, metavar="N", help="first N >= 1 steps, compared and not timed (default: 4)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile for the peer")
    parser.add_argument("--threads", type=int, help="threads of torch (default: all cores)")
    parser.add_argument("--devices", type=int, help="virtual CPU devices of jaxllm (default: the product's choice)")
    add_arguments(parser)
    return parser


def _parity(peer: Worker, ours: Worker, steps: int) -> dict:
    """Train `steps` steps on each side from equal weights on equal data (which also compiles); compare the losses."""
    a, b = (worker.call("run", steps=steps)["losses"] for worker in (peer, ours))
    difference = max(abs(x - y) for x, y in zip(a, b, strict=True))
    sys.stdout.write(f"loss of torch {a[0]:.6f} ... {a[-1]:.6f}, of jaxllm {b[0]:.6f} ... {b[-1]:.6f}\n")
    sys.stdout.write(f"largest difference in {steps} steps: {difference:.1e}\n")
    if difference > 1e-3:
        raise ValueError(f"the two sides do not compute the same: losses {a} and {b}")
    return {"torch": a, "jaxllm": b, "largest_difference": difference}


def _speed(blocks: list[dict], tokens: int) -> dict:
    """Medians per side, and how many times faster jaxllm is, as the median of the pairs."""
    speed: dict = {}
    for key in ("wall_s", "cpu_s"):
        a, b = ([block[side][key] for block in blocks] for side in ("torch", "jaxllm"))
        speed[f"ratio_{key.removesuffix('_s')}"] = compare(a, b)
    for side in ("torch", "jaxllm"):
        speed[f"{side}_tokens_per_s"] = tokens / statistics.median(block[side]["wall_s"] for block in blocks)
    speed["foreign_share"] = statistics.median(x["foreign"] for block in blocks for x in block.values())
    return speed


if __name__ == "__main__":
    sys.exit(main())
