"""Piece models: text to ids and an id to its bytes, below any notion of chat or files.

Two models: plain bytes, and SentencePiece. An id's bytes are the unit of decoding: joining them gives the text back
exactly, also when one character is spread over several ids, so streaming and whole decoding are the same operation.
"""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

SPACE_MARK = "\u2581"  # what SentencePiece writes for a space inside pieces
CHUNK_CHARS = 65_536  # SentencePiece needs about 90 bytes of memory per character of one call
_SAFE_CUT = re.compile(r"\n|(?<=[^ ]) (?=[^ ])")  # before a newline or a single space: no piece of ours reaches across


class Pieces(Protocol):
    """What `Tokenizer` needs of a piece model."""

    kind: str
    size: int
    file: tuple[str, bytes] | None  # name and content of what a tokenizer directory keeps of it

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text; never a control id, whatever the text says."""

    def bytes_of(self, token: int) -> bytes:
        """UTF-8 bytes (maybe part of a character) that `token` stands for; empty for control ids."""


class BytePieces:
    """One id per UTF-8 byte, after `reserved` control ids: no training, no unknowns, 3 to 4 times longer sequences."""

    kind = "bytes"
    leading_space = False
    file = None

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

    def __init__(self, proto: bytes, escape_mark: bool):
        import sentencepiece  # here, so that --help of the commands stays fast

        self.proto = proto
        self.escape_mark = escape_mark
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(proto)
        except RuntimeError as error:
            raise ValueError(f"not a SentencePiece model ({len(proto):,} bytes): {error}") from error
        self.file = ("spm.model", proto)
        self.kind = "sentencepiece"
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
        token = {
            "pad": self._model.pad_id,
            "bos": self._model.bos_id,
            "eos": self._model.eos_id,
            "unk": self._model.unk_id,
        }[role]()
        return token if token >= 0 else None

    def scored(self) -> tuple[list[str], list[float]]:
        """Return the pieces and their scores, by id."""
        model = self._model
        return [model.id_to_piece(i) for i in range(self.size)], [model.get_score(i) for i in range(self.size)]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        mark = [self._byte_ids[byte] for byte in SPACE_MARK.encode("utf-8")] if self.escape_mark else []
        parts: list[str] = []
        owners: list[int] = []  # text of each part; ~text for a literal mark before the part
        for index, text in enumerate(texts):
            for number, stretch in enumerate(text.split(SPACE_MARK) if self.escape_mark else [text]):
                for start, part in enumerate(_chunks(stretch) if self.escape_mark else [stretch]):
                    parts.append(part)
                    owners.append(~index if number and not start else index)
        try:
            if (
                sum(map(len, parts)) < CHUNK_CHARS
            ):  # a list starts threads, which costs as much as encoding 10,000 characters
                encoded = [self._model.encode(part) for part in parts]
            else:
                encoded = self._model.encode(parts, num_threads=-1)
        except RuntimeError as error:
            raise ValueError(
                f"SentencePiece cannot encode the text; is there a lone surrogate in it? ({error})"
            ) from error
        ids: list[list[int]] = [[] for _ in texts]
        for owner, part in zip(owners, encoded, strict=True):
            if owner < 0:
                ids[~owner] += mark
            ids[owner if owner >= 0 else ~owner] += part
        return ids

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
