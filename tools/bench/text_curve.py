"""Validation bits per byte over training time on real text: `python -m jaxllm.train` against a nanoGPT-style loop.

    python -m jaxllm.prepare --pydocs --vocab-size 4096 --out data/pydocs
    python tools/bench/text_curve.py --data data/pydocs --shape 3M --seconds 300 --out results/curve_3M.json

Same shards, shape, rows, optimizer and time. The learning rate is constant after the warm-up, so that neither side has
to know how many steps it will manage. Each side's clock is its training time: compiling counts, validation does not.
The sides run one after the other, `--repeat` times in turns.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import ROOT, busy_s, describe, foreign_share, report, warn
from shapes import BATCHES, OPTIMIZER, SHAPES
from workers import add_arguments, peer_environment

Curve = list[dict[str, float]]  # step, elapsed_s, bits_per_byte


def run_torch(arguments: argparse.Namespace, vocab_size: int) -> tuple[Curve, dict]:
    """Train the peer and return its curve and how quiet the machine was."""
    command = [arguments.peer_python, str(ROOT / "tools/bench/torch_curve.py"), "--data", str(arguments.data)]
    command += ["--shape", arguments.shape, "--vocab-size", str(vocab_size), "--rows", str(arguments.rows)]
    command += ["--seconds", str(arguments.seconds), "--evaluate-every", str(arguments.evaluate_every)]
    command += ["--lr", str(arguments.lr), "--warmup", str(arguments.warmup)]
    environment = {**os.environ, **peer_environment(arguments)}
    with _Quietness() as quietness:
        lines = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return [json.loads(line) for line in lines.splitlines()], quietness.facts


def run_jaxllm(arguments: argparse.Namespace, vocab_size: int, directory: Path) -> tuple[Curve, dict]:
    """Train with the product's own command and stop it when its clock has run out; return as `run_torch`."""
    shape = {**SHAPES[arguments.shape], "vocab_size": vocab_size}
    optim = {**OPTIMIZER, "lr": arguments.lr, "schedule": {"kind": "cosine", "warmup": arguments.warmup, "final": 1.0}}
    recipe = {
        "out": str(directory / "run"), "model": shape, "optim": optim, "steps": 10**6,
        "data": {
            "sources": [{"path": str(arguments.data)}], "packing": {"seq_len": shape["max_seq_len"]},
            "batch_size": arguments.rows,
        },
        "checkpoint": {"every": 10**6},
        "monitor": {"log_every": 10, "evaluate_every": arguments.evaluate_every},
    }  # fmt: skip
    path = directory / "recipe.yaml"
    path.write_text(json.dumps(recipe))  # JSON is YAML
    command = [arguments.python, "-m", "jaxllm.train", str(path), *arguments.set]
    run = directory / "run"
    with _Quietness() as quietness:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and not _finished(_read(run), arguments.seconds):
            time.sleep(0.5)
        process.terminate()  # the product saves and leaves
        if process.wait() not in (0, 143):
            raise ValueError(f"{' '.join(command)} ended with status {process.returncode}; its error message is above")
    return _read(run), quietness.facts


class _Quietness:
    """Measures which share of the machine others used while a child process ran."""

    def __enter__(self) -> "_Quietness":
        self._busy, self._children, self._start = busy_s(), os.times(), time.perf_counter()
        return self

    def __exit__(self, *exception: object) -> None:
        now, before, wall_s = os.times(), self._children, time.perf_counter() - self._start
        own = sum(now[:4]) - sum(before[:4])
        self.facts = {"wall_s": wall_s, "cpu_s": own, "foreign": foreign_share(self._busy, own, wall_s)}


