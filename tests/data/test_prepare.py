import io
import json
import os
import re
import zipfile

import numpy as np
import pytest
from rich.console import Console

from jaxllm.data import describe, report
from jaxllm.data.chat import ChatTemplate
from jaxllm.data.cleaning.clean import CleanConfig
from jaxllm.data.loader import DataConfig, Loader, Source
from jaxllm.data.packing import PackingConfig, plan
from jaxllm.data.prepare import assign_splits, prepare
from jaxllm.data.prepare_config import BytesTokenizer, ExistingTokenizer, PrepareConfig
from jaxllm.data.reading.sources import RowFiles, TextFiles, World
from jaxllm.data.shard_writer import Encoded
from jaxllm.data.shards import Dataset
from jaxllm.data.tokenizers import tokenizer as tokenizers
from jaxllm.data.tokenizers.pieces_training import TokenizerConfig


@pytest.fixture
def text_file(tmp_path, texts):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(texts * 2) + "\n\nx\n", encoding="utf-8")
    return TextFiles(path=str(path), split="line")


def show(made):
    out = io.StringIO()
    report.show(made, Console(file=out, width=150))
    return out.getvalue()


def test_text_to_dataset(tmp_path, text_file, texts):
    made = prepare(
        PrepareConfig(
            inputs=(text_file,),
            out=str(tmp_path / "data"),
            tokenizer=TokenizerConfig(vocab_size=400, character_coverage=1.0),
            validation=2,
            clean={"min_chars": 2},
            seq_len=64,
        )
    )
    train, validation = (Dataset.open(tmp_path / "data", split) for split in ("train", "validation"))
    tokenizer = tokenizers.load(tmp_path / "data")
    lines = [line.rstrip(" ") for text in texts for line in text.split("\n") if line]
    decoded = [tokenizer.decode(each.tokens(d)) for each in (train, validation) for d in range(len(each))]
    assert sorted(decoded) == sorted(lines)
    assert len(validation) == 2
    assert (made.documents_read, made.documents_kept) == (2 * len(lines) + 1, len(lines))
    assert (made.rules["min_chars"].dropped, made.rules["duplicate"].dropped) == (1, len(lines))
    assert made.bytes_kept == sum(len(line.encode()) for line in lines)
    assert made.splits["train"].tokens == train.lengths.sum()
    assert made.packing.rows == len(plan(train, PackingConfig(seq_len=64)))
    assert json.loads((tmp_path / "data" / "report.json").read_text(encoding="utf-8"))["documents_kept"] == len(lines)
    shown = show(made)
    assert f"{len(lines)} kept" in shown
    assert "duplicate" in shown
    assert "padding" in shown


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_directory_with_an_input_is_never_replaced_and_nothing_is_trained_before(
    tmp_path, text_file, monkeypatch, overwrite
):
    monkeypatch.setattr("jaxllm.data.prepare.make_tokenizer", lambda *_: pytest.fail("trained a tokenizer"))
    before = sorted(tmp_path.rglob("*"))
    pattern = TextFiles(path=str(tmp_path / "*.txt"))
    with pytest.raises(FileExistsError, match=rf"than {tmp_path}: the input .*a\.txt is in it"):
        prepare(PrepareConfig(inputs=(World(), pattern), out=str(tmp_path), overwrite=overwrite))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine").write_text("x")
    with pytest.raises(FileExistsError, match="it holds mine"):
        prepare(PrepareConfig(inputs=(World(),), out=str(tmp_path / "d"), overwrite=overwrite))
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "d", tmp_path / "d" / "mine"]


def test_the_same_input_gives_the_same_data(tmp_path, text_file):
    prints = []
    for name in ("a", "b"):
        prepare(PrepareConfig(inputs=(text_file,), out=str(tmp_path / name), tokenizer=TokenizerConfig(vocab_size=400)))
        prints.append(Dataset.open(tmp_path / name).fingerprint)
    assert prints[0] == prints[1]


