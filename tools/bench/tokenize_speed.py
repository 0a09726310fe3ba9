"""Tokenising: `Tokenizer.encode_batch` against SentencePiece's own batch encoding with the same model, in turns.

    python tools/bench/tokenize_speed.py --data ../shared/data --pairs 15 --out results/tokenize.json

Texts: English and Chinese lines; the same as documents of about 5,000 characters; and as documents of 400,000. Models:
BPE and unigram of 8,000 ids trained on them by us, and one of 32,000 from elsewhere. SentencePiece may use all cores.
The ids must be equal; in long documents, where unigram sums scores in single precision, all but one in a thousand.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from machine import busy_s, compare, describe, foreign_share, report, warn

from jaxllm.data.tokenizers import tokenizer
from jaxllm.data.tokenizers.pieces_training import TokenizerConfig

SETS = ("text/en/wikitext2_valid.txt", "text/zh/hongloumeng_400k.txt", "text/en/tinyshakespeare.txt")
CORES = len(os.sched_getaffinity(0))


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="directory of shared sets (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=15, help="pairs of runs (default: %(default)s)")
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    machine, data = describe(), Path(arguments.data)
    texts = [(data / name).read_text(encoding="utf-8") for name in SETS]
    lines = [line for text in texts for line in text.split("\n") if line.strip()]
    sizes = {"lines": lines}
    for name, characters in (("documents", 5_000), ("long documents", 400_000)):
        sizes[name] = [text[at : at + characters] for text in texts for at in range(0, len(text), characters)]
    models = {
        kind: tokenizer.train(lines, TokenizerConfig(algorithm=kind, vocab_size=8000)) for kind in ("bpe", "unigram")
    }
    models["mistral"] = tokenizer.load(data / "tokenizers/mistral_v1_32000.model")
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    sys.stdout.write(f"{megabytes:.1f} MB in {len(lines)} lines\n")
    sys.stdout.write(f"{'model, texts':25} SentencePiece MB/s   jaxllm MB/s   ratio of wall time   of CPU time\n")
    table, foreign = {}, []
    for kind, model in models.items():
        for name, documents in sizes.items():
            row = pairs(model, documents, arguments.pairs, foreign)
            table[f"{kind}, {name}"] = row
            speeds = [megabytes / statistics.median(row[side]["wall_s"]) for side in ("sentencepiece", "jaxllm")]
            ratios = "   ".join(
                "{median:5.2f} ({low:.2f} ... {high:.2f})".format(**row[key]) for key in ("wall", "cpu")
            )
            sys.stdout.write(f"{kind + ', ' + name:25} {speeds[0]:18.1f} {speeds[1]:13.1f}   {ratios}\n")
    warn(foreign, "PASSIVE")
    versions = {"peer": {"sentencepiece": version("sentencepiece")}}
    report({"machine": machine, "versions": versions, "table": table}, arguments.out)
    return 0


def pairs(model: tokenizer.Tokenizer, texts: list[str], count: int, foreign: list[float]) -> dict:
    """Time both sides in turns; the ids must be the same."""
    peer = model.pieces._model
    runs: dict[str, Callable[[], list[list[int]]]] = {
        "sentencepiece": lambda: peer.encode(texts, num_threads=CORES),
        "jaxllm": lambda: model.encode_batch(texts),
    }
    differing = total = 0
    for a, b in zip(*(run() for run in runs.values()), strict=True):
        differing += sum(x != y for x, y in zip(a, b, strict=True))
        total += len(a)
    if differing > total // 1000 or (differing and len(texts) > 100):
        raise AssertionError(f"{differing} of {total} ids differ")
    times: dict[str, dict[str, list[float]]] = {side: {"wall_s": [], "cpu_s": []} for side in runs}
    for _ in range(count):
        for side, run in runs.items():
            busy, cpu, start = busy_s(), time.process_time(), time.perf_counter()
            run()
            wall, used = time.perf_counter() - start, time.process_time() - cpu
            times[side]["wall_s"].append(wall)
            times[side]["cpu_s"].append(used)
            foreign.append(foreign_share(busy, used, wall))
    return times | {
        key: compare(*(times[side][f"{key}_s"] for side in ("sentencepiece", "jaxllm"))) for key in ("wall", "cpu")
    }


if __name__ == "__main__":
    sys.exit(main())