def _lines(path: Path) -> list[dict]:
    """Read JSON lines; one that is being written right now is left out."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def _finished(curve: Curve, seconds: float) -> bool:
    """Whether a validation at or after `seconds` is known, so that `at` has a point on both sides."""
    return bool(curve) and curve[-1]["elapsed_s"] >= seconds


def _read(run: Path) -> Curve:
    """Join the validation lines of metrics.jsonl with the clock of timing.jsonl."""
    clock = {line["step"]: line["elapsed_s"] for line in _lines(run / "timing.jsonl") if "elapsed_s" in line}
    points = [line for line in _lines(run / "metrics.jsonl") if "val_bits_per_byte" in line]
    triples = [
        (line["step"], clock[line["step"]], line["val_bits_per_byte"]) for line in points if line["step"] in clock
    ]
    return [{"step": step, "elapsed_s": elapsed, "bits_per_byte": bits} for step, elapsed, bits in triples]


def at(curve: Curve, seconds: float) -> float | None:
    """Return bits per byte after `seconds` of training, linear between validations; None outside of them."""
    for before, after in itertools.pairwise(curve):
        span = after["elapsed_s"] - before["elapsed_s"]
        part = (seconds - before["elapsed_s"]) / span if span else 1.0
        if 0.0 <= part <= 1.0:
            return before["bits_per_byte"] + part * (after["bits_per_byte"] - before["bits_per_byte"])
    return None


def _versions(python: str, packages: tuple[str, ...]) -> dict[str, str]:
    code = f"import importlib.metadata as m; print(*(m.version(name) for name in {packages}))"
    found = subprocess.run([python, "-c", code], stdout=subprocess.PIPE, text=True, check=True).stdout
    return dict(zip(packages, found.split(), strict=True))


def _table(curves: dict[str, Curve], seconds: float) -> str:
    """Bits per byte of both sides at eight equal times, and where each side ended."""
    lines = ["seconds   torch bits/byte   jaxllm bits/byte"]
    for part in range(1, 9):
        time_s = seconds * part / 8
        known = [at(curve, time_s) for curve in curves.values()]
        lines.append(f"{time_s:7.0f}" + "".join(f"{'-':>18}" if bits is None else f"{bits:18.4f}" for bits in known))
    for side, curve in curves.items():
        for last in curve[-1:]:
            lines.append(
                f"{side}: {last['step']} steps in {last['elapsed_s']:.1f} s, {last['bits_per_byte']:.4f} bits/byte"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run both, print bits per byte at equal times, write the curves."""
    arguments = _parser().parse_args()
    arguments.data = arguments.data.resolve()
    arguments.rows = arguments.rows or BATCHES[arguments.shape]
    vocab_size = json.loads((arguments.data / "manifest.json").read_text())["vocab_size"]
    versions = {
        "torch": _versions(arguments.peer_python, ("torch", "numpy")),
        "jaxllm": _versions(arguments.python, ("jax", "jaxlib", "optax", "numpy")),
    }
    result: dict = {
        "machine": describe(), "versions": versions, "shape": arguments.shape, "rows": arguments.rows, "runs": [],
    }  # fmt: skip
    for number in range(arguments.repeat):
        with tempfile.TemporaryDirectory() as directory:
            torch_curve, torch_facts = run_torch(arguments, vocab_size)
            our_curve, our_facts = run_jaxllm(arguments, vocab_size, Path(directory))
        curves, facts = {"torch": torch_curve, "jaxllm": our_curve}, {"torch": torch_facts, "jaxllm": our_facts}
        result["runs"].append({**curves, "facts": facts})
        sys.stdout.write(f"run {number}\n{_table(curves, arguments.seconds)}")
    warn([facts["foreign"] for run in result["runs"] for facts in run["facts"].values()], arguments.omp_wait_policy)
    report(result, arguments.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="dataset directory of jaxllm.prepare (kind text)")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="3M", help="model (the vocabulary is the data's)")
    parser.add_argument("--rows", type=int, help="rows per step (default: that of the shape)")
    parser.add_argument("--seconds", type=float, default=300, help="training time of each side (default: %(default)s)")
    parser.add_argument("--evaluate-every", type=int, default=50, help="steps between validations (%(default)s)")
    parser.add_argument("--lr", type=float, default=OPTIMIZER["lr"], help="learning rate (default: %(default)s)")
    parser.add_argument("--warmup", type=int, default=50, help="steps (default: %(default)s)")
    parser.add_argument("--repeat", type=int, default=1, help="how often, in turns (default: %(default)s)")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change jaxllm's recipe")
    add_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
