"""Near duplicates: recall and precision against brute-force Jaccard, and speed against datasketch, in turns.

    python tools/bench/dedup_speed.py --data ../shared/data --pairs 7 --out results/dedup.json

Real English and Chinese texts, every other one with a copy in which some words or characters were replaced, left out or
put in, so that similarities from 0.4 to 1 occur. The truth is the exact Jaccard similarity of all pairs of sets of
5-grams, made by other code than the library's (a regular expression and Python sets). datasketch has the same bands,
rows and permutations, xxhash as its hash function, and compares signatures as we do. One thread each. Then questions of
evaluation sets are put into documents, and looked for.
"""

import argparse
import json
import random
import re
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np
import xxhash
from datasketch import MinHash, MinHashLSH
from machine import busy_s, compare, describe, foreign_share, report, warn
from scipy.sparse import csr_matrix

from jaxllm.data.cleaning import dedup
from jaxllm.data.cleaning.decontaminate import DecontaminateConfig, Evaluation
from jaxllm.data.cleaning.dedup import DedupConfig

CONFIG = DedupConfig(near=True)
UNIT = re.compile(r"[\u3005-\u3007\u3040-\u30ff\u3400-\u9fff]|[^\W_\u3005-\u3007\u3040-\u30ff\u3400-\u9fff]+")
EDGES = (0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.01)


def main() -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="../shared/data", help="directory of shared sets (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=7, help="runs of each side (default: %(default)s)")
    parser.add_argument("--permutations", type=int, default=128, help="values in a signature (default: %(default)s)")
    parser.add_argument("--out", help="JSON file to write")
    arguments = parser.parse_args()
    global CONFIG
    CONFIG = CONFIG.model_copy(update={"permutations": arguments.permutations})
    result = {"machine": describe(), "versions": {"peer": {name: version(name) for name in ("datasketch", "xxhash")}}}
    result["versions"]["jaxllm"] = {"numpy": version("numpy")}
    for name, read in (("English", english), ("Chinese", chinese)):
        texts = with_copies(read(Path(arguments.data)), glue=" " if name == "English" else "")
        result[name] = {"quality": quality(texts), "speed": speed(texts, arguments.pairs)}
        show(name, result[name])
    result["decontamination"] = decontamination(Path(arguments.data))
    sys.stdout.write("\ndecontamination: ")
    sys.stdout.write(", ".join(f"{key} {value:.4g}" for key, value in result["decontamination"].items()) + "\n")
    warn([share for name in ("English", "Chinese") for share in result[name]["speed"]["foreign"]], "PASSIVE")
    report(result, arguments.out)
    return 0


def english(data: Path) -> list[str]:
    """News, paragraphs of Wikipedia, instructions and their answers."""
    lines = (data / "text/en/wikitext2_valid.txt").read_text(encoding="utf-8").split("\n")
    rows = jsonl(data / "classify/ag_news_train.jsonl")
    return [*lines, *(row["text"] for row in rows), *squad(data / "qa/xquad_en_32.json"), *alpaca(data, "en")]


def chinese(data: Path) -> list[str]:
    """A novel, paragraphs of Wikipedia, reviews, instructions and their answers."""
    lines = (data / "text/zh/hongloumeng_400k.txt").read_text(encoding="utf-8").split("\n")
    rows = jsonl(data / "classify/waimai_zh_train.jsonl")
    wiki = [*squad(data / "qa/xquad_zh_32.json"), *squad(data / "qa/cmrc2018_trial.json")]
    return [*lines, *(row["text"] for row in rows), *wiki, *alpaca(data, "zh")]