def test_chat_with_an_existing_tokenizer_to_a_trained_batch(tmp_path):
    text = PrepareConfig(
        inputs=(World(count=300),), out=str(tmp_path / "text"), tokenizer=TokenizerConfig(vocab_size=800)
    )
    prepare(text)
    made = prepare(
        PrepareConfig(
            inputs=(World(count=100),),
            chat=True,
            out=str(tmp_path / "chat"),
            tokenizer=ExistingTokenizer(path=str(tmp_path / "text")),
            validation=0.1,
        )
    )
    assert made.kind == "chat"
    sources = (Source(path=str(tmp_path / "chat"), weight=0.85), Source(path=str(tmp_path / "text"), weight=0.15))
    loader = Loader(DataConfig(sources=sources, packing=PackingConfig(seq_len=256), batch_size=4, threads=0))
    tokenizer = tokenizers.load(loader.tokenizer_dir)
    row = loader.plans[0].row(0)
    answers = tokenizer.decode(row.targets[row.weights > 0])
    everything = tokenizer.decode(row.tokens)
    assert answers
    assert len(answers) < len(everything)
    assert (row.targets[row.weights > 0] == tokenizer.eos_id).sum() == (
        row.tokens == tokenizer.special["<|assistant|>"]
    ).sum()


def test_conversations_without_answers_stop(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "q"}]}\n')
    config = PrepareConfig(
        inputs=(RowFiles(path=str(path)),), chat=True, out=str(tmp_path / "d"), tokenizer=BytesTokenizer()
    )
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: no token of this conversation is learned"):
        prepare(config)
    assert not (tmp_path / "d").exists()
    with pytest.raises(ValueError, match=r"1 input unreadable \(first: .*a\.jsonl, line 1: no token of this"):
        prepare(config.model_copy(update={"errors": "skip"}))


def test_a_template_that_cannot_be_learned_from_is_named_whatever_the_policy(tmp_path):
    byte = tokenizers.byte_tokenizer()
    source = "{% for m in messages %}{{ m.content if loop.last else '' }}{{ eos_token }}{% endfor %}"
    byte.chat = ChatTemplate(source, tuple(byte.special))
    byte.save(tmp_path / "their")
    turn = '{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}'
    (tmp_path / "a.jsonl").write_text(f'{{"messages": [{turn}, {turn}]}}\n')
    config = PrepareConfig(
        inputs=(RowFiles(path=str(tmp_path / "a.jsonl")),), chat=True, out=str(tmp_path / "d"), errors="skip",
        tokenizer=ExistingTokenizer(path=str(tmp_path / "their")),
    )  # fmt: skip
    with pytest.raises(ValueError, match=rf"^the chat template of {tmp_path}/their begins an answer .*generation %"):
        prepare(config)


def test_bad_conversations_are_left_out_and_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    talk = lambda *turns: json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n"
    good = talk(("system", ""), ("user", "q"), ("assistant", "a?"))
    path.write_text(good + talk(("robot", "q"), ("assistant", "a")) + talk(("user", "nothing is answered")))
    config = PrepareConfig(
        inputs=(RowFiles(path=str(path)),), chat=True, out=str(tmp_path / "d"), tokenizer=BytesTokenizer(),
        errors="replace",
    )  # fmt: skip
    made = prepare(config)
    assert (made.documents_read, made.documents_kept, made.problems) == (3, 1, 2)
    assert made.splits["train"].documents == 1
    assert "a.jsonl, line 2: " in made.problem_examples[0] and "unknown role 'robot'" in made.problem_examples[0]
    assert "a.jsonl, line 3: no token of this conversation is learned" in made.problem_examples[1]
    ids = Dataset.open(tmp_path / "d").tokens(0)
    assert tokenizers.load(tmp_path / "d").decode(ids) == "qa?"
    assert ids[1] == 4  # the user speaks first: the empty system message is not there


