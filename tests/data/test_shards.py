import errno
import json
import os
import resource
import subprocess
import sys

import numpy as np
import pytest

from jaxllm.core import files
from jaxllm.data.shard_writer import DatasetWriter, Encoded, text_tokens
from jaxllm.data.shards import Dataset, read_manifest


def test_documents_come_back_across_shards(text_dataset, byte):
    directory = text_dataset([5, 30, 10, 60, 1], shard_tokens=40, validation=[3])
    dataset = Dataset.open(directory)
    assert [shard.n_documents for shard in read_manifest(directory).splits["train"].shards] == [2, 1, 1, 1]
    assert dataset.lengths.tolist() == [7, 32, 12, 62, 3]
    assert byte.decode(dataset.tokens(3)) == "".join(chr(97 + (3 + i) % 26) for i in range(60))
    assert dataset.tokens(0).tolist() == [1, *byte.encode("abcde"), 2]
    assert dataset.trained(0).tolist() == [False] + [True] * 6
    whole = np.concatenate([dataset.tokens(document) for document in range(5)])
    assert (dataset.stream(0, 116) == whole).all()
    assert (dataset.stream(35, 110) == whole[35:110]).all()
    assert dataset.origin(2) == {"source": "text", "location": "train 2"}
    assert dataset.origin(4) == {"source": "text", "location": "train 4"}
    assert len(Dataset.open(directory, "validation")) == 1


def test_manifest_counts_targets_and_bytes(text_dataset, chat_dataset):
    text = Dataset.open(text_dataset([4, 10]))
    assert text.n_trained == 4 + 10 + 2  # every byte and each eos
    assert text.bytes_per_token == 14 / 16
    chat = Dataset.open(chat_dataset([(3, 4), (2, 3)]))
    assert chat.kind == "chat"
    assert chat.n_trained == 7
    assert chat.bytes_per_token == 5 / 7  # eos stands for no byte
    assert chat.trained(1).tolist() == [False, False, True, True, True]


def test_wide_vocabulary_is_stored_in_32_bits(tmp_path, byte, monkeypatch):
    monkeypatch.setattr(byte.pieces, "size", 70_000)
    with DatasetWriter(tmp_path / "wide", byte, "text") as writer:
        writer.add("train", text_tokens(byte, Encoded("s", "l", [69_999], [], 1)))
    assert Dataset.open(tmp_path / "wide").tokens(0).tolist() == [1, 69_999, 2]
    assert read_manifest(tmp_path / "wide").dtype == "uint32"


def test_location_may_hold_any_character(tmp_path, byte):
    with DatasetWriter(tmp_path / "odd", byte, "text") as writer:
        for location in ("a\u2028b\nc", "第二"):
            writer.add("train", text_tokens(byte, Encoded("s", location, [10], [], 1)))
    dataset = Dataset.open(tmp_path / "odd")
    assert [dataset.origin(document)["location"] for document in range(2)] == ["a\u2028b\nc", "第二"]


def test_fingerprint_is_of_the_tokens_alone(text_dataset):
    first, same, other = (text_dataset(sizes, name) for sizes, name in (([5, 9], "a"), ([5, 9], "b"), ([5, 10], "c")))
    assert Dataset.open(first).origin(0) != Dataset.open(same).origin(0)
    assert Dataset.open(first).fingerprint == Dataset.open(same).fingerprint
    assert Dataset.open(first).fingerprint != Dataset.open(other).fingerprint
    assert Dataset.open(first).fingerprint != Dataset.open(first, "validation").fingerprint


@pytest.mark.parametrize("part", ["tokens.npy", "offsets.npy", "origins.jsonl", "trained.npy"])
def test_damage_is_found_and_named(chat_dataset, part):
    directory = chat_dataset([(3, 4), (2, 3)])
    path = directory / "train" / f"shard-00000.{part}"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(
        ValueError, match=rf"shard-00000.{part} is damaged: expected {len(content)} bytes, found {len(content) - 1}"
    ):
        Dataset.open(directory, verify=False)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"shard-00000.{part} is damaged: expected CRC-32 \w+, found \w+"):
        Dataset.open(directory)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"shard-00000.{part} is missing"):
        Dataset.open(directory)


