"""Tokenizers of encoders: a text or a pair of texts becomes ids with the special tokens of its model around them.

The rules are the checkpoint's own: its tokenizer.json, or a vocab.txt, cut as BERT cuts it (WordPiece). This is apart
from `tokenizers.tokenizer`, whose tokenizers leave special tokens to whoever builds a sequence.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxllm.core import files
from jaxllm.data.tokenizers import tokenizer as tokenizers
from jaxllm.data.tokenizers.fast_export import surrounded, to_json
from jaxllm.data.tokenizers.fast_pieces import name_of, read_source
from jaxllm.data.tokenizers.text_pieces import Encoded, Text, TextPieces, is_texts, too_long
from jaxllm.data.tokenizers.tokenizer import MASKS, PAD, Tokenizer

ROLES = {"pad": ("[PAD]", PAD), "mask": MASKS, "eos": ("</s>", "[SEP]")}


class PairTokenizer:
    """A tokenizer.json whose post-processor puts special tokens around one text or two.

    Args:
      source: content of the file.
      settings: tokenizer_config.json; names special tokens, and is passed on by `save`.
    Raises:
      ValueError: it has no token for padding.

    Attributes:
      size: number of ids. pad_id, mask_id, eos_id: of the special tokens; None where there is none, but pad_id.
      mask: how a text spells the mask. original: the tokenizer of a run that it was made from.
    """

    def __init__(self, source: str, settings: Mapping[str, Any], original: Tokenizer | None = None):
        from tokenizers import Tokenizer

        self.source, self.settings, self.original = source, dict(settings), original
        self._model = Tokenizer.from_buffer(source.encode("utf-8"))
        self._model.no_padding()
        self._model.no_truncation()
        self.size = max(self._model.get_vocab().values()) + 1
        _, pad_id = self._special("pad")
        if pad_id is None:
            raise ValueError("the tokenizer has no padding token ([PAD] or <pad>); name it in tokenizer_config.json")
        self.pad_id = pad_id
        self.mask, self.mask_id = self._special("mask")
        self.eos_id = self._special("eos")[1]

    def _special(self, role: str) -> tuple[str, int | None]:
        named = name_of(self.settings.get(f"{role}_token"))
        for name in (named, *ROLES[role]):
            if name is not None and (token := self._model.token_to_id(name)) is not None:
                return name, token
        return "", None

    def encode(
        self, texts: Sequence[Text], longest: int, *, truncate: bool = False, special: bool = False
    ) -> list[Encoded]:
        """Return texts and pairs as ids.

        Args:
          longest: most ids of one text, special tokens included.
          truncate: cut longer ones, pairs at the longer of their texts.
          special: a special token that a text spells is that token; else it is text like any other.
        Raises:
          ValueError: a text is longer and `truncate` is off.
        """
        self._model.encode_special_tokens = not special
        if truncate:
            self._model.enable_truncation(longest)
        try:
            found = self._model.encode_batch(list(texts))
        finally:
            self._model.no_truncation()
        for index, each in enumerate(found):
            if len(each.ids) > longest:
                raise too_long(index, len(each.ids), longest)
        return [Encoded(each.ids, each.type_ids) for each in found]

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Return the text of `ids`, with special tokens or without."""
        return self._model.decode([int(token) for token in ids], skip_special_tokens=not special)

    def save(self, directory: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json."""
        files.write_text(Path(directory) / "tokenizer.json", self.source)
        files.write_json(Path(directory) / "tokenizer_config.json", self.settings)


def surrounding(tokenizer: Tokenizer, *, bos: bool, mask: bool) -> PairTokenizer:
    """Return the tokenizer of a run as one that ends each text with eos.

    Args:
      bos: put bos before each text as well, as in documents. mask: the model has one (`Tokenizer.mask_id`).
    Raises:
      ValueError: as of `fast_export.to_json`.
    """
    names = {token: name for name, token in tokenizer.special.items()}
    named = lambda token: (names[token], token)
    source = json.loads(to_json(tokenizer))
    if not tokenizer.surrounds:  # else the file has rules of its own, for pairs of texts as well
        source["post_processor"] = surrounded([named(tokenizer.bos_id)] * bos, [named(tokenizer.eos_id)])
    settings = {"pad_token": names[tokenizer.pad_id], "eos_token": names[tokenizer.eos_id]}
    settings |= {"bos_token": names[tokenizer.bos_id]} if bos else {}
    if mask:
        settings["mask_token"] = names.get(tokenizer.mask_id, MASKS[1])
        if tokenizer.mask_id not in names:
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            source["added_tokens"].append({"id": tokenizer.mask_id, "content": MASKS[1], **flags, "special": True})
    settings |= {"clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    return PairTokenizer(json.dumps(source, ensure_ascii=False), settings, tokenizer)


def load(directory: str | Path, *, bos: bool = True, mask: bool = True) -> PairTokenizer:
    """Load the tokenizer of a Hugging Face directory, or that of a run by `surrounding`.

    Raises:
      FileNotFoundError: no tokenizer is there.
    """
    directory = Path(directory)
    settings = files.read_json(directory / "tokenizer_config.json", {})
    if files.read_json(directory / "tokenizer.json", {"model": True}).get("model") is None:
        return surrounding(tokenizers.load(directory), bos=bos, mask=mask)
    if source := read_source(directory):
        try:
            return PairTokenizer(source, settings)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from error
    raise FileNotFoundError(
        f"{directory} has no tokenizer.json and no vocab.txt, nor, of an encoder-decoder, spiece.model or source.spm; "
        "save the tokenizer with transformers once, which writes tokenizer.json"
    )


def load_for_pairs(directory: str | Path) -> PairTokenizer | TextPieces:
    """Load the tokenizer of an encoder-decoder: of its Hugging Face directory, or of its run."""
    return TextPieces(directory) if is_texts(directory) else load(directory, bos=False, mask=False)
