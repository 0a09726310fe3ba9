"""What an encoder-decoder writes of held-out sources, against the targets that are right: BLEU."""

import re
from collections.abc import Sequence
from typing import Any

from jaxllm.data.pairs import Sides
from jaxllm.data.tokenizers.tokenizer import Tokenizer


def evaluate_targets(model: Any, sides: Sequence[Sides], tokenizer: Tokenizer, count: int) -> dict[str, Any]:
    """Have the first `count` sources written, as the model's `search` and `sampler` say.

    Args:
      model: `jaxllm.EncoderDecoder`. tokenizer: of the data.
    Returns:
      bleu, bleu_signature (of sacrebleu), correct (to the letter), pairs, and of the first five "examples" (source,
      right, written).
    """
    pairs = [each.of(document) for each in sides for document in range(len(each.sources))][:count]
    texts, right = ([tokenizer.decode(side) for side in every] for every in zip(*pairs, strict=True))
    longest = max(len(target) for _, target in pairs)
    room = model.config.room(1 + len(model.forced))
    limit = min(longest + longest // 2, room)  # another way to say it may be longer; and what never stops is cut
    found = [each.text for each in model.generate(texts, truncate=True, max_new_tokens=limit)]
    score, signature = bleu(found, right)
    return {
        "bleu": score, "bleu_signature": signature, "correct": sum(a == b for a, b in zip(found, right, strict=True)),
        "pairs": len(pairs), "examples": list(zip(texts, right, found, strict=True))[:5],
    }  # fmt: skip


def bleu(found: Sequence[str], right: Sequence[str]) -> tuple[float, str]:
    """Return (BLEU of all texts together, what it was computed by), with one right text for each; case counts.

    Words are mteval's (13a), a Chinese character is one too (zh), and where there is Japanese, each character (char).

    Source: Papineni et al. 2002; Post 2018, whose sacrebleu it is.
    """
    from sacrebleu.metrics import BLEU

    text = "".join(right)
    words = "char" if re.search("[\u3040-\u30ff]", text) else "zh" if re.search("[\u3400-\u9fff]", text) else "13a"
    metric = BLEU(tokenize=words)
    return metric.corpus_score(found, [right]).score, str(metric.get_signature())
