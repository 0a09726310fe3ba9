"""What the blocks of quantised tensors mean."""

import struct

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from jaxllm.core.gguf_file import READ, Tensor
from jaxllm.hf import gguf_weights


def half(value):
    return np.float16(value).tobytes()


NIBBLES = bytes(range(0x10, 0x20)), [*range(16)], [1] * 16  # low halves, then high halves
HIGH_BITS = struct.pack("<I", 0xFFFF0000)  # the fifth bit of the second sixteen
# Mins and scales of a K block, six bits each: scales 1 2 3 4 and 17 2 3 4, mins 5 6 7 8 and 1 2 3 4.
SCALES = bytes([0x41, 2, 3, 4, 5, 6, 7, 8, 0x11, 0x22, 0x33, 0x44])
LITERALS = {
    "Q8_0": (half(0.5) + bytes(range(240, 256)) + bytes(range(16)), [0.5 * i for i in range(-16, 16)]),
    "Q4_0": (half(2) + NIBBLES[0], [2.0 * (i - 8) for i in NIBBLES[1] + NIBBLES[2]]),
    "Q4_1": (half(2) + half(-3) + NIBBLES[0], [2.0 * i - 3 for i in NIBBLES[1] + NIBBLES[2]]),
    "Q5_0": (half(2) + HIGH_BITS + NIBBLES[0], [2.0 * (i - 16) for i in NIBBLES[1] + [17] * 16]),
    "Q5_1": (half(2) + half(-3) + HIGH_BITS + NIBBLES[0], [2.0 * i - 3 for i in NIBBLES[1] + [17] * 16]),
    "Q4_K": (
        half(0.5) + half(0.25) + SCALES + bytes([0x73] * 128),
        np.repeat([0.5 * s * q - 0.25 * m for s, q, m in zip(
            (1, 2, 3, 4, 17, 2, 3, 4), (3, 7) * 4, (5, 6, 7, 8, 1, 2, 3, 4), strict=True)], 32),
    ),
    "Q5_K": (
        half(0.5) + half(0.25) + SCALES + bytes([0b10] * 32) + bytes([0x73] * 128),  # one high bit: of the second 32
        np.repeat([0.5 * s * q - 0.25 * m for s, q, m in zip(
            (1, 2, 3, 4, 17, 2, 3, 4), (3, 23, *(3, 7) * 3), (5, 6, 7, 8, 1, 2, 3, 4), strict=True)], 32),
    ),
    "Q6_K": (
        bytes([0x21] * 128) + bytes([0b11100100] * 64) + bytes(i % 256 for i in range(-8, 8)) + half(0.5),
        np.repeat([0.5 * (i - 8) * (-31, -15, 2, 18)[i // 2 % 4] for i in range(16)], 16),
    ),
    "F32": (np.float32([1.5, -2]).tobytes(), [1.5, -2.0]),
    "F16": (half(1.5) + half(-2), [1.5, -2.0]),
    "BF16": (bytes([0xC0, 0x3F, 0x00, 0xC0]), [1.5, -2.0]),
}  # fmt: skip


@pytest.mark.parametrize("kind", [name for name, _, _ in READ.values()])
def test_blocks_mean_what_the_format_says(kind, monkeypatch):
    block, values = LITERALS[kind]
    data = np.frombuffer(block * 6, np.uint8).reshape(3, -1)
    tensor = Tensor(kind, (3, 2 * len(values)), data)
    monkeypatch.setattr(gguf_weights, "CHUNK_ROWS", 2)
    np.testing.assert_array_equal(gguf_weights.read(tensor), np.tile(np.array(values, np.float32), (3, 2)))
    noise = np.random.default_rng(0).integers(0, 60, (5, data.shape[1]), dtype=np.uint8)  # no infinities among scales
    found = gguf_weights.read(Tensor(kind, (5, 2 * len(values)), noise))
    np.testing.assert_array_equal(found, gguf.quants.dequantize(noise, GGMLQuantizationType[kind]).astype(found.dtype))


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ValueError, match=r"type Q8_0 .*pip install 'jaxllm\[gguf\]'"):
        gguf_weights.read(Tensor("Q8_0", (1, 32), np.zeros((1, 34), np.uint8)))
