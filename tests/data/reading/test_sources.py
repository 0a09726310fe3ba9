import json

import pytest

from jaxllm.data.documents import Conversation, Document, Message
from jaxllm.data.problems import Problems
from jaxllm.data.reading import pydocs
from jaxllm.data.reading.sources import PyDocs, RowFiles, TextFiles, World, conversations, documents

SEPARATORS = "a\u2028b\u2029c\u0085d"


def rows(path, *values):
    path.write_bytes(
        b"".join((value if isinstance(value, bytes) else json.dumps(value).encode()) + b"\n" for value in values)
    )
    return str(path)


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("file", [("one\ntwo\n\n\nthree\n", "whole file", None)]),
        ("paragraph", [("one\ntwo", "line 1", 0), ("three", "line 5", 10)]),
        ("line", [("one", "line 1", 0), ("two", "line 2", 4), ("three", "line 5", 10)]),
    ],
)
def test_splits(tmp_path, split, expected, read):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\ntwo\n\n\nthree\n")
    assert read(TextFiles(path=str(path), split=split)) == [
        Document(text, str(path), place, offset) for text, place, offset in expected
    ]


@pytest.mark.parametrize("split", ["file", "paragraph", "line"])
def test_only_newlines_end_a_line(tmp_path, split, read):
    path = tmp_path / "a.txt"
    path.write_text(SEPARATORS, encoding="utf-8")
    assert [document.text for document in read(TextFiles(path=str(path), split=split))] == [SEPARATORS]
    row = rows(
        tmp_path / "a.jsonl", {"text": SEPARATORS}, json.dumps({"text": SEPARATORS}, ensure_ascii=False).encode()
    )
    assert [document.text for document in read(RowFiles(path=row))] == [SEPARATORS] * 2


def test_globs_are_sorted_and_deep(tmp_path, read):
    for name in ("b.txt", "sub/a.txt", "a.txt", "c.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert [document.text for document in read(TextFiles(path=f"{tmp_path}/**/*.txt"))] == [
        "a.txt",
        "b.txt",
        "sub/a.txt",
    ]
    with pytest.raises(FileNotFoundError, match=r"no file matches '.*\*\.csv'; quote the pattern"):
        read(TextFiles(path=f"{tmp_path}/*.csv"))
    assert len(read(TextFiles(path=f"{tmp_path}/**"))) == 4
    (tmp_path / "odd[1].txt").write_text("literal")
    (tmp_path / "odd1.txt").write_text("what the pattern would match")
    assert [document.text for document in read(TextFiles(path=f"{tmp_path}/odd[1].txt"))] == ["literal"]
    assert [document.text for document in read(TextFiles(path=f"{tmp_path}/sub"))] == ["sub/a.txt"]
    with pytest.raises(
        FileNotFoundError, match=r"named as --jsonl demands; its 6 files end in \.md, \.txt; .*/\*\*/\*'"
    ):
        read(RowFiles(path=str(tmp_path)))


def test_windows_files(tmp_path, read):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\r\n")
    assert [document.text for document in read(TextFiles(path=str(path), split="paragraph"))] == ["one", "two"]


def test_ten_megabyte_line(tmp_path, read):
    path = tmp_path / "a.txt"
    path.write_bytes(b"x" * 10_000_000)
    for split in ("line", "paragraph", "file"):
        assert [len(document.text) for document in read(TextFiles(path=str(path), split=split))] == [10_000_000]


def test_bad_bytes_name_file_and_offset(tmp_path, read):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\nbad \xff\xfe here\n\nfine")
    for split in ("file", "paragraph", "line"):
        with pytest.raises(
            ValueError,
            match=r"a\.txt: not UTF-8 at byte offset 10 \(byte 0xff: invalid start byte\); .*--errors skip .* replace",
        ):
            read(TextFiles(path=str(path), split=split))
    skip = Problems("skip")
    assert [document.text for document in read(TextFiles(path=str(path), split="line"), skip)] == ["good", "fine"]
    assert (skip.count, len(skip.examples)) == (1, 1)
    replace = Problems("replace")
    texts = [document.text for document in read(TextFiles(path=str(path), split="line"), replace)]
    assert texts == ["good", "bad \ufffd\ufffd here", "fine"]
    assert replace.count == 1


def test_utf16_is_named(tmp_path, read):
    (tmp_path / "a.txt").write_text("one\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"a\.txt: UTF-16 by its first two bytes; convert it: iconv -f utf-16"):
        read(TextFiles(path=f"{tmp_path}/a.txt"))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b"{broken", r"a\.jsonl:2: not JSON \(Expecting property name .* at column 2\)"),
        (b"[1]", r"a\.jsonl:2: a row must be a JSON object, found \[1\]; of a file"),
        (b'{"other": 1}', r"a\.jsonl:2: no text in field 'text': the row has 'other'"),
        (b'{"text": 5}', r"a\.jsonl:2: no text in field 'text': it is 5"),
        (b'{"text": "\xff"}', r"a\.jsonl:2: not UTF-8 at byte offset 26"),
        (b'{"text": "\\ud800"}', r"a\.jsonl:2: lone surrogate \\ud800 at character 0"),
        (b"[" * 100_000, r"a\.jsonl:2: JSON nested too deeply"),
    ],
)
def test_broken_rows_stop_or_are_counted(tmp_path, row, message, read):
    path = rows(tmp_path / "a.jsonl", {"text": "one"}, row, b"", {"text": "three"})
    with pytest.raises(ValueError, match=message) as error:
        read(RowFiles(path=path))
    can_be_replaced = "not UTF-8" in message
    assert str(error.value).endswith("or --errors replace" if can_be_replaced else "(leave it out and count it)")
    problems = Problems("skip")
    assert [(d.text, d.location) for d in read(RowFiles(path=path), problems)] == [
        ("one", "line 1"),
        ("three", "line 4"),
    ]
    assert problems.count == 1


