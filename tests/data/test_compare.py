import pytest

from jaxllm import prepare
from jaxllm.data import compare
from jaxllm.data.tokenizers import tokenizer

EN = "the quick brown fox has 2024 reasons to jump over lazy dogs again"
ZH = "狐狸有很多理由跳过懒狗，今天也是。"


def test_script_is_that_of_most_letters():
    found = [compare.script(text) for text in (EN, ZH, "Привет, мир", "１２３ ...", "ひらがなと漢字です", "한국어")]
    assert found == ["Latin", "Han", "Cyrillic", "none", "Hiragana", "Hangul"]


def test_bytes_are_measured_exactly():
    measured = compare.measure("bytes", tokenizer.byte_tokenizer(), {"Latin": ["ab cd", "x"], "Han": ["狐狸。"]})
    assert measured.scripts["Latin"] == (1.0, 2.0, 0.0)  # 6 bytes, 3 words
    assert measured.scripts["Han"] == (1.0, 4.5, 1.0)  # 9 bytes, 2 characters
    assert measured.scripts["all"] == (1.0, 3.0, 0.6)
    assert (measured.lossless, measured.single_digits, measured.chat, measured.vocab_size) == (1.0, True, True, 262)


def test_trained_candidates_are_measured_on_texts_that_they_did_not_see():
    texts = [f"{EN} {number}" if number % 2 else f"{ZH}{number}" for number in range(100)]
    texts[50] = "龘靐龗 " * 20  # the sixth that is held out
    bpe, plain = compare.compare(["bpe:400", "bytes"], texts, 10**6)
    assert bpe.vocab_size <= 400 and bpe.lossless == 1.0 and bpe.single_digits and bpe.chat
    assert bpe.scripts["all"].bytes_per_token > plain.scripts["all"].bytes_per_token == 1.0
    assert bpe.scripts["Han"].broken > 0.5 and list(bpe.scripts) == ["all", "Han"]
    with pytest.raises(ValueError, match="comparing needs 10 documents, and there are 9"):
        compare.compare(["bytes"], texts[:9], 10**6)


def test_command_prints_tables_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("\n".join(f"{EN} {n}\n{ZH}{n}" for n in range(40)), encoding="utf-8")
    flags = ["--text", "a.txt", "--split", "line", "--compare", "bpe:400,unigram:400,bytes"]
    assert prepare.main(flags) is None
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("unigram:400", "one by one", "100.0%", "Latin", "Han"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert prepare.main([*flags[:-1], "bpe:many"]) == 2
    assert "'bpe:many' needs a vocabulary size, such as bpe:8000" in capsys.readouterr().err