def jsonl(path: Path) -> list[dict]:
    """Rows of a file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def squad(path: Path) -> list[str]:
    """Contexts of a file in the format of SQuAD."""
    return [part["context"] for page in json.loads(path.read_text())["data"] for part in page["paragraphs"]]


def alpaca(data: Path, language: str) -> list[str]:
    """Instruction and answer of each row."""
    rows = jsonl(data / f"instruct/alpaca_{language}_500.jsonl")
    return [f"{row['instruction']}\n{row['output']}" for row in rows]


def with_copies(texts: list[str], glue: str) -> list[str]:
    """Return the texts of at least 10 units, and edited copies of every other one, shuffled."""
    rng = random.Random(0)
    texts = [text for text in texts if len(UNIT.findall(text)) >= 10]
    words = [unit for text in texts[::50] for unit in UNIT.findall(text)]
    copies = []
    for text in texts[::2]:
        units = UNIT.findall(text)
        for _ in range(round(rng.random() * 0.12 * len(units))):
            at = rng.randrange(len(units))
            units[at : at + rng.choice((0, 1, 1))] = rng.choice(([rng.choice(words)], [rng.choice(words)], []))
        copies.append(glue.join(units))
    texts += copies
    rng.shuffle(texts)
    return texts


def shingles(text: str) -> list[bytes]:
    """The n-grams of a text, for datasketch and for brute force."""
    units, size = UNIT.findall(text.lower()), CONFIG.ngram
    return ["\x1f".join(units[at : at + size]).encode() for at in range(max(1, len(units) - size + 1))]


def brute_force(texts: list[str], least: float) -> tuple[np.ndarray, np.ndarray]:
    """Return all pairs with at least this Jaccard similarity, int64[k, 2], and their similarities."""
    numbers: dict[bytes, int] = {}
    sets = [sorted({numbers.setdefault(each, len(numbers)) for each in shingles(text)}) for text in texts]
    sizes = np.array([len(each) for each in sets])
    ends = np.concatenate([[0], np.cumsum(sizes)])
    matrix = csr_matrix((np.ones(ends[-1], np.float32), np.concatenate(sets), ends), (len(texts), len(numbers)))
    both = (matrix @ matrix.T).tocoo()
    common = both.data / (sizes[both.row] + sizes[both.col] - both.data)
    wanted = (both.row < both.col) & (common >= least - 1e-6)
    return np.stack([both.row, both.col], axis=1)[wanted].astype(np.int64), common[wanted]


def ours(texts: list[str]) -> np.ndarray:
    """Return the first of each document's cluster."""
    return dedup.near_duplicates(dedup.signatures(texts, CONFIG), CONFIG, texts.__getitem__)


def datasketch(sets: list[list[bytes]]) -> np.ndarray:
    """The same by datasketch, with the usual loop: ask, then put in; and a union-find."""
    threshold, permutations = CONFIG.threshold, CONFIG.permutations
    index = MinHashLSH(threshold, permutations, params=tuple(dedup.bands(threshold, permutations)))
    root = list(range(len(sets)))
    seen = []
    for number, each in enumerate(sets):
        found = MinHash(permutations, hashfunc=xxhash.xxh32_intdigest)
        found.update_batch(each)
        for other in index.query(found):
            if found.jaccard(seen[other]) >= threshold:
                a, b = sorted((find(root, other), find(root, number)))
                root[b] = a
        index.insert(number, found, check_duplication=False)
        seen.append(found)
    return np.array([find(root, number) for number in range(len(sets))])


def find(root: list[int], number: int) -> int:
    """Return the smallest member known of a cluster."""
    while root[number] != number:
        root[number] = number = root[root[number]]
    return number


def quality(texts: list[str]) -> dict:
    """Compare what is found with brute force: pairs, and documents dropped."""
    pairs, common = brute_force(texts, EDGES[0])
    true = common >= CONFIG.threshold - 1e-6
    truth = dedup.join(np.arange(len(texts)), pairs[true]) != np.arange(len(texts))
    rows = dedup.signatures(texts, CONFIG)
    keys = dedup.band_keys(rows, CONFIG)
    near = (keys[pairs[:, 0]] == keys[pairs[:, 1]]).any(axis=1)
    alike = near & (dedup.similarity(rows, pairs) >= CONFIG.threshold)
    count, size = dedup.bands(CONFIG.threshold, CONFIG.permutations)
    loose = CONFIG.model_copy(update={"verify": False})
    dropped = {
        "ours": ours(texts),
        "ours, signatures alone": dedup.near_duplicates(rows, CONFIG),
        "ours, verify off": dedup.near_duplicates(rows, loose),
        "datasketch": datasketch([shingles(text) for text in texts]),
    }
    curve = []
    for low, high in pairwise(EDGES):
        here = (common >= low) & (common < high)
        if here.any():
            expected = (1 - (1 - common[here] ** size) ** count).mean()
            curve.append((low, int(here.sum()), *(float(x) for x in (expected, near[here].mean(), alike[here].mean()))))
    return {
        "documents": len(texts), "megabytes": sum(len(text.encode()) for text in texts) / 1e6,
        "pairs at the threshold": int(true.sum()), "duplicates": int(truth.sum()),
        "pairs sharing a band": float(near[true].mean()), "pairs kept": float(alike[true].mean()),
        "precision of pairs kept": float(true[alike].mean()),
        "least similarity of a pair kept": float(common[alike].min()),
        "curve": curve,
        "documents dropped": {
            name: {"recall": float(found[truth].mean()), "precision": float(truth[found].mean()), "n": int(found.sum())}
            for name, first in dropped.items()
            for found in [first != np.arange(len(texts))]
        },
    }  # fmt: skip


