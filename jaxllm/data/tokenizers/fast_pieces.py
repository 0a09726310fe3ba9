"""Piece models of Hugging Face: any `tokenizer.json`, run by the `tokenizers` library."""

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxllm.core import files
from jaxllm.data.tokenizers.pieces import SPACE_MARK

# BERT's names, where tokenizer_config.json has no others.
NAMES = {"unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "pad": "[PAD]", "mask": "[MASK]"}


class FastPieces:
    """A `tokenizer.json`; text never becomes a special token, as everywhere here.

    Args:
      source: content of the file.
    Raises:
      ValueError: it is none.

    Attributes:
      special: special tokens by name. prefix, suffix: ids that the file puts before a text (its bos, if it has one),
        and behind it.
    """

    kind = "tokenizers"

    def __init__(self, source: str):
        from tokenizers import Tokenizer

        self.source = source
        self.files = (("huggingface.json", source.encode("utf-8")),)
        self._raw = json.loads(source)
        if "model" not in self._raw:
            raise ValueError("not a tokenizer.json of Hugging Face: it has no model")
        self._model = Tokenizer.from_buffer(source.encode("utf-8"))  # unlike from_str it raises a ValueError
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True
        self.size = max(self._model.get_vocab().values()) + 1
        self.special = {each["content"]: each["id"] for each in self._raw["added_tokens"] if each["special"]}
        with_special, plain = (self._model.encode("a", add_special_tokens=add).ids for add in (True, False))
        start = next(i for i in range(len(with_special) + 1) if with_special[i : i + len(plain)] == plain)
        self.prefix, self.suffix = tuple(with_special[:start]), tuple(with_special[start + len(plain) :])

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [each.ids for each in self._model.encode_batch(list(texts), add_special_tokens=False)]

    def encode_whole(self, text: str) -> tuple[list[int], list[int]]:
        """Return (ids, the character each begins at) of a text in which special tokens are tokens."""
        self._model.encode_special_tokens = False
        try:
            found = self._model.encode(text, add_special_tokens=False)
        finally:
            self._model.encode_special_tokens = True
        return found.ids, [min(start, len(text) - 1) for start, _ in found.offsets]

    def bytes_of(self, token: int) -> bytes:
        return self._table[token]

    @cached_property
    def leading_space(self) -> bool:
        """Whether the model puts a space before every text, which decoding takes away."""
        prepends = lambda each: each["type"] == "Metaspace" and each.get("prepend_scheme", "always") != "never"
        strips = lambda each: each["type"] == "Strip" and each["content"] == " " and each["start"] == 1
        return any(prepends(each) or strips(each) for each in self._decoders)

    @property
    def _decoders(self) -> list[dict[str, Any]]:
        decoder = self._raw.get("decoder") or {"type": "none"}
        return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]

    @cached_property
    def _table(self) -> list[bytes]:
        kinds = {each["type"] for each in self._decoders}
        pieces = {token: piece for piece, token in self._model.get_vocab().items()}
        table = [self._bytes(pieces.get(token, ""), kinds) for token in range(self.size)]
        for each in self._raw["added_tokens"]:
            table[each["id"]] = b"" if each["special"] else each["content"].encode("utf-8")
        return table

    def _bytes(self, piece: str, kinds: set[str]) -> bytes:
        if "ByteLevel" in kinds:
            return b"".join(_BYTES[character] if character in _BYTES else character.encode() for character in piece)
        if "ByteFallback" in kinds and len(piece) == 6 and piece.startswith("<0x"):
            return bytes([int(piece[3:5], 16)])
        if "WordPiece" in kinds:
            return piece.removeprefix("##").encode() if piece.startswith("##") else f" {piece}".encode()
        return piece.replace(SPACE_MARK, " ").encode("utf-8")


def read_source(directory: Path) -> str | None:
    """Return the `tokenizer.json` of a Hugging Face directory, or one of BERT's or GPT-2's own files; None: neither."""
    if (directory / "tokenizer.json").is_file():
        return (directory / "tokenizer.json").read_text(encoding="utf-8")
    if (directory / "vocab.txt").is_file():
        return word_pieces(directory / "vocab.txt", files.read_json(directory / "tokenizer_config.json", {}))
    vocabulary, merges = directory / "vocab.json", directory / "merges.txt"
    if not (vocabulary.is_file() and merges.is_file()):
        return None
    kind = files.read_json(directory / "config.json", {}).get("model_type", "gpt2")
    if kind != "gpt2":
        raise ValueError(
            f"{directory} has vocab.json and merges.txt, but no tokenizer.json: how {kind} cuts text before it merges "
            "is not in these files; save the tokenizer with transformers once, which writes tokenizer.json"
        )
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    model = Tokenizer(models.BPE.from_file(str(vocabulary), str(merges)))
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    model.add_special_tokens(["<|endoftext|>"])
    return model.to_str()


def word_pieces(vocabulary: Path, settings: Mapping[str, Any]) -> str:
    """Return the tokenizer.json of a WordPiece vocabulary, one piece a line, as BERT cuts text.

    Args:
      settings: do_lower_case (default: true), strip_accents (default: as do_lower_case), tokenize_chinese_chars
        (default: true), and the names of special tokens.
    Raises:
      ValueError: a special token is not in the vocabulary.
    Source: Wu et al. 2016 (WordPiece); Devlin et al. 2019.
    """
    from tokenizers.implementations import BertWordPieceTokenizer
    from tokenizers.models import WordPiece

    names = {role: name_of(settings.get(f"{role}_token")) or name for role, name in NAMES.items()}
    pieces = WordPiece.read_file(str(vocabulary))
    if missing := [name for name in names.values() if name not in pieces]:
        raise ValueError(f"{vocabulary} lacks {', '.join(missing)}; name the special tokens in tokenizer_config.json")
    model = BertWordPieceTokenizer(
        pieces, lowercase=settings.get("do_lower_case", True), strip_accents=settings.get("strip_accents"),
        handle_chinese_chars=settings.get("tokenize_chinese_chars", True),
        **{f"{role}_token": name for role, name in names.items()},
    )  # fmt: skip
    return json.dumps(json.loads(model.to_str()), ensure_ascii=False)


def name_of(token: str | Mapping[str, Any] | None) -> str | None:
    """Return the text of a special token, which tokenizer_config.json may describe at length."""
    return token["content"] if isinstance(token, Mapping) else token


# The printable character that byte-level BPE writes for each byte. Source: GPT-2's encoder.
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTABLE]
_BYTES = {chr(byte): bytes([byte]) for byte in _PRINTABLE} | {
    chr(256 + i): bytes([byte]) for i, byte in enumerate(_OTHERS)
}
