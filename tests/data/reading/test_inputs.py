"""Inputs of every kind but lines of text and JSON, whole and broken."""

import gzip
import os
import sys

import pyarrow as pa
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from pyarrow import parquet

from jaxllm.data.problems import Problems
from jaxllm.data.reading import input_files
from jaxllm.data.reading.sources import RowFiles, TextFiles, Tfds, WebPages, conversations, documents, parts

PAGE = "<html><head><title>t</title></head><body><main><p>{}</p></main></body></html>"


def test_markdown_without_its_front_matter(tmp_path, read, texts):
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


def test_pages(tmp_path, read, skipped):
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
def test_web_archives(tmp_path, pack, read):
    path = tmp_path / "a.warc.gz"
    path.write_bytes(b"".join(map(pack, RECORDS)))
    problems = Problems()
    found = read(WebPages(kind="warc", path=str(path)), problems)
    assert [each.text for each in found] == ["hello", "你好", "plain 你好", "small", "last"]
    assert found[0].location == "record http://x.org/1"
    assert (found[0].id, found[0].offset) == (f"<urn:uuid:{1:036d}>", len(RECORDS[0]))
    assert problems.notes == {"WARC records left out: image/png": 1, "WARC records left out: status 404": 1}


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_a_cut_web_archive_is_never_silent(tmp_path, pack, texts):
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


def test_broken_records_of_web_archives(tmp_path, skipped):
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


def test_parquet(tmp_path, read, skipped, texts):
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
    parquet.write_table(
        pa.table({"text": pa.array([b"a\xff", b"b"]).cast(pa.string(), safe=False)}), tmp_path / "b.parquet"
    )
    bad = RowFiles(kind="parquet", path=f"{tmp_path}/b.parquet")
    assert [each.text for each in skipped(bad, r"b\.parquet, row 0: not UTF-8 at byte offset 1")] == ["b"]
    assert texts(bad, Problems("replace")) == ["a\ufffd", "b"]
    skipped(RowFiles(kind="parquet", path=str(path), fields="other"), r"row 0: no text in field 'other': it is \d")
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


def test_array_record(tmp_path, lines, read, skipped):
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


def test_hugging_face_directories(tmp_path, read, skipped):
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
    damaged = next((tmp_path / "one").glob("*1-of*.arrow"))
    content = damaged.read_bytes()
    middle = content.index(b"row 301") - 800  # where the texts start, not what they are
    damaged.write_bytes(content[:middle] + b"\xff" * 8 + content[middle + 8 :])
    skipped(RowFiles(kind="hf", path=str(tmp_path / "one")), "no whole Arrow file")
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


def test_tfds_without_tensorflow(tmp_path, monkeypatch, read, skipped):
    package = tmp_path / "code" / "made_here" / "tiny_texts"
    package.mkdir(parents=True)
    for directory in (package, package.parent):
        (directory / "__init__.py").write_text("")
    (package / "tiny_texts_dataset_builder.py").write_text(BUILDER)
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    from made_here.tiny_texts.tiny_texts_dataset_builder import Builder

    data = str(tmp_path / "data")
    Builder(data_dir=data, file_format="array_record").download_and_prepare()
    monkeypatch.setattr("jaxllm.data.reading.rows.EXAMPLES", 250)
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
    skipped(Tfds(name="tiny_texts", data_dir=data, fields="n"), r"example 0: no text in field 'n': it is \d")
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


def test_a_missing_package_says_how_to_install_it(tmp_path, monkeypatch, read):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.txt").write_bytes(zstandard.compress(b"x"))
    with pytest.raises(ValueError, match=r"pyarrow is not installed; run: pip install 'jaxllm\[prep\]'"):
        read(TextFiles(path=str(tmp_path)))
    assert input_files.stamp(str(tmp_path / "none")) is None
