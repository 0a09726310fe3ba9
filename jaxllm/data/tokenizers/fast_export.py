"""What a `tokenizer.json` is made of, and our tokenizers as one, so that other programs read them."""

import json
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.data.tokenizers.fast_pieces import FastPieces
from jaxllm.data.tokenizers.pieces import SPACE_MARK, BytePieces, SentencePieces

if TYPE_CHECKING:
    from jaxllm.data.tokenizers.tokenizer import Tokenizer

NEVER = -1e6  # logarithm of the frequency of a piece that no text may be cut into
BPE = {
    "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
    "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
}  # fmt: skip
SPACES_TO_MARKS = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE_MARK}
MARKS_TO_SPACES = {"type": "Replace", "pattern": {"String": SPACE_MARK}, "content": " "}
FALLBACK = [{"type": "ByteFallback"}, {"type": "Fuse"}]  # decoders of pieces that may be bytes


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
    return compose(
        dict(sorted(names.items())), names, [(names[tokenizer.bos_id], tokenizer.bos_id)], [],
        normalizer=None if isinstance(pieces, BytePieces) else SPACES_TO_MARKS,
        decoder={"type": "Sequence", "decoders": [MARKS_TO_SPACES, *FALLBACK]},
        model=_model(pieces, tokenizer.special),
    )  # fmt: skip


def compose(
    added: Mapping[int, str], special: Container[int], before: Sequence[tuple[str, int]],
    after: Sequence[tuple[str, int]], **parts: Any,
) -> str:  # fmt: skip
    """Return a tokenizer.json of its parts: model, normalizer, pre_tokenizer, decoder.

    Args:
      added: by id, tokens that are cut out of a text before all else; special: which of them text should not spell.
      before, after: (token, id) of what is put around a text.
    """
    tokens = [
        {"id": token, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": token in special} for token, text in added.items()
    ]  # fmt: skip
    around = surrounded(before, after)
    description = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": tokens}
    description |= {"normalizer": None, "pre_tokenizer": None, "decoder": None, "model": None} | parts
    return json.dumps(description | {"post_processor": around}, ensure_ascii=False)


def surrounded(before: Sequence[tuple[str, int]], after: Sequence[tuple[str, int]]) -> dict[str, Any] | None:
    """Return the post-processor that puts (token, id) around each text; None: nothing."""
    first, last = ([{"SpecialToken": {"id": text, "type_id": 0}} for text, _ in side] for side in (before, after))
    one, other = ([*first, {"Sequence": {"id": name, "type_id": 0}}, *last] for name in "AB")
    named = {text: {"id": text, "ids": [token], "tokens": [text]} for text, token in (*before, *after)}
    around = {"type": "TemplateProcessing", "single": one, "pair": one + other, "special_tokens": named}
    return around if named else None


def _model(pieces: BytePieces | SentencePieces, special: dict[str, int]) -> dict[str, Any]:
    bpe = BPE | {"fuse_unk": True, "byte_fallback": True}
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
