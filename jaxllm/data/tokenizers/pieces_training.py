"""Training of SentencePiece models: a bounded, evenly spread sample of any stream of texts, then one call."""

import heapq
import io
import random
import re
from collections.abc import Iterable
from typing import Literal

from pydantic import Field

from jaxllm.core.config import Config
from jaxllm.data.chat import BOS, EOS, ROLE_TOKENS

_CONTROL = {"pad": "<pad>", "bos": BOS, "eos": EOS, "unk": "<unk>"}  # in the order of their ids
MAX_LINE_CHARS = 1000  # SentencePiece drops lines over max_sentence_length = 4192 bytes; 4 bytes per character at most
# SentencePiece silently drops lines that hold NUL, tab or U+2585 and reads U+2581 as a space; none needs a piece of
# more than bytes.
_BREAK = re.compile("[\n\t\0\u2581\u2585]")


class TokenizerConfig(Config):
    """A SentencePiece tokenizer to train: lossless (identity normalisation, byte fallback) and with chat tokens."""

    kind: Literal["train"] = "train"
    algorithm: Literal["bpe", "unigram"] = Field("bpe", description="bpe trains 10 times faster, unigram codes shorter")
    vocab_size: int = Field(8192, ge=300, description="ids in all, with 7 special tokens, newline and 256 bytes")
    character_coverage: float = Field(
        0.9995,
        gt=0.9,
        le=1.0,
        description="share of the text's characters that get a piece; the rest goes through bytes",
    )
    split_digits: bool = Field(True, description="one piece per digit, so that numbers are always cut the same way")
    sample_bytes: int = Field(
        50_000_000,
        ge=1,
        description="train on about this many bytes, spread evenly over the texts (all, if there is less)",
    )


def train_pieces(texts: Iterable[str], config: TokenizerConfig) -> bytes:
    """Train and return the content of a `.model` file.

    Raises:
      ValueError: there is no text, or vocab_size is smaller than the alphabet of the text.
    """
    import sentencepiece  # here, so that --help of the commands stays fast

    whole = (line for text in texts for line in _BREAK.split(text))
    parts = (line[at : at + MAX_LINE_CHARS] for line in whole for at in range(0, len(line), MAX_LINE_CHARS))
    lines = sample(parts, config.sample_bytes)
    if not lines:
        raise ValueError("no text to train a tokenizer on: every document is empty; check the sources")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=config.algorithm,
            vocab_size=config.vocab_size,
            hard_vocab_limit=False,  # a small corpus gives a smaller vocabulary instead of a failure
            character_coverage=config.character_coverage,
            # The space: without a piece of its own, bytes would spell its mark, and decoding would show the mark.
            required_chars="\u2581",
            split_digits=config.split_digits,
            allow_whitespace_only_pieces=True,  # indentation
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            control_symbols=list(ROLE_TOKENS),
            **{f"{role}_id": token for token, role in enumerate(_CONTROL)},
            **{f"{role}_piece": piece for role, piece in _CONTROL.items()},
            num_threads=16,  # fixed: unigram training sums per thread, so the number of cores would change the model
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(_explain(str(error), config)) from error
    return model.getvalue()


def sample(lines: Iterable[str], limit_bytes: int) -> list[str]:
    """Keep the lines, or other texts, with the smallest random keys, at most `limit_bytes` together, in their order.

    A bottom-k sample: uniform over a stream of unknown length, memory bounded by the limit, the same for the same
    stream.
    """
    keys = random.Random(0)
    kept: list[tuple[float, int, str, int]] = []  # a heap whose top is the largest key
    total = 0
    for index, line in enumerate(lines):
        key, size = -keys.random(), len(line.encode("utf-8", errors="replace"))
        heapq.heappush(kept, (key, index, line, size))
        total += size
        while total > limit_bytes and len(kept) > 1:
            total -= heapq.heappop(kept)[3]
    return [line for _, _, line, _ in sorted(kept, key=lambda entry: entry[1]) if line]


def _explain(message: str, config: TokenizerConfig) -> str:
    if too_small := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", message):
        return (
            f"vocab_size={config.vocab_size} is too small: the special tokens, 256 bytes and the characters that cover "
            f"{config.character_coverage:.2%} of this text are {too_small[2]} ids; set vocab_size to at least that and "
            f"some thousands more, or lower character_coverage (characters without a piece are coded as bytes)"
        )
    return f"SentencePiece cannot train a {config.algorithm} model of {config.vocab_size} ids on this text: {message}"
