"""Files of inputs: which are meant, compressed, in archives, remote, changing, too long."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import tarfile
import tracemalloc
import zipfile

import pyarrow as pa
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from pyarrow import parquet

from jaxllm.data.cleaning.clean import CleanConfig, Cleaner
from jaxllm.data.prepare import prepare
from jaxllm.data.prepare_config import BytesTokenizer, PrepareConfig
from jaxllm.data.problems import Problems
from jaxllm.data.reading.sources import RowFiles, TextFiles, cut, documents, parts


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress, bz2.compress, lzma.compress])
def test_compressed_files_are_known_by_their_content(tmp_path, compress, lines, read):
    (tmp_path / "a.jsonl").write_bytes(compress(lines(3)) + compress(lines(3)[: len(lines(1))]))
    found = read(RowFiles(path=str(tmp_path / "a.jsonl")))
    assert [each.text for each in found] == ["row 0 你好", "row 1 你好", "row 2 你好", "row 0 你好"]
    assert [each.offset for each in found] == [len(lines(n)) for n in range(4)]  # in the file as it is unpacked
    assert [(each.location, each.id) for each in found[:2]] == [("line 1", "x0"), ("line 2", "x1")]


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress, bz2.compress, lzma.compress])
def test_cut_compressed_files_give_what_is_whole(tmp_path, compress, lines, skipped):
    path, whole = tmp_path / "a.jsonl.gz", compress(os.urandom(70_000).hex().encode() + b"\n" + lines(20_000))
    for count, least in (20_000, 0), (100, 90 if compress in (gzip.compress, lzma.compress) else 0):  # others: blocks
        path.write_bytes(compress(lines(count))[:-30])
        left = skipped(RowFiles(path=str(path)), r"a\.jsonl\.gz: .*; what follows cannot be read; repair it")
        assert [each.text for each in left] == [f"row {n} 你好" for n in range(len(left))]
        assert len(left) >= least
    path.write_bytes(whole[: len(whole) // 2])
    skipped(TextFiles(path=str(path)), r"a\.jsonl\.gz: .*what follows cannot be read")


def test_members_of_archives(tmp_path, read):
    contents = {
        "a.txt": b"one", "sub/b.txt.gz": gzip.compress(b"two"), "c.bin": b"\xff", "./d.txt": b"", "e.BIN": b"",
        "__MACOSX/._a.txt": b"\xff", "README": b"x",
    }  # fmt: skip
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
        problems = Problems()
        found = read(TextFiles(path=str(tmp_path / name)), problems)
        assert [(each.text, each.location) for each in found] == [
            ("one", "a.txt"),
            ("two", "sub/b.txt.gz"),
            ("", "./d.txt"),
        ]
        left = "members of archives left out, which --text does not read: "
        assert problems.notes == {f"{left}.bin": 2, f"{left}others": 1, f"{left}hidden": 1}
        with pytest.raises(ValueError, match="files of --parquet cannot be read inside an archive; unpack it"):
            read(RowFiles(kind="parquet", path=str(tmp_path / name)))
        found = read(TextFiles(path=str(tmp_path / name), split="line"))
        assert [(each.location, each.source) for each in found] == [
            ("a.txt, line 1", str(tmp_path / name)),
            ("sub/b.txt.gz, line 1", str(tmp_path / name)),
        ]


@pytest.mark.parametrize("split", ["line", "paragraph", "jsonl"])
def test_stretches_of_a_file_have_its_documents(tmp_path, split, lines, read):
    if split == "jsonl":
        (tmp_path / "a").write_bytes(b"\n" + lines(40) + b"{bad\n\n" + lines(3)[:-1])
        source = RowFiles(path=f"{tmp_path}/a")
    else:
        text = "".join(f"row {n} 你好\nand more{end}" for n in range(40) for end in ("\n", "\r\n\r\n", "\n\n\n \n"))
        (tmp_path / "a").write_bytes(f"\ufeff{text}end".encode())
        source = TextFiles(path=f"{tmp_path}/a", split=split)
    [whole] = parts(source)
    expected = read(source, all_problems := Problems("skip"))
    for step in (1, 50, 700, 10_000):
        found, problems = cut(whole, step), Problems("skip")
        assert [each for part in found for each in documents(part, problems)] == expected
        assert (problems.examples, problems.notes) == (all_problems.examples, {})
        assert (len(found) > 1) == (step < 1000) and found[-1].stop == whole.size
    (tmp_path / "a").write_bytes(gzip.compress((tmp_path / "a").read_bytes()))
    assert len(cut(parts(source)[0], 50)) == 1 and read(source, Problems("skip")) == expected


@pytest.mark.parametrize("kind", ["parquet", "arrayrecord"])
def test_stretches_of_a_file_have_its_groups_of_rows(tmp_path, kind, read):
    path = f"{tmp_path}/a"
    if kind == "parquet":
        parquet.write_table(pa.table({"text": [f"row {n}" for n in range(103)]}), path, row_group_size=10)
    else:
        writer = ArrayRecordWriter(path, "group_size:1")
        for number in range(103):
            writer.write(f"row {number}".encode())
        writer.close()
    source = RowFiles(kind=kind, path=path)
    [whole] = parts(source)
    for step, least in (1, 11), (whole.size // 4, 4), (whole.size, 1):
        found = cut(whole, step)
        assert len(found) >= least and found[-1].stop == whole.size
        each = [list(documents(part, Problems())) for part in found]
        assert [document for some in each for document in some] == read(source)
        assert [int(document.location.split(" ")[1]) for some in each for document in some] == list(range(103))
        assert min(map(len, each)) > 0
    for field, content in ("body", b""), ("text", os.urandom(1000)):  # a column that is not there, a broken file
        with open(path, "ab") as file:
            file.write(content)
        problems, wrong = Problems("skip"), RowFiles(kind=kind, path=path, fields=field)
        found = [document for part in cut(parts(wrong)[0], 1) for document in documents(part, problems)]
        each_row = kind == "arrayrecord" and field == "body"  # whose rows have fields of their own
        assert not found and problems.count == (103 if each_row else 1)  # as of a file that is not cut


def test_broken_archives(tmp_path, skipped):
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


def test_directories_and_links(tmp_path, read, skipped, texts):
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


def test_remote_paths(tmp_path, lines, read, texts):
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
        made = PrepareConfig(
            inputs=(RowFiles(path="gs://bucket/data/**/*.jsonl*"),), out=f"{tmp_path}/out", tokenizer=BytesTokenizer(),
            engine={"workers": 1},
        )  # fmt: skip
        assert prepare(made).documents_read == 3


def _moved(bucket, directory):
    """The functions of a store in which `bucket` is `directory`."""
    here = lambda path: os.fspath(path).replace(bucket, directory)
    return {
        "open": lambda real, path, mode: real(here(path), mode),
        **{name: (lambda real, path: real(here(path))) for name in ("exists", "isdir", "listdir", "stat")},
    }


def test_parts_are_picklable_and_say_the_same(tmp_path, lines, read):
    for name in ("b", "a"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(2))
    source = RowFiles(path=f"{tmp_path}/*.jsonl")
    found = pickle.loads(pickle.dumps(parts(source)))
    assert [os.path.basename(part.path) for part in found] == ["a.jsonl", "b.jsonl"]
    assert [each for part in found for each in documents(part, Problems())] == read(source)


def test_files_that_change_while_they_are_read(tmp_path, lines):
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


def test_long_lines_are_counted_and_cost_no_memory(tmp_path, lines, skipped):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.write(lines(1) + b'{"text": "')
        for _ in range(40):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + lines(1))
    source = RowFiles(path=str(path), max_bytes=100_000)
    tracemalloc.start()
    left = skipped(source, r"a\.jsonl:2: a line of 40,000,013 bytes, and max_bytes of this input is 100,000")
    assert tracemalloc.get_traced_memory()[1] < 8_000_000
    tracemalloc.stop()
    assert [each.location for each in left] == ["line 1", "line 3"]
    wide = TextFiles(path=str(path), encoding="utf-8,gb18030", max_bytes=100_000)  # where characters end is not known
    assert not skipped(wide, "a document of 40,000,099 bytes, and max_bytes of this input is 100,000; set it higher")


@pytest.mark.parametrize("split", ["file", "paragraph", "line"])
def test_texts_that_are_too_long_are_cut_and_cost_no_memory(tmp_path, split, texts):
    path, text = tmp_path / "a.txt", "one\ntwo " + "three 四 " * 60_000 + "五" * 60_000 + "\nsix\n"
    path.write_text(text, encoding="utf-8")
    source, problems = TextFiles(path=str(path), split=split, max_bytes=10_000), Problems()
    tracemalloc.start()
    found = [(each, each.text.encode()) for each in documents(source, problems)]
    assert tracemalloc.get_traced_memory()[1] < 4_000_000
    tracemalloc.stop()
    ends = "" if split == "file" else "\n"  # which are left out
    assert "".join(each.text for each, _ in found).replace(ends, "") == text.replace(ends, "")
    assert max(len(data) for _, data in found) <= 10_000 and len(found) >= 80
    assert all(data.endswith((b" ", "五".encode())) for each, data in found[1:-1])
    assert all(path.read_bytes()[each.offset :].startswith(data) for each, data in found)
    [note] = problems.notes
    assert note == "cuts in texts longer than max_bytes=10,000, where a line, a word or a character ends"
    assert problems.notes[note] == len(found) - (3 if split == "line" else 1)
    path.write_bytes(b"x" * 10 + b"\n")
    assert texts(TextFiles(path=str(path), split=split, max_bytes=11)) == ["x" * 10 + "\n" * (split == "file")]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("split", ["file", "paragraph", "line"])
def test_cutting_knows_where_lines_end(tmp_path, split, newline, read):
    path, rows = tmp_path / "a.txt", ["a" * 10, "bbb", "", "c c c c c c c", "四四四四", "d" * 25, "", "", "e"]
    path.write_bytes(content := newline.join([*rows, ""]).encode())
    begins = [0, *(at + 1 for at, byte in enumerate(content) if byte == 10)]
    for most in range(5, 40):  # a character of Chinese and the end of its line
        source = TextFiles(path=str(path), split=split, max_bytes=most)
        found = read(source)
        told = [(each.location, each.offset, each.text) for each in found]
        if split == "file":
            assert "".join(each.text for each in found).encode() == content
        else:  # every line but the empty ones, in order
            text = "".join(each.text for each in found)
            assert text.replace("\r", "").replace("\n", "") == "".join(rows)
        for each in found:
            at = int(each.location.split(" ")[1]) - 1
            assert begins[at] <= each.offset < begins[at + 1]  # the line it begins in
            assert content[each.offset :].startswith(each.text.encode()) and len(each.text.encode()) <= most
        if split == "line":
            assert [row for row in rows if row and len((row + newline).encode()) <= most] == [
                each.text for each in found if each.text in rows and len((each.text + newline).encode()) <= most
            ]
        for step in range(1, 60, 7) if split != "file" else ():
            parted = [each for part in cut(parts(source)[0], step) for each in documents(part, Problems())]
            assert [(each.location, each.offset, each.text) for each in parted] == told


def test_a_file_that_breaks_keeps_what_came_before(tmp_path, skipped):
    packed = gzip.compress("".join(f"{n * n % 7919} this is line {n}\n" for n in range(3000)).encode())
    (tmp_path / "a.txt.gz").write_bytes(packed[: len(packed) // 2])
    [kept] = skipped(TextFiles(path=f"{tmp_path}/a.txt.gz"), r"a\.txt\.gz: .*what follows cannot be read")
    assert 1000 < kept.text.count("\n") < 2000
    (tmp_path / "a.txt.gz").write_bytes(packed[:4])
    assert not skipped(TextFiles(path=f"{tmp_path}/a.txt.gz"), r"a\.txt\.gz: .*what follows cannot be read")


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
        next(documents(source, Problems()))  # imports what it needs
        tracemalloc.start()
        native = max(pa.total_allocated_bytes() for _ in documents(source, Problems())) - arrow
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 4_000_000 > native  # of 8 MB, of which a row group has 2.8 MB


def test_nul_bytes_empty_files_and_equal_ids(tmp_path, read):
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


def test_what_is_no_unicode_in_names(tmp_path, read):
    (tmp_path / "a.jsonl").write_bytes(b'{"id": "\\ud800x", "text": "one"}\n')
    assert [each.id for each in read(RowFiles(path=f"{tmp_path}/a.jsonl"))] == ["?x"]
    (tmp_path / "b\udcff.jsonl").write_bytes(b"")
    with pytest.raises(ValueError, match=r"b\\udcff\.jsonl': the name of this file is not UTF-8; rename it"):
        read(RowFiles(path=str(tmp_path)))


@pytest.mark.parametrize("encoding", ["utf-8", "gb18030", "latin-1"])
def test_a_line_of_wide_spaces_is_blank(tmp_path, encoding, texts):
    wide = "" if encoding == "latin-1" else "\u3000\u3000"
    (tmp_path / "a.txt").write_bytes(f"one\n{wide}\ntwo ? \n?\n".encode(encoding))
    found = texts(TextFiles(path=f"{tmp_path}/a.txt", split="paragraph", encoding=encoding))
    assert found == ["one", "two ? \n?"]


def test_mixed_encodings(tmp_path, lines, skipped, texts):
    (tmp_path / "a.txt").write_bytes(
        "你好\n".encode() + "你好\n".encode("gb18030") + "café\n".encode("latin-1") + b"end\n"
    )
    left = skipped(TextFiles(path=f"{tmp_path}/a.txt", split="line"), "not UTF-8 at byte offset 7")
    assert [each.text for each in left] == ["你好", "end"]
    problems = Problems()
    several = TextFiles(path=f"{tmp_path}/a.txt", split="line", encoding="UTF8,gb18030,latin-1")
    assert texts(several, problems) == ["你好", "你好", "café", "end"]
    assert problems.notes == {"documents in GB18030": 1, "documents in LATIN-1": 1}
    (tmp_path / "b.jsonl").write_bytes(lines(2).decode().encode("gbk"))
    assert texts(RowFiles(path=f"{tmp_path}/b.jsonl", encoding="gbk")) == ["row 0 你好", "row 1 你好"]
    (tmp_path / "c.txt").write_text("你\n好\n", encoding="utf-16")
    assert texts(TextFiles(path=f"{tmp_path}/c.txt", encoding="utf-16")) == ["你\n好\n"]
    wrong = {"unknown encoding: gbq": {"encoding": "gbq"}, "iconv -f utf-16": {"encoding": "utf-16", "split": "line"}}
    for message, values in wrong.items():
        with pytest.raises(ValueError, match=message):
            TextFiles(path="x", **values)
    with pytest.raises(ValueError, match="--parquet has no encoding of its own"):
        RowFiles(kind="parquet", path="x", encoding="gbk")
