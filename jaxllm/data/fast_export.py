"""Our tokenizers as a `tokenizer.json`, so that other programs read them."""

import json
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import TYPE_CHECKING, Any

from jaxllm.data.fast_pieces import FastPieces
from jaxllm.data.pieces import BytePieces, SentencePieces

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
    constant = json.loads(resources.files(__package__).joinpath("fast_export.json").read_text("utf-8"))
    names = {token: name for name, token in tokenizer.special.items()}
    bos = names[tokenizer.bos_id]
    special, text = {"SpecialToken": {"id": bos, "type_id": 0}}, lambda name: {"Sequence": {"id": name, "type_id": 0}}
    description = constant["tokenizer"] | {
        "added_tokens": [
            {"id": token, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True} for token, name in sorted(names.items())
        ],
        "normalizer": None if isinstance(pieces, BytePieces) else constant["space"],
        "post_processor": {
            "type": "TemplateProcessing", "single": [special, text("A")],
            "pair": [special, text("A"), special, text("B")],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "model": _model(pieces, tokenizer.special, constant["bpe"]),
    }  # fmt: skip
    return json.dumps(description, ensure_ascii=False)


def _model(pieces: BytePieces | SentencePieces, special: dict[str, int], bpe: dict[str, Any]) -> dict[str, Any]:
    if isinstance(pieces, BytePieces):
        vocabulary = special | {f"<0x{byte:02X}>": pieces.reserved + byte for byte in range(256)}
        return bpe | {"vocab": vocabulary, "merges": []}
    words, scores = pieces.scored()
    unknown = pieces.id_of("unk")
    if all(score.is_integer() for score in scores):  # the rank of a BPE piece, or the logarithm of a frequency
        ids = {word: token for token, word in enumerate(words)}
        unk_token = None if unknown is None else words[unknown]
        return bpe | {"vocab": ids, "merges": merges_of(ids, words), "unk_token": unk_token}
    # The library would find control and byte pieces in a text that spells them, were they not made worthless.
    text = lambda word, token: token not in special.values() and not re.fullmatch("<0x[0-9A-F]{2}>", word)
    pairs = enumerate(zip(words, scores, strict=True))
    vocabulary = [(word, score if text(word, token) else NEVER) for token, (word, score) in pairs]
    return {"type": "Unigram", "unk_id": unknown, "byte_fallback": True, "vocab": vocabulary}


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
