"""Inputs of every kind, whole and broken."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sys
import tarfile
import tracemalloc
import zipfile

import pyarrow as pa
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from pyarrow import parquet

from jaxllm.data import input_files
from jaxllm.data.clean import CleanConfig, Cleaner
from jaxllm.data.problems import Problems
from jaxllm.data.sources import RowFiles, TextFiles, Tfds, WebPages, conversations, documents, parts

PAGE = "<html><head><title>t</title></head><body><main><p>{}</p></main></body></html>"


def read(source, problems=None):
    return list(documents(source, problems or Problems()))


def texts(source, problems=None):
    return [each.text for each in read(source, problems)]


def skipped(source, match):
    """The documents that are left, where the policy "error" stops with a message that matches, and "skip" counts it."""
    with pytest.raises(ValueError, match=match):
        read(source)
    problems = Problems("skip")
    left = read(source, problems)
    assert problems.count >= 1
    return left


def lines(count):
    return b"".join(json.dumps({"text": f"row {n} 你好", "id": f"x{n}"}).encode() + b"\n" for n in range(count))


# Files: which, and unpacked


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress, bz2.compress, lzma.compress])
def test_compressed_files_are_known_by_their_content(tmp_path, compress):
    (tmp_path / "a.jsonl").write_bytes(compress(lines(3)) + compress(lines(3)[: len(lines(1))]))
    found = read(RowFiles(path=str(tmp_path / "a.jsonl")))
    assert [each.text for each in found] == ["row 0 你好", "row 1 你好", "row 2 你好", "row 0 你好"]
    assert [each.offset for each in found] == [len(lines(n)) for n in range(4)]  # in the file as it is unpacked
    assert [(each.location, each.id) for each in found[:2]] == [("line 1", "x0"), ("line 2", "x1")]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress, bz2.compress, lzma.compress])
def test_cut_compressed_files_give_what_is_whole(tmp_path, compress):
    path, whole = tmp_path / "a.jsonl.gz", compress(os.urandom(70_000).hex().encode() + b"\n" + lines(20_000))
    path.write_bytes(lines(0) + compress(lines(20_000))[:-30])
    left = skipped(RowFiles(path=str(path)), r"a\.jsonl\.gz: .*; what follows cannot be read; repair it")
    assert [each.text for each in left] == [f"row {n} 你好" for n in range(len(left))]
    path.write_bytes(whole[: len(whole) // 2])
    skipped(TextFiles(path=str(path)), r"a\.jsonl\.gz: .*what follows cannot be read")


def test_members_of_archives(tmp_path):
    contents = {"a.txt": b"one", "sub/b.txt.gz": gzip.compress(b"two"), "c.bin": b"\xff", "d.txt": b""}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    for name, mode in {"a.tar": "w", "a.tar.gz": "w:gz", "a.tgz": "w:gz", "a.tar.xz": "w:xz"}.items():
        with tarfile.open(tmp_path / name, mode) as archive:
            for member, content in contents.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    for name in ("a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.tar.xz"):
        found = read(TextFiles(path=str(tmp_path / name)))
        assert [(each.text, each.location) for each in found] == [
            ("one", "a.txt"),
            ("two", "sub/b.txt.gz"),
            ("", "d.txt"),
        ]
        found = read(TextFiles(path=str(tmp_path / name), split="line"))
        assert [(each.location, each.source) for each in found] == [
            ("a.txt, line 1", str(tmp_path / name)),
            ("sub/b.txt.gz, line 1", str(tmp_path / name)),
        ]


def test_broken_archives(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("a.txt", "b.txt", "c.txt"):
            archive.writestr(name, f"this is {name}")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"this is b", b"this is B"))
    assert [each.text for each in skipped(TextFiles(path=str(path)), r"a\.zip/b\.txt: Bad CRC-32")] == [
        "this is a.txt",
        "this is c.txt",
    ]
    path.write_bytes(content[:-40])
    assert not skipped(TextFiles(path=str(path)), r"a\.zip: File is not a zip file")
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for name in ("a.txt", "b.txt"):
            info = tarfile.TarInfo(name)
            info.size = 3000
            archive.addfile(info, io.BytesIO(b"x" * 3000))
    path.write_bytes(path.read_bytes()[:5500])
    assert len(skipped(TextFiles(path=str(path)), r"a\.tar/b\.txt: unexpected end of data")) == 1
    path.write_bytes(path.read_bytes()[:3600])
    assert len(skipped(TextFiles(path=str(path)), r"a\.tar: .*cut short")) == 1
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("a.pdf", "x")
    assert not skipped(
        TextFiles(path=str(tmp_path / "none.zip")), r"none\.zip: no member of the archive is named as --text demands"
    )


def test_directories_and_links(tmp_path):
    for name in ("b.txt", "sub/a.txt", "sub/deep/c.txt.gz", ".git/d.txt", "e.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "a_loop").symlink_to(tmp_path / "sub")
    expected = ["a_loop/a.txt", "a_loop/deep/c.txt.gz", "b.txt"]  # the nearest way to each directory
    for pattern in (f"{tmp_path}", f"{tmp_path}/**/*.txt*"):
        assert [os.path.relpath(each.path, tmp_path) for each in parts(TextFiles(path=pattern))] == expected
    (tmp_path / "self.txt").symlink_to(tmp_path / "self.txt")
    (tmp_path / "nowhere.txt").symlink_to(tmp_path / "gone")
    assert texts(TextFiles(path=f"{tmp_path}/b.txt")) == ["b.txt"]
    left = skipped(TextFiles(path=f"{tmp_path}/*.txt"), r"nowhere\.txt: No such file or directory")
    assert [each.text for each in left] == ["b.txt"]
    with pytest.raises(ValueError, match=r"self\.txt: Too many levels of symbolic links"):
        read(TextFiles(path=f"{tmp_path}/s*.txt"))


def test_remote_paths(tmp_path):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    (tmp_path / "data" / "a.jsonl").write_bytes(lines(2))
    (tmp_path / "data" / "sub" / "b.jsonl.gz").write_bytes(gzip.compress(lines(1)))
    (tmp_path / "data" / "c.parquet").write_bytes(b"")
    parquet.write_table(pa.table({"text": ["p"]}), tmp_path / "data" / "c.parquet")
    with epath.testing.mock_epath(**_moved("gs://bucket", str(tmp_path))):
        for path, count in {"a.jsonl": 2, "*.jsonl": 2, "**/*.jsonl*": 3, "": 3}.items():
            found = read(RowFiles(path=f"gs://bucket/data/{path}".rstrip("/")))
            assert (len(found), found[0].source) == (count, "gs://bucket/data/a.jsonl")
        assert texts(RowFiles(kind="parquet", path="gs://bucket/data/c.parquet")) == ["p"]
        with pytest.raises(FileNotFoundError, match=r"no file matches 'gs://bucket/data/\*\.csv'"):
            read(RowFiles(path="gs://bucket/data/*.csv"))


def _moved(bucket, directory):
    """The functions of a store in which `bucket` is `directory`."""
    here = lambda path: os.fspath(path).replace(bucket, directory)
    return {
        "open": lambda real, path, mode: real(here(path), mode),
        **{name: (lambda real, path: real(here(path))) for name in ("exists", "isdir", "listdir", "stat")},
    }


def test_parts_are_picklable_and_say_the_same(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(2))
    source = RowFiles(path=f"{tmp_path}/*.jsonl")
    found = pickle.loads(pickle.dumps(parts(source)))
    assert [os.path.basename(part.path) for part in found] == ["a.jsonl", "b.jsonl"]
    assert [each for part in found for each in documents(part, Problems())] == read(source)


def test_files_that_change_while_they_are_read(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines(2) + b'{"text": "half')
    [part] = parts(RowFiles(path=str(path)))
    with open(path, "ab") as file:
        file.write(b' and half"}\n' + lines(1))
    problems = Problems()
    assert [each.text for each in documents(part, problems)] == ["row 0 你好", "row 1 你好"]
    assert list(problems.notes) == [f"{path} grew while it was read: only its first {part.size} bytes are used"]
    path.write_bytes(lines(1))
    with pytest.raises(ValueError, match=r"a\.jsonl: the file lost its last \d+ bytes while it was read"):
        list(documents(part, Problems()))
    assert parts(RowFiles(path=os.devnull))[0].size is None  # no regular file: read to its end


# What is too long, or nothing


def test_long_lines_are_counted_and_cost_no_memory(tmp_path):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(lines(1) + b'{"text": "')
        for _ in range(40):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + lines(1))
    for source in (
        RowFiles(path=str(path), max_bytes=100_000),
        TextFiles(path=str(path), split="line", max_bytes=100_000),
    ):
        tracemalloc.start()
        left = skipped(source, r"a\.jsonl(:|, line )2: a (line|document) of 40,000,013 bytes, and max_bytes .* 100,000")
        assert tracemalloc.get_traced_memory()[1] < 8_000_000
        tracemalloc.stop()
        assert [each.location for each in left] == ["line 1", "line 3"]
    for split in ("file", "paragraph"):
        source = TextFiles(path=str(path), split=split, max_bytes=100_000)
        assert not skipped(source, "of 40,000,099 bytes, .*cut finer .*or set max_bytes of this input higher")
    path.write_bytes(b"x" * 10 + b"\n")
    assert texts(TextFiles(path=str(path), split="line", max_bytes=11)) == ["x" * 10]


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    words = "words that go on " * 40
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(f"{words}\n".encode() * 12_000))
    table = pa.table({"text": [f"{words} {n}" for n in range(12_000)]})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=4_000, compression="none", use_dictionary=False)
    del table
    arrow = pa.total_allocated_bytes()
    for source in (
        TextFiles(path=f"{tmp_path}/a.txt.gz", split="line"),
        RowFiles(kind="parquet", path=f"{tmp_path}/a.parquet"),
    ):
        tracemalloc.start()
        native = max(pa.total_allocated_bytes() for _ in documents(source, Problems())) - arrow
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4_000_000 > native  # of 8 MB, of which a row group has 2.8 MB


def test_nul_bytes_empty_files_and_equal_ids(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\0b")
    (tmp_path / "b.txt").write_bytes(b"")
    found = read(TextFiles(path=f"{tmp_path}/*.txt"))
    assert [each.text for each in found] == ["a\0b", ""]
    cleaner = Cleaner(CleanConfig())
    assert [each and each.text for each in map(cleaner.document, found)] == ["ab", None]
    assert cleaner.counts["min_chars"].dropped == 1
    (tmp_path / "a.jsonl").write_bytes(
        b'{"id": 7, "text": "one"}\n{"id": 7, "text": "two\\u0000"}\n{"url": "u", "text": ""}'
    )
    found = read(RowFiles(path=f"{tmp_path}/a.jsonl"))
    assert [(each.text, each.id) for each in found] == [("one", "7"), ("two\0", "7"), ("", "u")]


def test_mixed_encodings(tmp_path):
    (tmp_path / "a.txt").write_bytes(
        "你好\n".encode() + "你好\n".encode("gb18030") + "café\n".encode("latin-1") + b"end\n"
    )
    left = skipped(TextFiles(path=f"{tmp_path}/a.txt", split="line"), "not UTF-8 at byte offset 7")
    assert [each.text for each in left] == ["你好", "end"]


# Kinds


def test_markdown_without_its_front_matter(tmp_path):
    path = tmp_path / "a.md"
    path.write_bytes(b"---\ntitle: A\ntags:\n  - x\n---\n# A\n\ntext\n")
    assert texts(TextFiles(kind="markdown", path=str(tmp_path))) == ["# A\n\ntext\n"]
    found = read(TextFiles(kind="markdown", path=str(tmp_path), split="paragraph"))
    assert [(each.text, each.location, each.offset) for each in found] == [
        ("# A", "line 6", 29),
        ("text", "line 8", 34),
    ]
    for plain in (b"---\n\nA rule, then text.\n\n---\nmore\n", b"# A\n---\nb: c\n---\n", b"---\n", b""):
        path.write_bytes(plain)
        assert texts(TextFiles(kind="markdown", path=str(path))) == [plain.decode()]


def test_pages(tmp_path):
    (tmp_path / "a.html").write_text(PAGE.format("café 你好"))
    (tmp_path / "b.htm").write_bytes(
        PAGE.replace("<title>", '<meta charset="gb2312"><title>').format("你好，世界").encode("gb2312")
    )
    found = read(WebPages(path=str(tmp_path)))
    assert [(each.text, each.location, each.offset) for each in found] == [
        ("café 你好", "whole file", None),
        ("你好，世界", "whole file", None),
    ]
    assert not skipped(
        WebPages(path=f"{tmp_path}/a.html", max_bytes=20), r"a\.html, whole file: a document of 21 bytes"
    )
    with pytest.raises(ValueError, match="--html x has no conversations"):
        list(conversations(WebPages(path="x"), Problems()))


def record(number, body, kind="text/html", status="200 OK", warc_type="response", extra=""):
    block = body
    if warc_type == "response":
        block = (
            f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{extra}Content-Length: {len(body)}\r\n\r\n".encode() + body
        )
        kind = "application/http; msgtype=response"
    head = (
        f"WARC/1.0\r\nWARC-Type: {warc_type}\r\nWARC-Record-ID: <urn:uuid:{number:036d}>\r\n"
        f"WARC-Target-URI: http://x.org/{number}\r\nContent-Type: {kind}\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


RECORDS = [
    record(0, b"", "application/warc-fields", warc_type="warcinfo"),
    record(1, PAGE.format("hello").encode(), "text/html; charset=utf-8"),
    record(2, b"\x89PNG", "image/png"),
    record(3, b"gone", status="404 Not Found"),
    record(4, PAGE.format("你好").encode("gbk"), "text/html; charset=gbk"),
    record(5, "plain 你好".encode(), "text/plain", warc_type="conversion"),
    record(6, gzip.compress(PAGE.format("small").encode()), extra="Content-Encoding: gzip\r\n"),
    record(7, PAGE.format("last").encode(), "text/html; charset=nonsense"),
]


@pytest.mark.parametrize("pack", [bytes, gzip.compress, zstandard.compress])
def test_web_archives(tmp_path, pack):
    path = tmp_path / "a.warc.gz"
    path.write_bytes(b"".join(map(pack, RECORDS)))
    problems = Problems()
    found = read(WebPages(kind="warc", path=str(path)), problems)
    assert [each.text for each in found] == ["hello", "你好", "plain 你好", "small", "last"]
    assert found[0].location == "record http://x.org/1"
    assert (found[0].id, found[0].offset) == (f"<urn:uuid:{1:036d}>", len(RECORDS[0]))
    assert problems.notes == {"WARC records left out: image/png": 1, "WARC records left out: status 404": 1}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_cut_web_archive_is_never_silent(tmp_path, pack):
    whole = [pack(record(n, PAGE.format(f"page {n}").encode())) for n in range(3)]
    content, ends = b"".join(whole), [len(b"".join(whole[:n])) for n in range(4)]
    for cut in range(1, len(content), 7):
        (tmp_path / "a.warc").write_bytes(content[:cut])
        problems = Problems("skip")
        found = texts(WebPages(kind="warc", path=f"{tmp_path}/a.warc"), problems)
        complete = sum(end <= cut + 4 * (pack is bytes) for end in ends[1:])  # the last four are empty lines
        assert found == [f"page {n}" for n in range(len(found))]
        assert len(found) <= complete
        assert problems.count or len(found) == complete, cut


def test_broken_records_of_web_archives(tmp_path):
    path = tmp_path / "a.warc"
    path.write_bytes(RECORDS[1] + b"no record\r\n" + RECORDS[4])
    skipped(
        WebPages(kind="warc", path=str(path)), r"a\.warc: the record at byte offset 0 or the one after it is broken"
    )
    path.write_bytes(RECORDS[1] + record(2, b"x" * 5000) + RECORDS[5])
    left = skipped(
        WebPages(kind="warc", path=str(path), max_bytes=1000), r"record http://x\.org/2: a document of 5,000"
    )
    assert [each.text for each in left] == ["hello", "plain 你好"]
    bomb = record(1, gzip.compress(b"x" * 100_000), "text/plain", extra="Content-Encoding: gzip\r\n")
    path.write_bytes(bomb)
    assert not skipped(WebPages(kind="warc", path=str(path), max_bytes=1000), r"a document of 1,001 bytes")


def test_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": [f"row {n}" for n in range(9)], "url": [f"u{n}" for n in range(9)], "other": [1] * 9})
    parquet.write_table(table, path, row_group_size=4, compression="none", use_dictionary=False)
    found = read(RowFiles(kind="parquet", path=str(path)))
    assert [(each.text, each.location, each.id) for each in found] == [
        (f"row {n}", f"row {n}", f"u{n}") for n in range(9)
    ]
    skipped(
        RowFiles(kind="parquet", path=str(path), fields="body"), r"no column 'body'; there are 'text', 'url', 'other'"
    )
    skipped(RowFiles(kind="parquet", path=str(path), fields="other"), r"row 0: no text in field 'other': it is int")
    [first, *_] = conversations(RowFiles(kind="parquet", path=str(path), fields="url,text"), Problems())
    assert [each.content for each in first.messages] == ["u0", "row 0"]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert not skipped(RowFiles(kind="parquet", path=str(path)), r"a\.parquet: no whole Parquet file")
    place = parquet.ParquetFile(pa.BufferReader(content)).metadata.row_group(1).column(0).data_page_offset
    path.write_bytes(content[:place] + b"\xff" * 12 + content[place + 12 :])
    left = skipped(RowFiles(kind="parquet", path=str(path)), r"a\.parquet: row group 1 \(rows 4 to 7\) is broken")
    assert [each.text for each in left] == [f"row {n}" for n in (0, 1, 2, 3, 8)]


def array_record(path, records):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for each in records:
        writer.write(each)
    writer.close()


def test_array_record(tmp_path):
    path = tmp_path / "a.array_record-00000-of-00001"
    array_record(path, [f"record {n} 你好".encode() for n in range(600)])
    found = read(RowFiles(kind="arrayrecord", path=str(tmp_path)))
    assert [(each.text, each.location) for each in found[::599]] == [
        ("record 0 你好", "record 0"),
        ("record 599 你好", "record 599"),
    ]
    skipped(RowFiles(kind="arrayrecord", path=str(tmp_path), fields="text"), r"record 0: not JSON")
    array_record(tmp_path / "b.array_record", [*lines(3).splitlines(), b"\xff"])
    left = skipped(
        RowFiles(kind="arrayrecord", path=f"{tmp_path}/b.array_record", fields="text"), r"record 3: not UTF-8"
    )
    assert [(each.text, each.id) for each in left] == [(f"row {n} 你好", f"x{n}") for n in range(3)]
    array_record(path, [os.urandom(400).hex().encode() for _ in range(600)])
    content = path.read_bytes()
    path.write_bytes(content[:100_000] + b"x" * 40 + content[100_040:])
    left = skipped(RowFiles(kind="arrayrecord", path=str(path)), r"record \d+: Corrupted Riegeli/records file")
    assert 590 < len(left) < 600
    path.write_bytes(content[:-100_000])
    assert not skipped(RowFiles(kind="arrayrecord", path=str(path)), r"00001: Corrupted")


def test_hugging_face_directories(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"text": [f"row {n}" for n in range(600)], "id": list(range(600))})
    table.save_to_disk(tmp_path / "one", num_shards=2)
    found = read(RowFiles(kind="hf", path=str(tmp_path / "one")))
    assert [each.text for each in found] == [f"row {n}" for n in range(600)]
    assert (found[300].location, found[300].id, len(parts(RowFiles(kind="hf", path=f"{tmp_path}/one")))) == (
        "row 0",
        "300",
        2,
    )
    datasets.DatasetDict(train=table, test=table).save_to_disk(tmp_path / "two")
    with pytest.raises(ValueError, match=r"two has splits; name one: .*two/train, .*two/test"):
        read(RowFiles(kind="hf", path=str(tmp_path / "two")))
    with pytest.raises(FileNotFoundError, match=r"is not what save_to_disk .* makes"):
        read(RowFiles(kind="hf", path=str(tmp_path)))
    cut = next((tmp_path / "one").glob("*.arrow"))
    cut.write_bytes(cut.read_bytes()[:2000])
    skipped(RowFiles(kind="hf", path=str(tmp_path / "one")), r"arrow: Expected to be able to read \d+ bytes")


BUILDER = """
import numpy as np
import tensorflow_datasets as tfds

