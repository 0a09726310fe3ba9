"""Piece models: text to ids and an id to its bytes, below any notion of chat or files.

Two models: plain bytes, and SentencePiece; `fast_pieces` and `text_pieces` have others. Each has a `kind`, a `size`,
the `files` (names and contents) that a tokenizer directory keeps of it, `encode` (the ids of each text; never a control
id, whatever the text says) and `bytes_of` (UTF-8 bytes of an id, maybe part of a character; empty for control ids).
These bytes are the unit of decoding: joining them gives the text back exactly, so streaming and whole decoding are the
same operation.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from itertools import chain

SPACE_MARK = "\u2581"  # what SentencePiece writes for a space inside pieces
CHUNK_CHARS = 65_536  # SentencePiece needs about 90 bytes of memory per character of one call
_SAFE_CUT = re.compile(r"\n|(?<=[^ ]) (?=[^ ])")  # before a newline or a single space: no piece of ours reaches across


class BytePieces:
    """One id per UTF-8 byte, after `reserved` control ids: no training, no unknowns, 3 to 4 times longer sequences."""

    kind = "bytes"
    leading_space = False
    files = ()

    def __init__(self, reserved: int):
        self.reserved = reserved
        self.size = reserved + 256

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[byte + self.reserved for byte in text.encode("utf-8")] for text in texts]

    def bytes_of(self, token: int) -> bytes:
        return bytes([token - self.reserved]) if token >= self.reserved else b""


class SentencePieces:
    """A SentencePiece model file, trained here or elsewhere.

    Args:
      proto: content of the `.model` file.
      escape_mark: encode a literal U+2581 as its bytes, because SentencePiece alone would turn it into a space. True
        for models trained here, which are lossless by it; False for foreign models, which must give the ids that
        everybody else gets.
    Raises:
      ValueError: `proto` is not a SentencePiece model.
    """

    kind = "sentencepiece"

    def __init__(self, proto: bytes, escape_mark: bool):
        import sentencepiece  # here, so that --help of the commands stays fast

        self.proto, self.escape_mark = proto, escape_mark
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(proto)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model ({len(proto):,} bytes)") from error
        self.files = (("spm.model", proto),)
        self.size = self._model.vocab_size()
        first = self._model.encode("a", out_type=str)
        self.leading_space = bool(first) and first[0].startswith(SPACE_MARK)  # the model puts a space before every text

    @cached_property
    def control(self) -> dict[str, int]:
        """Control symbols (with <unk>) by name, in id order."""
        model = self._model
        return {model.id_to_piece(i): i for i in range(self.size) if model.is_control(i) or model.is_unknown(i)}

    def id_of(self, role: str) -> int | None:
        """Id of "pad", "bos", "eos" or "unk" as the model declares it."""
        model = self._model
        token = {"pad": model.pad_id, "bos": model.bos_id, "eos": model.eos_id, "unk": model.unk_id}[role]()
        return token if token >= 0 else None

    def scored(self) -> tuple[list[str], list[float]]:
        """Return the pieces and their scores, by id."""
        model = self._model
        return [model.id_to_piece(i) for i in range(self.size)], [model.get_score(i) for i in range(self.size)]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        if not self.escape_mark:
            return self._encode_all(list(texts))
        odd = {i: text for i, text in enumerate(texts) if len(text) > CHUNK_CHARS or SPACE_MARK in text}
        ids = self._encode_all(["" if i in odd else text for i, text in enumerate(texts)])
        mark = [self._byte_ids[byte] for byte in SPACE_MARK.encode("utf-8")] if odd else []
        for i, text in odd.items():
            for number, stretch in enumerate(text.split(SPACE_MARK)):
                ids[i] += mark if number else []
                ids[i] += chain.from_iterable(self._encode_all(_chunks(stretch)))
        return ids

    def _encode_all(self, parts: list[str]) -> list[list[int]]:
        try:
            # A list starts threads, which costs as much as encoding 10,000 characters.
            if sum(map(len, parts)) < CHUNK_CHARS:
                return [self._model.encode(part) for part in parts]
            return self._model.encode(parts, num_threads=-1)
        except RuntimeError as error:
            raise ValueError(f"SentencePiece cannot encode this; is there a lone surrogate in it? ({error})") from error

    def bytes_of(self, token: int) -> bytes:
        return self._table[token]

    @cached_property
    def _byte_ids(self) -> dict[int, int]:
        model = self._model
        return {int(model.id_to_piece(i)[3:5], 16): i for i in range(self.size) if model.is_byte(i)}

    @cached_property
    def _table(self) -> list[bytes]:
        table = [self._model.id_to_piece(i).replace(SPACE_MARK, " ").encode("utf-8") for i in range(self.size)]
        for token in self.control.values():
            table[token] = b""
        if (unknown := self.id_of("unk")) is not None:
            table[unknown] = self._model.decode([unknown]).encode("utf-8")
        for byte, token in self._byte_ids.items():
            table[token] = bytes([byte])
        return table


def _chunks(text: str) -> list[str]:
    """Cut a long text where no piece can reach across, so that memory does not grow with the document."""
    chunks, start = [], 0
    while len(text) - start > CHUNK_CHARS and (cut := _SAFE_CUT.search(text, start + CHUNK_CHARS)):
        chunks.append(text[start : cut.start()])
        start = cut.start()
    return [*chunks, text[start:]]