def test_the_report_of_clean_data_has_no_table_of_losses_and_counts_in_plain_english(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n')
    made = prepare(
        PrepareConfig(inputs=(RowFiles(path=str(path)),), out=str(tmp_path / "d"), tokenizer=BytesTokenizer())
    )
    shown = show(made)
    assert "nothing was left out or changed" in shown and "examples" not in shown
    assert "1 document, 5 tokens, 4 trained" in shown
    assert "0 documents, 0 tokens" in shown
    assert "1 row of 512, " in shown and "--seq-len asks for another" in shown


def test_the_table_of_losses_has_only_those_and_shows_the_line_number_on_a_narrow_terminal(tmp_path):
    path = tmp_path / f"{'long' * 20}.jsonl"
    path.write_text('{"text": "one"}\n{bad\n')
    made = prepare(
        PrepareConfig(
            inputs=(RowFiles(path=str(path)),), out=str(tmp_path / "d"), tokenizer=BytesTokenizer(), errors="skip"
        )
    )
    out = io.StringIO()
    report.show(made, Console(file=out, width=60))
    assert "min_chars" not in out.getvalue() and "unreadable" in out.getvalue()
    assert f"unreadable: {path}:2: not JSON" in out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress(tmp_path, monkeypatch, terminal):
    monkeypatch.setenv("TERM", "xterm")

    def told(name, **intervals):
        for key, value in intervals.items():
            monkeypatch.setattr(report, key, value)
        console = Console(file=io.StringIO(), width=150, force_terminal=terminal)
        vocabulary = TokenizerConfig(vocab_size=600)
        made = prepare(
            PrepareConfig(inputs=(World(count=90),), out=str(tmp_path / name), tokenizer=vocabulary), console
        )
        return made, console.file.getvalue()

    made, shown = told("a", LIVE_S=0.0, LINE_S=0.0)
    stages = ["reading for the tokenizer", "training the tokenizer", "reading and tokenising", "writing"]
    assert sorted(stages, key=shown.index) == stages
    if not terminal:
        first, *_, last = (line for line in shown.splitlines() if not line.startswith("writing"))
        assert first.startswith("reading for the tokenizer: 1 document, 0.0 MB, ")
        assert re.fullmatch(rf"reading and tokenising: 90 documents, {made.bytes_read / 1e6:.1f} MB, [\d.]+ MB/s", last)
        assert told("b", LINE_S=1e9)[1] == ""


def test_the_page_has_the_rules_in_their_order_and_says_what_was_there_before_them(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "one or  \\nx@y.org at"}\n{"text": "{}"}\n')
    rules = CleanConfig(pii=["email"], lines={"min_words": 2})
    inputs = (RowFiles(path=f"{tmp_path}/a.jsonl"),)
    prepare(PrepareConfig(inputs=inputs, out=f"{tmp_path}/d", tokenizer=BytesTokenizer(), clean=rules))
    page = (tmp_path / "d/report.html").read_text(encoding="utf-8")
    found = [page.index(f'scope="row">{name}<') for name in ("lines", "trailing_space", "min_chars", "pii")]
    assert found == sorted(found) and "a.jsonl, line 2: &#39;{}&#39;" in page


def test_unreadable_rows_are_in_the_report(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{bad\n{"text": "two"}\n')
    config = PrepareConfig(inputs=(RowFiles(path=str(path)),), out=str(tmp_path / "d"), tokenizer=BytesTokenizer())
    with pytest.raises(ValueError, match=r"a\.jsonl:2: not JSON .*--errors skip \(leave it out and count it\)$"):
        prepare(config)
    made = prepare(config.model_copy(update={"errors": "skip"}))
    assert made.problems == 1
    assert "a.jsonl:2: not JSON" in made.problem_examples[0]
    shown = show(made).replace("\n", "")
    assert "a.jsonl:2: not JSON" in shown and "nothing was left out" not in shown


def test_what_archives_leave_out_and_what_is_replaced_is_in_the_report(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("a.txt", b"caf\xe9 au lait\n\nand more of it")
        archive.writestr("b.png", b"no text")
    inputs = (TextFiles(path=str(tmp_path / "a.zip")),)
    config = PrepareConfig(
        inputs=inputs, out=str(tmp_path / "out"), tokenizer=BytesTokenizer(), validation=0, errors="replace"
    )
    found = prepare(config)
    assert (found.documents_kept, found.problems, found.replaced) == (1, 1, 1)
    assert any("members of archives left out" in note and "png" in note for note in found.notes)
    shown = io.StringIO()
    report.show(found, Console(file=shown, width=200))
    assert re.search(r"unreadable\W+1\W+0\W", shown.getvalue())


@pytest.mark.parametrize("code", ["chinese", "ZH", "zh_CN", "cn", ""])
def test_what_is_no_code_of_a_language_is_refused(code):
    with pytest.raises(ValueError, match=f"{code!r} is none of the 176 languages"):
        CleanConfig(languages=(code,))


@pytest.mark.parametrize("content", ["", "\n \n\t\n"])
@pytest.mark.parametrize("tokenizer", [BytesTokenizer(), TokenizerConfig()])
def test_empty_corpus_is_an_error(tmp_path, content, tokenizer):
    path = tmp_path / "a.txt"
    path.write_text(content)
    config = PrepareConfig(inputs=(TextFiles(path=str(path)),), out=str(tmp_path / "d"), tokenizer=tokenizer)
    with pytest.raises(
        ValueError,
        match=r"no text is left: 1 document read, 0 inputs unreadable, .*min_chars dropped 1; check the sources",
    ):
        prepare(config)
    assert os.listdir(tmp_path) == ["a.txt"]


def test_one_line_is_a_corpus_and_says_that_nothing_is_held_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("just this line")
    made = prepare(PrepareConfig(inputs=(TextFiles(path=str(path)),), out=str(tmp_path / "d"), validation=0.5))
    assert made.splits["train"].documents == 1
    assert [note.split(";")[0] for note in made.notes] == [
        f"the text has pieces for a vocabulary of {made.vocab_size} only, not of 8192",
        "no document is held out: there is only 1, so training has no validation loss",
    ]
    with pytest.raises(ValueError, match="no document is left for training"):
        prepare(PrepareConfig(inputs=(TextFiles(path=str(path)),), out=str(tmp_path / "e"), validation=1))


@pytest.mark.parametrize(("vocab_size", "advice"), [(900, "use --vocab-size 600 or more text"), (600, None)])
def test_a_vocabulary_that_is_too_large_for_the_text_is_noted(tmp_path, vocab_size, advice):
    made = prepare(
        PrepareConfig(
            inputs=(World(count=300),), out=str(tmp_path / "d"), tokenizer=TokenizerConfig(vocab_size=vocab_size)
        )
    )
    assert made.vocab_size == vocab_size and 30_000 < made.bytes_kept < 60_000
    assert [note for note in made.notes if "large for" in note] == [note for note in made.notes if advice]
    assert not advice or f"a vocabulary of {vocab_size} is large for {made.bytes_kept:,} bytes" in made.notes[0]
    assert not advice or made.notes[0].endswith(advice)


def test_dropped_conversations_are_shown_as_json(tmp_path):
    path = tmp_path / "a.jsonl"
    row = '{"messages": [{"role": "user", "content": "你好\\n"}, {"role": "assistant", "content": "a"}]}\n'
    path.write_text(row * 2 + '{"messages": [{"role": "user"}]}\n{"messages": {"a": [1, true]}}\n', encoding="utf-8")
    made = prepare(
        PrepareConfig(
            inputs=(RowFiles(path=str(path)),), chat=True, out=str(tmp_path / "d"), tokenizer=BytesTokenizer(),
            errors="skip",
        )
    )  # fmt: skip
    assert made.rules["duplicate"].examples == [f'{path}, line 2: [{{"user": "你好"}}, {{"assistant": "a"}}]']
    assert made.problem_examples[0].endswith('a string role and content, found {"role": "user"}')
    assert made.problem_examples[1].endswith('a non-empty list of {role, content}, found {"a": [1, true]}')


def items(count):
    return [Encoded("s", str(number), [number], [], 1) for number in range(count)]


def test_split_by_share_and_by_number():
    share = list(assign_splits(items(2000), 0.1, seed=0))
    assert [item for _, item in share] == items(2000)
    held = [item.ids[0] for split, item in share if split == "validation"]
    assert 150 < len(held) < 250
    assert held == [item.ids[0] for split, item in assign_splits(items(2000), 0.1, seed=0) if split == "validation"]
    assert held != [item.ids[0] for split, item in assign_splits(items(2000), 0.1, seed=1) if split == "validation"]
    exact = list(assign_splits(items(500), 20, seed=0))
    assert sorted(item.ids[0] for _, item in exact) == list(range(500))
    held = [item.ids[0] for split, item in exact if split == "validation"]
    assert len(held) == 20
    assert held == sorted(held)
    assert np.ptp(held) > 250
    assert {split for split, _ in assign_splits(items(50), 0, seed=0)} == {"train"}


def test_describe_shows_what_is_learned_and_from_where(chat_dataset, byte):
    made = plan(Dataset.open(chat_dataset([(3, 4), (2, 3)])), PackingConfig(seq_len=12))
    first, second = describe.segments(made, 0, byte)
    assert (first.document, first.place, first.n_tokens) == (0, "document 0, chat, train 0", 6)
    expected = [("<bos>", False), ("\x05", False), ("\x0f", True), ("\x0f", True), ("<eos>", True)]
    assert [token[:2] for token in second.tokens] == expected
    out = io.StringIO()
    describe.show(made, 0, byte, "sample 0", Console(file=out, width=100, force_terminal=True, color_system="standard"))
    assert "\x1b[32m" in out.getvalue()  # green
    assert "\x1b[2m" in out.getvalue()  # dim
    assert "segment 2, 4 tokens: document 1, chat, train 1" in out.getvalue()
    assert "2 positions of padding" in out.getvalue()
    assert "⟦" not in out.getvalue()


@pytest.mark.parametrize(
    ("options", "legend", "learned"),
    [
        ({}, "⟦ ⟧: trained", "\x04⟦\x0e\x0e<eos>⟧"),
        ({"force_terminal": True, "color_system": "standard", "no_color": True}, "⟦ ⟧: trained", "⟦\x0e\x0e<eos>⟧"),
        ({"force_terminal": True, "color_system": "standard"}, "green: trained", "\x1b[32m\x0e\x0e<eos>\x1b[0m"),
    ],
    ids=["pipe", "NO_COLOR", "colours"],
)
def test_describe_marks_what_is_learned_with_and_without_colour(chat_dataset, byte, options, legend, learned):
    made = plan(Dataset.open(chat_dataset([(2, 3)])), PackingConfig(seq_len=12))
    console = Console(file=io.StringIO(), width=100, **options)
    describe.show_legend(console)
    describe.show(made, 0, byte, "sample 0", console)
    shown = console.file.getvalue()
    assert legend in shown.splitlines()[0]
    assert learned in shown


def test_describe_never_breaks_a_line(text_dataset, byte):
    made = plan(Dataset.open(text_dataset([90])), PackingConfig(seq_len=100))
    out = io.StringIO()
    describe.show(made, 0, byte, "s", Console(file=out, width=20))
    assert "".join(chr(97 + i % 26) for i in range(90)) in out.getvalue()


def test_describe_follows_the_loader(text_dataset, byte):
    path = text_dataset([20, 30, 40])
    loader = Loader(
        DataConfig(sources=(Source(path=str(path)),), packing=PackingConfig(seq_len=16), batch_size=2, threads=0)
    )
    next(loader)
    batch = next(loader)
    for index, sample in enumerate(range(2, 4)):
        source, row = loader.locate(sample)
        found = describe.segments(loader.plans[source], row, byte)
        shown = "".join(text for segment in found for text, *_ in segment.tokens)
        real = batch.segments[index] > 0
        assert byte.decode(batch.targets[index][real]).replace("<", "") in shown.replace("<bos>", "").replace(
            "<eos>", ""
        )
