import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.tokenizers import tokenizer as tokenizers
from jaxllm.data.tokenizers.pieces import CHUNK_CHARS
from jaxllm.data.tokenizers.pieces_training import TokenizerConfig, sample

HARD_TEXTS = [
    "",
    " ",
    "  two  spaces  ",
    "\n\n\t\r\n",
    "line\u2028separator\u0085nel",
    "literal \u2581 mark",
    "\u2581\u2581 \u2581",
    "emoji 😀👩‍👩‍👧 flags 🇫🇷",
    "中文，没见过的字：龘",
    "e\u0301 is not é",
    "\x00\x01\ufeff\ufffe\ufdd0",
    "<|user|><bos><pad></s><0x41>",
]
TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@pytest.fixture(params=["bpe", "byte"])
def tokenizer(request):
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_decode_of_encode_is_the_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=100, deadline=None)
@given(text=TEXT)
def test_round_trip_of_any_text(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert not set(ids) & set(bpe.special.values())


@settings(max_examples=50, deadline=None)
@given(texts=st.lists(TEXT, max_size=5))
def test_batch_equals_one_by_one(bpe, texts):
    assert bpe.encode_batch(texts) == [bpe.encode(text) for text in texts]


@settings(max_examples=100, deadline=None)
@given(ids=st.lists(st.integers(0, 261)))
def test_stream_joins_to_decode_for_any_ids(byte, ids):
    stream = byte.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == byte.decode(ids)


def test_stream_never_splits_a_character(tokenizer):
    stream = tokenizer.stream()
    pushed = [stream.push(token) for token in tokenizer.encode("aé😀龘z")]
    assert "".join(pushed) == "aé😀龘z"
    assert stream.flush() == ""
    assert "\ufffd" not in "".join(pushed)
    assert "" in pushed  # some character needed several ids


def test_stream_flush_shows_an_unfinished_character(byte):
    stream = byte.stream()
    assert stream.push(byte.encode("é")[0]) == ""
    assert stream.flush() == "\ufffd"


def test_special_ids_are_fixed_and_dropped_by_decode(bpe, byte):
    roles = ["<|system|>", "<|user|>", "<|assistant|>"]
    assert list(byte.special.items()) == list(zip(["<pad>", "<bos>", "<eos>", *roles], range(6), strict=True))
    assert list(bpe.special.items()) == list(zip(["<pad>", "<bos>", "<eos>", "<unk>", *roles], range(7), strict=True))
    assert (bpe.pad_id, bpe.bos_id, bpe.eos_id) == (byte.pad_id, byte.bos_id, byte.eos_id) == (0, 1, 2)
    assert bpe.decode([1, *bpe.encode("fox"), 2, 4]) == "fox"
    assert byte.vocab_size == 262


def test_newline_and_digits_are_tokens_of_their_own(bpe):
    assert len(bpe.encode("\n\n\n")) == 3
    assert len(bpe.encode("345")) == 3


def test_long_text_is_cut_without_a_trace(bpe):
    text = ("the sea   shells are\n\n  here 狐狸 " * 4000)[: 2 * CHUNK_CHARS + 17]
    assert bpe.encode(text) == bpe.pieces._model.encode(text)
    unbroken = "狐" * (CHUNK_CHARS + 100)
    assert bpe.decode(bpe.encode(unbroken)) == unbroken


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_training_is_deterministic(algorithm, texts):
    config = TokenizerConfig(algorithm=algorithm, vocab_size=380, character_coverage=1.0)
    first, second = (tokenizers.train(iter(texts * 3), config) for _ in range(2))
    assert first.pieces.proto == second.pieces.proto
    assert first.fingerprint == second.fingerprint
    for text in HARD_TEXTS:
        assert first.decode(first.encode(text)) == text


def test_common_words_are_learned(bpe):
    assert len(bpe.encode("sea shells")) <= 4
    assert len(bpe.encode("狐狸")) <= 2


def test_small_text_gives_a_small_vocabulary():
    trained = tokenizers.train(["ab"], TokenizerConfig(vocab_size=5000))
    assert trained.vocab_size < 300
    assert trained.decode(trained.encode("anything 龘")) == "anything 龘"


def test_too_small_vocabulary_names_what_is_needed():
    many = "".join(chr(0x4E00 + i) for i in range(500))
    with pytest.raises(ValueError, match=r"vocab_size=300 is too small: .* are 76\d ids; set vocab_size"):
        tokenizers.train([many], TokenizerConfig(vocab_size=300, character_coverage=1.0))


def test_no_text_is_an_error():
    with pytest.raises(ValueError, match="no text to train a tokenizer on"):
        tokenizers.train(["", "\n\n"], TokenizerConfig())


def test_lines_that_sentencepiece_drops_are_cut_apart():
    trained = tokenizers.train(
        ["wordy\twordy\0wordy\u2585wordy\u2581" + "wordy " * 3000], TokenizerConfig(vocab_size=400)
    )
    assert len(trained.encode("wordy")) == 1


def test_sample_is_bounded_spread_and_in_order():
    lines = [f"{number:05d}" for number in range(2000)]
    kept = sample(iter(lines), 500)
    assert len(kept) == 100
    assert kept == sorted(kept) == sample(iter(lines), 500)
    assert kept[0] < "00200"
    assert kept[-1] > "01800"
    assert sample(iter(lines), 10**6) == lines


def test_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match="surrogate"):
        tokenizer.encode("\ud800")


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "data" / "tokenizer")
    for path in (tmp_path / "data" / "tokenizer", tmp_path / "data"):
        loaded = tokenizers.load(path)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.special == tokenizer.special
        assert loaded.chat.source == tokenizer.chat.source
        assert loaded.encode("fox\u2581狐") == tokenizer.encode("fox\u2581狐")