def speed(texts: list[str], pairs: int) -> dict:
    """Time both from texts, and datasketch also with its n-grams given, in turns."""
    ready = [shingles(text) for text in texts]
    runs: dict[str, Callable[[], object]] = {
        "datasketch": lambda: datasketch([shingles(text) for text in texts]),
        "datasketch, n-grams given": lambda: datasketch(ready),
        "ours": lambda: ours(texts),
    }
    wall: dict[str, list[float]] = {name: [] for name in runs}
    foreign = []
    ours(texts[:10])  # builds tables, once for a process
    for _ in range(pairs):
        for name, run in runs.items():
            busy, cpu, start = busy_s(), time.process_time(), time.perf_counter()
            run()
            wall[name].append(time.perf_counter() - start)
            if name == "datasketch":
                foreign.append(foreign_share(busy, time.process_time() - cpu, wall[name][-1]))
    ratios = {name: compare(seconds, wall["ours"]) for name, seconds in wall.items() if name != "ours"}
    return {"wall_s": wall, "ratio": ratios, "foreign": foreign}


def decontamination(data: Path) -> dict:
    """Put questions of evaluation sets, in capitals or without punctuation, into documents, and find them again."""
    rng = random.Random(0)
    asked = [("gsm8k", row["question"]) for row in jsonl(data / "instruct/gsm8k_train_2500.jsonl")]
    contexts: set[str] = set()
    for name in ("xquad_en_32", "xquad_zh_32", "cmrc2018_trial"):
        pages = json.loads((data / f"qa/{name}.json").read_text())["data"]
        asked += [(name, q["question"]) for page in pages for part in page["paragraphs"] for q in part["qas"]]
        contexts.update(squad(data / f"qa/{name}.json"))
    clean = [text for text in (*english(data), *chinese(data)) if text.strip()]
    texts, put = list(clean), {}
    plain = str.maketrans(dict.fromkeys(",.?!，。？！", " "))
    for index in rng.sample(range(len(texts)), 1000):
        put[index] = rng.choice(asked)
        question = put[index][1]
        disguised = rng.choice((question, question.upper(), question.translate(plain)))
        texts[index] += f"{rng.choice((' ', chr(10)))}{disguised}{rng.choice((' ', chr(10)))}{clean[-index][:50]}"
    evaluation = Evaluation(asked, DecontaminateConfig())
    start = time.perf_counter()
    left = [evaluation.leave(text) for text in texts]
    seconds = time.perf_counter() - start
    wanted = {index for index, (_, question) in put.items() if len(UNIT.findall(question)) >= 8}
    hits = {index: found[0].split(", ") for index, found in enumerate(left) if isinstance(found, tuple)}
    others = hits.keys() - put.keys()
    return {
        "questions put in that are looked for": len(wanted),
        "found": len(wanted & hits.keys()),
        "under their source": sum(put[index][0] in hits[index] for index in wanted & hits.keys()),
        "other documents reported": len(others),
        "of them paragraphs that a question is about": sum(clean[index] in contexts for index in others),
        "megabytes per second": sum(len(text.encode()) for text in texts) / 1e6 / seconds,
    }


def show(name: str, result: dict) -> None:
    """Print the tables of one script."""
    found = result["quality"]
    say = sys.stdout.write
    say(
        f"\n{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items() if not hasattr(value, "__len__"))
    )
    say("\nsimilarity from   pairs   S-curve   share a band   and kept\n")
    for low, count, *shares in found["curve"]:
        say(f"{low:15.2f} {count:7d}   " + "   ".join(f"{share:9.4f}" for share in shares) + "\n")
    for who, each in found["documents dropped"].items():
        say(f"{who:25} dropped {each['n']:6d}: recall {each['recall']:.4f}, precision {each['precision']:.4f}\n")
    for who, seconds in result["speed"]["wall_s"].items():
        median = statistics.median(seconds)
        say(f"{who:25} {median:7.3f} s  {found['megabytes'] / median:7.1f} MB/s\n")
    for who, ratio in result["speed"]["ratio"].items():
        say(f"ours is faster than {who}: {ratio['median']:.1f} times ({ratio['low']:.1f} ... {ratio['high']:.1f})\n")


if __name__ == "__main__":
    sys.exit(main())