def test_what_is_no_dataset_is_refused(text_dataset, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no dataset \(no manifest.json\)"):
        Dataset.open(tmp_path / "nothing")
    directory = text_dataset([5])
    with pytest.raises(ValueError, match="has no split 'test'; it has train, validation"):
        Dataset.open(directory, "test")
    manifest = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(manifest | {"version": 0}))
    with pytest.raises(ValueError, match="version 0; this jaxllm reads version 1"):
        Dataset.open(directory)
    (directory / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest.json is not valid JSON"):
        Dataset.open(directory)


def test_existing_directory_is_kept_unless_overwrite(text_dataset, tmp_path, byte):
    directory = text_dataset([5])
    with pytest.raises(FileExistsError, match="exists; choose another directory, or --overwrite"):
        DatasetWriter(directory, byte, "text")
    with DatasetWriter(directory, byte, "text", overwrite=True) as writer:
        writer.add("train", text_tokens(byte, Encoded("s", "l", [10] * 8, [], 8)))
        assert Dataset.open(directory).lengths.tolist() == [7]  # the old one serves until the end
    assert Dataset.open(directory).lengths.tolist() == [10]
    assert os.listdir(tmp_path) == ["text"]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda d: (d / "notes.txt").write_text("mine"), "it holds notes.txt, which is no part of a dataset"),
        (lambda d: (d / "train" / "mine.npy").write_text("x"), "it holds train/mine.npy, which is no part"),
        (lambda d: (d / "manifest.json").unlink(), "it is not empty and has no manifest.json of a dataset"),
        (lambda d: (d / "manifest.json").write_text('{"name": "app"}'), "has no manifest.json of a dataset"),
    ],
)
def test_overwrite_replaces_datasets_only(text_dataset, byte, make, why):
    directory = text_dataset([5], validation=[3])
    make(directory)
    before = sorted(directory.rglob("*"))
    with pytest.raises(FileExistsError, match=f"choose another directory than {directory}: .*{why}"):
        DatasetWriter(directory, byte, "text", overwrite=True)
    assert sorted(directory.rglob("*")) == before


def test_what_came_into_the_directory_while_the_data_was_prepared_is_kept(text_dataset, byte):
    directory = text_dataset([5])
    with (
        pytest.raises(FileExistsError, match=r"it holds notes\.txt"),
        DatasetWriter(directory, byte, "text", overwrite=True) as writer,
    ):
        writer.add("train", text_tokens(byte, Encoded("s", "l", [10] * 8, [], 8)))
        (directory / "notes.txt").write_text("mine")
    assert (directory / "notes.txt").read_text() == "mine" and Dataset.open(directory).lengths.tolist() == [7]
    assert os.listdir(directory.parent) == ["text"]


def test_overwrite_leaves_files_links_and_the_current_directory(text_dataset, byte, tmp_path, monkeypatch):
    directory = text_dataset([5])
    (tmp_path / "link").symlink_to(directory)
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(directory)
    for out, why in (("../link", "the current"), (".", "the current"), ("..", "the current"), ("../file", "is a file")):
        with pytest.raises(FileExistsError, match=why):
            DatasetWriter(out, byte, "text", overwrite=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileExistsError, match="it is a link"):
        DatasetWriter("link", byte, "text", overwrite=True)
    (tmp_path / "empty").mkdir()
    with DatasetWriter("empty", byte, "text", overwrite=True) as writer:
        writer.add("train", text_tokens(byte, Encoded("s", "l", [10] * 8, [], 8)))
    assert Dataset.open("empty").lengths.tolist() == [10]


@pytest.mark.parametrize(("length", "documents"), [(9000, 1), (0, 3000)], ids=["tokens", "offsets"])
def test_a_full_disk_is_called_so_and_leaves_nothing(text_dataset, tmp_path, byte, length, documents):
    directory = text_dataset([5])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (14_000, limits[1]))  # as a full disk, with another word for it
    try:
        for name in ("text", "new"):
            with (
                pytest.raises(OSError, match=os.strerror(errno.EFBIG)),
                DatasetWriter(tmp_path / name, byte, "text", overwrite=True) as writer,
            ):
                for _ in range(documents):
                    writer.add("train", text_tokens(byte, Encoded("s", "l", [10] * length, [], length)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == ["text"]
    assert Dataset.open(directory).lengths.tolist() == [7]


def test_empty_data_is_refused(tmp_path, byte):
    with (
        pytest.raises(ValueError, match="no document is left for training"),
        DatasetWriter(tmp_path / "empty", byte, "text"),
    ):
        pass
    assert not os.listdir(tmp_path)


def test_what_a_killed_process_left_is_dropped_and_a_living_one_keeps_its_own(tmp_path):
    beside = files.temporary_beside(tmp_path / "set")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    of = lambda pid: beside.with_name(beside.name.replace(f".{os.getpid()}.", f".{pid}."))
    left, living, other = of(dead.pid), of(os.getppid()), beside.with_name(".set.elsewhere.1.tmp")
    for path in (left, living, other):
        path.mkdir()
    files.drop_leftovers(tmp_path / "set")
    assert [path.exists() for path in (left, living, other)] == [False, True, True]