def test_problem_examples_are_few():
    problems = Problems("skip")
    for number in range(100):
        problems.report(f"problem {number}")
    assert (problems.count, len(problems.examples)) == (100, 5)


def test_named_field(tmp_path, read):
    path = rows(tmp_path / "a.jsonl", {"body": "x", "text": "no"})
    assert [document.text for document in read(RowFiles(path=path, fields="body"))] == ["x"]


def test_conversation_formats(tmp_path):
    path = rows(
        tmp_path / "a.jsonl",
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "q"},
                {"role": "assistant", "content": "a"},
            ]
        },
    )
    found = list(conversations(RowFiles(path=path), Problems()))
    assert [each._replace(offset=None) for each in found] == [
        Conversation.pair("Add.\n\n1 2", "3", path, "line 1"),
        Conversation.pair("Hi", "Hello", path, "line 2"),
        Conversation((Message("system", "S"), Message("user", "q"), Message("assistant", "a")), path, "line 3"),
    ]
    seeds = rows(
        tmp_path / "c.jsonl",
        {"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}, {"input": "", "output": "?"}]},
    )
    found = list(conversations(RowFiles(path=seeds), Problems()))
    assert [each._replace(offset=None) for each in found] == [
        Conversation.pair("Add.\n\n1 2", "3", seeds, "line 1"),
        Conversation.pair("Add.", "?", seeds, "line 1"),
    ]
    pairs = rows(tmp_path / "b.jsonl", {"question": "q", "answer": "a"})
    [pair] = conversations(RowFiles(path=pairs, fields="question,answer"), Problems())
    assert pair == Conversation.pair("q", "a", pairs, "line 1")._replace(offset=0)


@pytest.mark.parametrize(
    ("row", "fields", "message"),
    [
        (
            {"question": "q"},
            None,
            "not a conversation: the row has 'question'; expected 'messages', or .* --jsonl FILE:PROMPT,ANSWER",
        ),
        ({"messages": "hi"}, None, "messages must be a non-empty list"),
        ({"messages": [{"role": "user"}]}, None, "message 0 must have a string role and content"),
        ({"instruction": 1, "output": "x"}, None, "no text in field 'instruction': it is 1"),
        ({"instruction": "x", "input": 3, "output": "x"}, "alpaca", "no text in field 'input': it is 3"),
        ({"q": "x"}, "q,a", "no text in field 'a'"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages", "lone surrogate"),
        ({"instruction": "x", "instances": [3]}, None, "'instances' must be a non-empty list of {input, output}"),
        ({"instances": [{"input": "", "output": "x"}]}, "instances", "no text in field 'instruction': the row has"),
    ],
)
def test_what_is_no_conversation(tmp_path, row, fields, message):
    path = rows(tmp_path / "a.jsonl", row)
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: .*{message}"):
        list(conversations(RowFiles(path=path, fields=fields), Problems()))
    problems = Problems("skip")
    assert not list(conversations(RowFiles(path=path, fields=fields), problems))
    assert problems.count == 1


def test_half_a_surrogate_pair_in_a_message_is_left_out(tmp_path):
    path = rows(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "a\ud800b"}]})
    problems = Problems("replace")
    assert not list(conversations(RowFiles(path=path), problems))
    assert problems.examples == [f"{path}:1: lone surrogate \\ud800 at character 1"]


def test_text_files_have_no_conversations():
    with pytest.raises(ValueError, match=r"--text a\.txt has no conversations"):
        list(conversations(TextFiles(path="a.txt"), Problems()))


def test_world_is_repeatable(read):
    source = World(count=20, seed=3)
    assert len(read(source)) == 20
    assert read(source) == read(source)
    assert len(list(conversations(source, Problems()))) == 20


def test_pydocs_read_source_files(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text(
        '"""Pack the things neatly."""\ndef f(a, *, b=1):\n    """Fold a into b.\n\n    More."""\n'
    )
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "x.py").write_text('"""Never read."""')
    (tmp_path / "bad.py").write_text("def (")
    (tmp_path / "late.py").write_text(
        'class C:\n    """A class that waits for its turn."""\n    def _p(self):\n        """Private, one sentence."""'
    )
    found = [(each.location, each.text) for each in pydocs.documents(tmp_path) if not each.location.startswith("topic")]
    assert found == [
        ("late.C", "late.C\n\nA class that waits for its turn."),
        ("late.C._p", "late.C._p(self)\n\nPrivate, one sentence."),
        ("pkg", "pkg\n\nPack the things neatly."),
        ("pkg.f", "pkg.f(a, *, b=1)\n\nFold a into b.\n\nMore."),
    ]
    pairs = {each.location: each.messages for each in pydocs.conversations(tmp_path)}
    assert list(pairs) == ["late.C", "pkg"]  # public names, one sentence
    assert "`late.C`" in pairs["late.C"][0].content
    assert pairs["late.C"][1] == Message("assistant", "A class that waits for its turn.")
    with pytest.raises(ValueError, match=r"no \.py files under"):
        list(pydocs.conversations(tmp_path / "nothing"))


def test_this_python_has_topics():
    topics = [
        document for document in (next(iter(documents(PyDocs(), Problems()))),) if document.location.startswith("topic")
    ]
    assert topics
