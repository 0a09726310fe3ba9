"""The container of GGUF files against the library that defines it."""

import struct

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, quants

from jaxllm.core.gguf_file import GgufFile, is_gguf

VALUES = [
    ("uint8", 200), ("int8", -5), ("uint16", 60_000), ("int16", -9), ("uint32", 2**32 - 1), ("int32", -7),
    ("uint64", 2**40), ("int64", -(2**40)), ("float32", 1e-5), ("float64", 0.1), ("bool", True), ("string", "naïve"),
    ("array", [1.5, 2.5]), ("array", [1, 2]), ("array", ["a", ""]), ("array", [True, False]),
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    """A file with every kind of value, and tensors of two types."""
    writer = GGUFWriter(tmp_path / "small.gguf", "llama")
    for method, value in VALUES:
        getattr(writer, f"add_{method}")(f"general.{method}.{value}", value)
    values = np.random.default_rng(0).normal(size=(5, 2, 64)).astype(np.float32)
    writer.add_tensor("plain", values[0, :, :3].copy())
    writer.add_tensor("blocks", quants.quantize(values, GGMLQuantizationType.Q8_0), raw_dtype=GGMLQuantizationType.Q8_0)
    writer.add_tensor("line", values[0, 0].astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "small.gguf"


def test_a_file_is_read_as_by_its_own_library(path):
    ours, theirs = GgufFile(path), GGUFReader(path)
    for method, value in VALUES:
        assert ours.metadata[f"general.{method}.{value}"] == value  # float32 too, as config.json has it
    assert {"general.architecture"} == set(ours.metadata) - {f"general.{method}.{value}" for method, value in VALUES}
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        found = ours.tensors[tensor.name]
        assert (found.kind, list(found.shape)) == (tensor.tensor_type.name, list(tensor.shape)[::-1])
        assert found.data.tobytes() == tensor.data.tobytes()


def test_what_is_no_gguf_file_is_named(path, tmp_path):
    content, wrong = path.read_bytes(), tmp_path / "wrong.gguf"
    for changed, message in (
        (b"PK" + content[2:], "is no GGUF file"),
        (b"GGUF", "is no GGUF file"),
        (content[:4] + struct.pack("<I", 1) + content[8:], "is of version 1, or big-endian"),
        (content[:4] + struct.pack(">I", 3) + content[8:], "is of version 50331648, or big-endian"),
        (content[:-400], "ends at byte .* it is damaged"),
        (content[:300], "cannot be read: .* it is damaged"),
    ):
        wrong.write_bytes(changed)
        assert is_gguf(wrong)  # by its name
        with pytest.raises(ValueError, match=message):
            GgufFile(wrong)
    assert not is_gguf(tmp_path)