class Builder(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        text = tfds.features.Text()
        features = tfds.features.FeaturesDict({"text": text, "id": text, "n": np.int64})
        return self.dataset_info_from_configs(features=features)

    def _split_generators(self, downloads):
        return {"train": self._generate_examples(600), "test": self._generate_examples(5)}

    def _generate_examples(self, count):
        for n in range(count):
            yield n, {"text": f"doc {n} 你好", "id": f"x{n}", "n": n}
"""


def test_tfds_without_tensorflow(tmp_path, monkeypatch):
    package = tmp_path / "code" / "made_here" / "tiny_texts"
    package.mkdir(parents=True)
    for directory in (package, package.parent):
        (directory / "__init__.py").write_text("")
    (package / "tiny_texts_dataset_builder.py").write_text(BUILDER)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    from made_here.tiny_texts.tiny_texts_dataset_builder import Builder

    data = str(tmp_path / "data")
    Builder(data_dir=data, file_format="array_record").download_and_prepare()
    monkeypatch.setattr("jaxllm.data.rows.EXAMPLES", 250)
    source = Tfds(name="tiny_texts:1.0.0", data_dir=data)
    found = read(source)
    assert sorted(each.text for each in found) == sorted(f"doc {n} 你好" for n in range(600))
    assert all(each.text == f"doc {each.id[1:]} 你好" for each in found)
    assert (found[599].source, found[599].location) == ("tiny_texts:1.0.0[train]", "example 599")
    split = parts(source)
    assert [(part.first, part.stop) for part in split] == [(0, 250), (250, 500), (500, 600)]
    assert [each for part in split for each in documents(part, Problems())] == found
    [pair, *_] = conversations(Tfds(name="tiny_texts", data_dir=data, split="test", fields="id,text"), Problems())
    assert pair.messages[1].content == f"doc {pair.messages[0].content[1:]} 你好"
    skipped(Tfds(name="tiny_texts", data_dir=data, fields="n"), r"example 0: no text in field 'n': it is int")
    for wrong in ({"name": "tiny_texts:2.0.0"}, {"name": "tiny_texts", "split": "dev"}, {"name": "no_such"}):
        with pytest.raises(ValueError, match=rf"--tfds {wrong['name']}, split .*prepare it with file_format"):
            read(Tfds(data_dir=data, **wrong))
    assert "tensorflow" not in sys.modules


def test_problems_of_two_readers_add_up():
    one, two = Problems("skip"), Problems("skip")
    for n in range(4):
        one.report(f"a{n}")
        two.report(f"b{n}")
    one.notes["x"] += 1
    two.notes["x"] += 2
    both = one + two
    assert (both.count, both.examples, both.notes) == (8, ["a0", "a1", "a2", "a3", "b0"], {"x": 3})


def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.txt").write_bytes(zstandard.compress(b"x"))
    with pytest.raises(ValueError, match=r"pyarrow is not installed; run: pip install 'jaxllm\[prep\]'"):
        read(TextFiles(path=str(tmp_path)))
    assert input_files.length(str(tmp_path / "none")) is None
