import json

import pytest

from jaxllm.data.tokenizers.text_pairs import load

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
VOCABULARY = [*SPECIAL, "a", "cat", "##s", "sat", ".", "[", "]", "se", "##p", "猫", "été", "ete"]


@pytest.fixture
def directory(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")
    return tmp_path


def words(tokenizer, ids):
    return [VOCABULARY[token] for token in ids]


def test_word_pieces_and_pairs(directory):
    tokenizer = load(directory)
    one, two = tokenizer.encode(["A Cats  sat.猫猫 dog", ("a cat", "Été")], 99)
    assert words(tokenizer, one.ids) == ["[CLS]", "a", "cat", "##s", "sat", ".", "猫", "猫", "[UNK]", "[SEP]"]
    assert words(tokenizer, two.ids) == ["[CLS]", "a", "cat", "[SEP]", "ete", "[SEP]"]
    assert two.types == [0, 0, 0, 0, 1, 1]
    assert (tokenizer.pad_id, tokenizer.mask_id, tokenizer.mask, tokenizer.size) == (0, 4, "[MASK]", len(VOCABULARY))


def test_settings_are_followed(directory):
    (directory / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    assert words(None, load(directory).encode(["A été"], 9)[0].ids) == ["[CLS]", "[UNK]", "été", "[SEP]"]


def test_special_tokens_of_a_text_are_text_unless_asked_for(directory):
    tokenizer = load(directory)
    assert words(tokenizer, tokenizer.encode(["[SEP]"], 9)[0].ids) == ["[CLS]", "[", "se", "##p", "]", "[SEP]"]
    assert tokenizer.encode(["[SEP]"], 9, special=True)[0].ids == [2, 3, 3]
    assert tokenizer.encode(["[SEP]"], 9)[0].ids == [2, 10, 12, 13, 11, 3]  # the choice does not stay


def test_long_texts(directory):
    tokenizer = load(directory)
    with pytest.raises(ValueError, match=r"text 1 has 7 tokens and the model takes 6 .*truncate=True"):
        tokenizer.encode(["a", "a a a a a"], 6)
    assert tokenizer.encode(["a a a a a"], 6, truncate=True)[0].ids == [2, 5, 5, 5, 5, 3]
    assert len(tokenizer.encode([("a a a a a", "cat")], 6, truncate=True)[0].ids) == 6
    assert len(tokenizer.encode(["a a a a a"], 7)[0].ids) == 7  # the choice does not stay


def test_saved_and_loaded(directory, tmp_path):
    (directory / "tokenizer_config.json").write_text(json.dumps({"mask_token": {"content": "[MASK]"}, "x": 1}))
    before = load(directory)
    before.save(tmp_path / "again")
    after = load(tmp_path / "again")
    assert (after.source, after.settings, after.mask_id) == (before.source, before.settings, 4)


def test_missing_parts(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json and no vocab\.txt"):
        load(tmp_path / "nothing")
    (directory / "tokenizer_config.json").write_text(json.dumps({"mask_token": "<gap>"}))
    with pytest.raises(ValueError, match=r"vocab\.txt lacks <gap>"):
        load(directory)