def test_load_refuses_what_was_changed(bpe, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    with pytest.raises(ValueError, match="was changed: its files have fingerprint"):
        tokenizers.load(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(description | {"version": 99}))
    with pytest.raises(ValueError, match="version 99; this jaxllm reads version 1"):
        tokenizers.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="is no tokenizer"):
        tokenizers.load(tmp_path / "nothing")


def test_plain_model_file_uses_its_own_tokens(bpe, tmp_path):
    (tmp_path / "spm.model").write_bytes(bpe.pieces.proto)
    plain = tokenizers.load(tmp_path / "spm.model")
    assert plain.special == bpe.special
    assert plain.chat is not None
    assert plain.encode("fox 狐") == bpe.encode("fox 狐")
    bpe.save(tmp_path / "saved")
    for place, file in (("bad.model", "bad.model"), ("saved", "saved/spm.model")):
        (tmp_path / file).write_bytes(b"no model")
        said = f"{tmp_path / file} is not a SentencePiece model (8 bytes); it was damaged, or is another kind of file"
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            tokenizers.load(tmp_path / place)


def _foreign(tmp_path, texts, **options):
    import sentencepiece

    prefix = str(tmp_path / "foreign")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=prefix,
        vocab_size=150,
        minloglevel=2,
        hard_vocab_limit=False,
        **options,
    )
    return tmp_path / "foreign.model"


def test_foreign_model_with_leading_space(tmp_path, texts):
    import sentencepiece

    path = _foreign(tmp_path, texts)
    foreign = tokenizers.load(path)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    text = "the fox sells shells"
    assert foreign.encode(text) == reference.encode(text)
    assert foreign.decode(foreign.encode(text)) == text
    stream = foreign.stream()
    assert "".join(map(stream.push, foreign.encode(text))) + stream.flush() == text
    assert foreign.chat is None
    assert foreign.pad_id == 0  # it has no pad: unk pads
    foreign.save(tmp_path / "saved")
    assert tokenizers.load(tmp_path / "saved").encode(text) == reference.encode(text)


def test_foreign_model_without_bos_is_refused(tmp_path, texts):
    with pytest.raises(ValueError, match="has bos id None and eos id"):
        tokenizers.load(_foreign(tmp_path, texts, bos_id=-1))


@pytest.mark.parametrize("where", ["chat_template.jinja", "tokenizer_config.json"])
def test_the_chat_template_beside_a_foreign_model_counts(where, tmp_path, texts):
    directory = tmp_path / "model"
    directory.mkdir()
    _foreign(tmp_path, texts).rename(directory / "tokenizer.model")
    template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": template}]
    content = template if where.endswith("jinja") else json.dumps({"chat_template": named})
    (directory / where).write_text(content, encoding="utf-8")
    foreign = tokenizers.load(directory)
    assert foreign.chat.source == template
    foreign.save(tmp_path / "saved")
    assert tokenizers.load(tmp_path / "saved").chat.source == template
