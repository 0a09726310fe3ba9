"""Greedy decoding of one row against Hugging Face generate, paired: A B A B ... between two persistent processes.

    python tools/bench/decode_speed.py --shape 15M --pairs 10 --out results/decode_15M.json

Equal (random) weights, equal prompt, no stop token; the time is that of the whole call, prefill included.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from machine import compare, describe, report, warn
from shapes import SHAPES, token_batch
from workers import Worker, add_arguments, peer_environment


def main() -> int:
    """Measure, print, write."""
    arguments = _parser().parse_args()
    shape, machine = SHAPES[arguments.shape], describe()
    if arguments.prompt + arguments.new_tokens > shape["max_seq_len"]:
        raise ValueError(
            f"--prompt + --new-tokens exceeds the {shape['max_seq_len']} positions of {arguments.shape}; lower them"
        )
    settings = {"task": "decode", "shape": shape}
    ours = Worker(arguments.python, "jax_worker.py", settings)
    peer_settings = {**settings, "threads": arguments.threads}
    peer = Worker(arguments.peer_python, "torch_worker.py", peer_settings, peer_environment(arguments))
    with tempfile.TemporaryDirectory() as directory:
        path = str(Path(directory) / "weights.npz")
        ours.call("save", path=path)
        peer.call("load", path=path)
    prompt = token_batch(0, 1, arguments.prompt - 1, shape["vocab_size"])[0].tolist()
    request = {"prompt": prompt, "new_tokens": arguments.new_tokens}
    first = [worker.call("run", **request)["tokens"] for worker in (peer, ours)]  # compiles
    equal = next((i for i, (a, b) in enumerate(zip(*first, strict=True)) if a != b), arguments.new_tokens)
    sys.stdout.write(f"the first {equal} of {arguments.new_tokens} tokens agree\n")
    sys.stdout.write("pair   HF tok/s   cpu-s  foreign   jaxllm tok/s   cpu-s  foreign   ratio wall   cpu\n")
    blocks = []
    for pair in range(arguments.pairs):
        a, b = (worker.measure("run", **request) for worker in (peer, ours))
        blocks.append({"huggingface": a, "jaxllm": b})
        cells = "   ".join(
            f"{arguments.new_tokens / x['wall_s']:10.1f}  {x['cpu_s']:6.3f}  {x['foreign']:7.0%}" for x in (a, b)
        )
        sys.stdout.write(f"{pair:4d} {cells}   {a['wall_s'] / b['wall_s']:10.3f} {a['cpu_s'] / b['cpu_s']:5.3f}\n")
        sys.stdout.flush()
    for worker in (peer, ours):
        worker.close()
    for block in blocks:
        for reply in block.values():
            del reply["tokens"]
    speed = {"agreeing_tokens": equal}
    for key in ("wall_s", "cpu_s"):
        a, b = ([block[side][key] for block in blocks] for side in ("huggingface", "jaxllm"))
        speed[f"ratio_{key.removesuffix('_s')}"] = compare(a, b)
    for side in ("huggingface", "jaxllm"):
        speed[f"{side}_tokens_per_s"] = arguments.new_tokens / statistics.median(
            block[side]["wall_s"] for block in blocks
        )
    for key, value in speed.items():
        sys.stdout.write(f"{key}: {value}\n")
    warn([x["foreign"] for block in blocks for x in block.values()], arguments.omp_wait_policy)
    versions = {"huggingface": peer.versions, "jaxllm": ours.versions}
    report({"machine": machine, "versions": versions, "shape": shape, "speed": speed, "blocks": blocks}, arguments.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=tuple(SHAPES), default="15M", help="model (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=32, help="prompt length, tokens (default: %(default)s)")
    parser.add_argument("--new-tokens", type=int, default=128, help="tokens to decode (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=10, help="pairs of calls (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="threads of torch (default: all cores)")
    add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
