"""What an encoder-decoder writes of held-out sources, against the targets that are right: BLEU."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from jaxllm.data.pairs import Sides
from jaxllm.data.tokenizer import Tokenizer

# A Chinese or Japanese character, another run of letters and digits, or a sign.
_WORDS = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+|[^\w\s]")


def evaluate_targets(model: Any, sides: Sequence[Sides], tokenizer: Tokenizer, count: int) -> dict[str, Any]:
    """Have the first `count` sources written, as the model's `search` and `sampler` say.

    Args:
      model: `jaxllm.EncoderDecoder`. tokenizer: of the data.
    Returns:
      bleu, correct (to the letter), pairs, and of the first five "examples" (source, right, written).
    """
    pairs = [each.of(document) for each in sides for document in range(len(each.sources))][:count]
    texts, right = ([tokenizer.decode(side) for side in every] for every in zip(*pairs, strict=True))
    longest = max(len(target) for _, target in pairs)
    room = model.config.room(1 + len(model.forced))
    limit = min(longest + longest // 2, room)  # another way to say it may be longer; and what never stops is cut
    found = [each.text for each in model.generate(texts, truncate=True, max_new_tokens=limit)]
    return {
        "bleu": bleu(found, right), "correct": sum(a == b for a, b in zip(found, right, strict=True)),
        "pairs": len(pairs), "examples": list(zip(texts, right, found, strict=True))[:5],
    }  # fmt: skip


def bleu(found: Sequence[str], right: Sequence[str]) -> float:
    """Return 100 BLEU over all texts together, with one right text for each; case counts.

    A Chinese or Japanese character is a word; 0 if no four words in a row are right.

    Source: Papineni et al. 2002, section 2.3.
    """
    pairs = [(_WORDS.findall(one), _WORDS.findall(other)) for one, other in zip(found, right, strict=True)]
    precisions = []
    for n in range(1, 5):
        counted = [(_runs(one, n), _runs(other, n)) for one, other in pairs]
        hits, written = sum((a & b).total() for a, b in counted), sum(a.total() for a, _ in counted)
        precisions.append(hits / max(written, 1))
    ratio = sum(len(other) for _, other in pairs) / max(sum(len(one) for one, _ in pairs), 1)
    return 100 * min(1.0, math.exp(1 - ratio)) * math.prod(precisions) ** 0.25


def _runs(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
