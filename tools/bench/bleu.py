"""python tools/bench/bleu.py MODEL PAIRS.jsonl SOURCE TARGET: BLEU of greedy translations, of an encoder-decoder.

Corpus BLEU with one reference. Words are runs of letters and digits, and each other character is one; case counts.
"""

import argparse
import collections
import json
import math
import re

import jaxllm


def counted(words: list[str], n: int) -> collections.Counter:
    """Return how often each run of n words occurs."""
    return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def bleu(found: list[str], right: list[str]) -> float:
    """Return 100 BLEU. Source: Papineni et al. 2002, section 2.3, over the whole corpus."""
    cut = lambda text: re.findall(r"\w+|[^\w\s]", text)
    pairs = [(cut(one), cut(other)) for one, other in zip(found, right, strict=True)]
    precisions = []
    for n in range(1, 5):
        both = [(counted(one, n), counted(other, n)) for one, other in pairs]
        precisions.append(sum((a & b).total() for a, b in both) / sum(a.total() for a, _ in both))
    ratio = sum(len(other) for _, other in pairs) / sum(len(one) for one, _ in pairs)
    return 100 * min(1.0, math.exp(1 - ratio)) * math.prod(precisions) ** 0.25


def main() -> None:
    """Translate all sources; print BLEU, exact matches and the first few."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "pairs", "source", "target"):
        parser.add_argument(name)
    given = parser.parse_args()
    with open(given.pairs, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    sources, right = ([row[field] for row in rows] for field in (given.source, given.target))
    found = [each.text for each in jaxllm.load(given.model).generate(sources, max_new_tokens=80)]
    exact = sum(one == other for one, other in zip(found, right, strict=True))
    print(f"BLEU {bleu(found, right):.1f}, {exact} of {len(rows)} to the letter")
    for source, other, one in list(zip(sources, right, found, strict=True))[:5]:
        print(f"\n  {source}\n  {one}\n  (reference: {other})")


if __name__ == "__main__":
    main()
