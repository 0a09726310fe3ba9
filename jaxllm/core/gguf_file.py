"""A GGUF file: what it says of itself, and its tensors as bytes of the mapped file.

Only the container. What keys and names mean for a model is told by `hf.gguf_config` and `hf.gguf_weights`, and for a
tokenizer by `tokenizers.gguf_tokens`. Parsed here and not by `gguf.GGUFReader`, which makes three arrays for each
string of a vocabulary: seconds and hundreds of megabytes before the first tensor; a test compares the two.

Source: docs/gguf.md of ggml, versions 2 and 3.
"""

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
STRING, ARRAY, FLOAT32 = 8, 9, 6
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
# Tensor types that are read: name, elements of a block, bytes of a block.
READ = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2), 8: ("Q8_0", 32, 34), 2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
}  # fmt: skip
# Others, so that a message can name them.
OTHERS = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip


class Tensor(NamedTuple):
    """A tensor as it is stored.

    Attributes:
      kind: name of its type, such as "Q4_K".
      shape: as NumPy has it, rows first; the file counts the other way.
      data: uint8 [..., bytes of a row], a view of the mapped file; None: `kind` is not among `READ`.
    """

    kind: str
    shape: tuple[int, ...]
    data: np.ndarray | None


class GgufFile:
    """A GGUF file, mapped into memory.

    Raises:
      ValueError: it is none, of a version or byte order that is not read, or damaged.

    Attributes:
      metadata: all keys. A float32 is the shortest decimal that means it, which is what a config.json said.
      tensors: by name, in the order of the file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.stat().st_size < 24 or not _has_magic(self.path):
            raise ValueError(f"{self.path} is no GGUF file: it does not begin with 'GGUF'; fetch it again")
        self._bytes = np.memmap(self.path, np.uint8, "r").view(np.ndarray)
        self._buffer, self._at = memoryview(self._bytes), 4
        version = self._scalar("I")
        if version not in VERSIONS:
            raise ValueError(
                f"{self.path} is of version {version}, or big-endian; read are little-endian files of version 2 or 3: "
                "convert the model again with a llama.cpp of today"
            )
        try:
            self.metadata, self.tensors = self._parse()
        except (struct.error, UnicodeDecodeError, IndexError, KeyError, ValueError) as error:
            raise ValueError(f"{self.path} cannot be read: {error}; it is damaged: fetch it again") from error

    def _parse(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        n_tensors, n_keys = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self._string()
            if key in metadata:
                raise ValueError(f"key {key} is there twice")
            metadata[key] = self._value(self._scalar("I"))
        infos = [self._info() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment") or ALIGNMENT
        start = -(-self._at // alignment) * alignment
        tensors = {name: self._tensor(name, shape, kind, start + offset) for name, shape, kind, offset in infos}
        if len(tensors) != n_tensors:
            raise ValueError("a tensor is there twice")
        return metadata, tensors

    def _info(self) -> tuple[str, tuple[int, ...], int, int]:
        name, rank = self._string(), self._scalar("I")
        shape = tuple(self._scalar("Q") for _ in range(rank))[::-1]
        return name, shape, self._scalar("I"), self._scalar("Q")

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> Tensor:
        if kind not in READ:
            return Tensor(OTHERS.get(kind, f"type {kind}"), shape, None)
        word, elements, size = READ[kind]
        if shape[-1] % elements:
            raise ValueError(f"{name} has rows of {shape[-1]}, and {word} has blocks of {elements}")
        stored = (*shape[:-1], shape[-1] // elements * size)
        end = start + math.prod(stored)
        if end > len(self._bytes):
            raise ValueError(f"{name} ends at byte {end:,} and the file at {len(self._bytes):,}")
        return Tensor(word, shape, self._bytes[start:end].reshape(stored))

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            value = self._scalar(SCALARS[kind])
            return float(str(np.float32(value))) if kind == FLOAT32 else value
        kind, count = self._scalar("I"), self._scalar("Q")
        if kind not in SCALARS:
            return [self._value(kind) for _ in range(count)]
        found = struct.unpack_from(f"<{count}{SCALARS[kind]}", self._buffer, self._at)
        self._at += struct.calcsize(f"<{count}{SCALARS[kind]}")
        return list(found)

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self._buffer, self._at)
        self._at += struct.calcsize(f"<{code}")
        return value

    def _string(self) -> str:
        length = self._scalar("Q")
        if self._at + length > len(self._buffer):
            raise ValueError(f"a string at byte {self._at:,} ends beyond the file")
        self._at += length
        return str(self._buffer[self._at - length : self._at], "utf-8")


def is_gguf(path: str | Path) -> bool:
    """Whether `path` is a file that is, or calls itself, GGUF."""
    path = Path(path)
    return path.is_file() and (path.suffix == ".gguf" or _has_magic(path))


def _has_magic(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC
