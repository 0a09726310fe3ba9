"""The peer of text_curve.py: a nanoGPT-style loop in plain PyTorch over the token shards of a dataset directory.

Training rows are random windows of the token stream. Validation covers every target of the split exactly once: all
tokens but the first of each document, the same set that jaxllm sums over.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from shapes import OPTIMIZER, SHAPES
from torch_gpt import Gpt, GptConfig, learning_rate, make_optimizer, train_step

BOS = 1  # first token of each document


def stream(data: Path, split: str) -> np.ndarray:
    """Return all tokens of a split, int64 [n]."""
    return np.concatenate([np.load(path) for path in sorted((data / split).glob("*.tokens.npy"))]).astype(np.int64)


@torch.inference_mode()
def validate(model: Gpt, tokens: np.ndarray, rows: int) -> tuple[float, int]:
    """Return (mean nats per target, number of targets)."""
    length = model.config.max_seq_len
    n_rows = -(-(len(tokens) - 1) // length)
    padded = np.full(n_rows * length + 1, BOS)
    padded[: len(tokens)] = tokens
    inputs, targets = padded[:-1].reshape(n_rows, length), padded[1:].reshape(n_rows, length)
    targets = np.where(targets == BOS, -1, targets)
    nats = 0.0
    for start in range(0, n_rows, rows):
        part = targets[start : start + rows]
        count = int((part >= 0).sum())
        if count:
            loss = model(torch.from_numpy(inputs[start : start + rows]), torch.from_numpy(part))
            nats += float(loss) * count
    return nats / int((targets >= 0).sum()), int((targets >= 0).sum())


def main() -> int:
    """Train until the seconds are used up; print one JSON object per validation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="dataset directory of python -m jaxllm.prepare")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="3M")
    parser.add_argument("--vocab-size", type=int, required=True)
    parser.add_argument("--rows", type=int, required=True, help="rows per step")
    parser.add_argument("--seconds", type=float, required=True, help="training time, without validation")
    parser.add_argument("--evaluate-every", type=int, default=100, help="steps")
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--warmup", type=int, required=True, help="steps")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    model = Gpt(GptConfig(**{**SHAPES[arguments.shape], "vocab_size": arguments.vocab_size}))
    optimizer = make_optimizer(model, {**OPTIMIZER, "lr": arguments.lr})
    schedule = {"warmup": arguments.warmup, "final": 1.0}
    train, validation = stream(arguments.data, "train"), stream(arguments.data, "validation")
    split = json.loads((arguments.data / "manifest.json").read_text())["splits"]["validation"]
    bytes_per_token = split["trained_bytes"] / split["n_trained"]
    length = model.config.max_seq_len
    elapsed, step = 0.0, 0
    while elapsed < arguments.seconds:
        start = time.perf_counter()
        starts = rng.integers(0, len(train) - length, arguments.rows)
        rows = torch.from_numpy(np.stack([train[i : i + length + 1] for i in starts]))
        targets = rows[:, 1:].masked_fill(rows[:, 1:] == BOS, -1)  # jaxllm trains on no first token either
        lr = learning_rate(step, 10**9, arguments.lr, schedule)
        train_step(model, optimizer, rows[:, :-1], targets, lr, OPTIMIZER["clip"])
        step += 1
        elapsed += time.perf_counter() - start
        if step % arguments.evaluate_every == 0 or elapsed >= arguments.seconds:
            nats, n_targets = validate(model, validation, arguments.rows)
            if n_targets != split["n_trained"]:
                raise ValueError(
                    f"{n_targets} validation targets, {split['n_trained']} in the manifest: is BOS another id?"
                )
            bits = nats / math.log(2) / bytes_per_token
            sys.stdout.write(json.dumps({"step": step, "elapsed_s": elapsed, "bits_per_byte": bits}) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
