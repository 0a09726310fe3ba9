"""Our tokenizers as a `tokenizer.json`, so that other programs read them."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from jaxllm.data.fast_pieces import FastPieces
from jaxllm.data.pieces import SPACE_MARK, BytePieces, SentencePieces

if TYPE_CHECKING:
    from jaxllm.data.tokenizer import Tokenizer

NEVER = -1e6  # logarithm of the frequency of a piece that no text may be cut into


def to_json(tokenizer: "Tokenizer") -> str:
    """Return a tokenizer.json that gives every text the ids that `tokenizer` gives it.

    Two exceptions: a literal U+2581 becomes a space, as in SentencePiece itself; and in a unigram model, a text that
    spells a special token with characters of which one is no piece (as "<" may be) becomes that token.

    Raises:
      ValueError: a SentencePiece model that was not trained here: its own rules for spaces and characters are in it.
    """
    pieces = tokenizer.pieces
    if isinstance(pieces, FastPieces):
        return pieces.source
    if isinstance(pieces, SentencePieces) and not pieces.escape_mark:
        raise ValueError("a SentencePiece model from elsewhere is passed on as tokenizer.model, not as tokenizer.json")
    names = {token: name for name, token in tokenizer.special.items()}
    bos = names[tokenizer.bos_id]
    return json.dumps(
        {
            "version": "1.0", "truncation": None, "padding": None,
            "added_tokens": [
                {"id": token, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": True} for token, name in sorted(names.items())
            ],
            "normalizer": _normalizer(pieces), "pre_tokenizer": None,
            "post_processor": {
                "type": "TemplateProcessing", "single": [_special(bos), _text("A")],
                "pair": [_special(bos), _text("A"), _special(bos), _text("B")],
                "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
            },
            "decoder": {
                "type": "Sequence", "decoders": [
                    {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}, {"type": "ByteFallback"},
                    {"type": "Fuse"},
                ],
            },
            "model": _model(pieces, tokenizer.special),
        },
        ensure_ascii=False,
    )  # fmt: skip


def _special(name: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": name, "type_id": 0}}


def _text(name: str) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": 0}}


def _normalizer(pieces: BytePieces | SentencePieces) -> dict[str, Any] | None:
    if isinstance(pieces, BytePieces):
        return None
    return {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}


def _model(pieces: BytePieces | SentencePieces, special: dict[str, int]) -> dict[str, Any]:
    bpe = {
        "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
    }  # fmt: skip
    if isinstance(pieces, BytePieces):
        vocabulary = special | {f"<0x{byte:02X}>": pieces.reserved + byte for byte in range(256)}
        return bpe | {"vocab": vocabulary, "merges": []}
    words, scores = pieces.scored()
    if not all(score.is_integer() for score in scores):  # the rank of a BPE piece, or the logarithm of a frequency
        # The library would find control and byte pieces in a text that spells them, were they not made worthless.
        text = lambda word, token: token not in special.values() and not re.fullmatch("<0x[0-9A-F]{2}>", word)
        vocabulary = [
            (word, score if text(word, token) else NEVER)
            for token, (word, score) in enumerate(zip(words, scores, strict=True))
        ]
        return {"type": "Unigram", "unk_id": pieces.id_of("unk"), "byte_fallback": True, "vocab": vocabulary}
    ids = {word: token for token, word in enumerate(words)}
    unknown = pieces.id_of("unk")
    return bpe | {
        "vocab": ids,
        "merges": merges_of(ids, words),
        "unk_token": None if unknown is None else words[unknown],
    }


def merges_of(ids: Mapping[str, int], order: Iterable[str]) -> list[tuple[str, str]]:
    """Return every pair whose union is a piece, as SentencePiece's BPE joins them.

    Args:
      order: the pieces, the first to be joined first.
    """
    merges: list[tuple[str, str]] = []
    for word in order:
        cuts = [(word[:i], word[i:]) for i in range(1, len(word))]
        known = [cut for cut in cuts if cut[0] in ids and cut[1] in ids]
        merges += sorted(known, key=lambda cut: (ids[cut[0]], ids[cut[1]]))
    return merges
