"""Tokenizers of GGUF files against the tokenizers that they were made from."""

import io
import json
import random

import pytest
import sentencepiece
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

from jaxllm.data.tokenizers import gguf_tokens
from jaxllm.data.tokenizers.fast_pieces import FastPieces
from jaxllm.data.tokenizers.tokenizer import Tokenizer as Ours

TEXTS = [
    "Hello world, it's 12345 o'clock", " two  spaces",
    "naïve café, 你好！", "emoji 👩‍🔬 end", "tabs\tand\nlines\r\n\n", "",
    "a" * 300, "   before and after   ", "WE'LL see x1 y22 z333", "the cat and the hat, and then the rat that sat",
]  # fmt: skip
ALPHABET = [*"etaoinshr dlu  \n0123", "é", "你", "Ж", "👍", "▁"]


def texts():
    rng = random.Random(0)
    return TEXTS + ["".join(rng.choices(ALPHABET, k=40)) for _ in range(300)]


def metadata(model, **keys):
    return {"tokenizer.ggml.model": model} | {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def build(found):
    source, config = gguf_tokens.describe(found, "model.gguf")
    return FastPieces(source), config


@pytest.fixture(scope="module", params=[True, False], ids=["with a space before", "without"])
def spm(request):
    """(SentencePiece's own model, its metadata in a GGUF file), with byte fallback and one control token more."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([text for text in TEXTS * 20 if text]), model_writer=model, model_type="bpe",
        vocab_size=400, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=request.param,
        remove_extra_whitespaces=False, control_symbols=["<|user|>"], hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor()
    theirs.LoadFromSerializedProto(model.getvalue())
    ids = range(theirs.vocab_size())
    kinds = [(theirs.is_unknown, 2), (theirs.is_control, 3), (theirs.is_byte, 6)]
    keys = {
        "tokens": [theirs.id_to_piece(i) for i in ids], "scores": [theirs.get_score(i) for i in ids],
        "token_type": [next((kind for test, kind in kinds if test(i)), 1) for i in ids],
        "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "pre": "default",
    }  # fmt: skip
    if not request.param:  # and what llama.cpp takes its absence for
        keys["add_space_prefix"] = False
    return theirs, metadata("llama", **keys)


def test_sentencepiece_models_give_the_ids_and_texts_of_sentencepiece(spm):
    theirs, found = spm
    pieces, config = build(found)
    ours = Ours(pieces, pieces.special, (2, 1, 2), None)
    for text in texts():
        ids = theirs.encode(text)
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
    assert pieces.prefix == (1,)  # bos, by default
    assert config == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": None, "chat_template": None}
    assert set(pieces.special) == {"<unk>", "<s>", "</s>", "<|user|>"}


def test_a_user_defined_token_of_spaces_is_found_in_the_text(spm):
    _, found = spm
    for spelling in ("▁▁▁", "   "):  # as older and as newer converters write it
        longer = {**found, "tokenizer.ggml.tokens": [*found["tokenizer.ggml.tokens"], spelling]}
        longer["tokenizer.ggml.scores"] = [*found["tokenizer.ggml.scores"], -1000.0]
        longer["tokenizer.ggml.token_type"] = [*found["tokenizer.ggml.token_type"], 4]
        pieces, _ = build(longer)
        [ids] = pieces.encode(["the   cat"])
        before, after = pieces.encode(["the", "cat"])  # a text begins anew behind it, as in llama.cpp
        assert ids == [*before, pieces.size - 1, *after]


@pytest.fixture(scope="module")
def byte_level():
    """Metadata of a byte-level BPE without `pre`, and its vocabulary and merges."""
    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    model.train_from_iterator(TEXTS * 3, trainer)
    raw = json.loads(model.to_str())["model"]
    tokens = sorted(raw["vocab"], key=raw["vocab"].get)
    merges = [" ".join(merge) for merge in raw["merges"]]
    types = [3] * 3 + [1] * (len(tokens) - 3)
    return metadata("gpt2", tokens=tokens, merges=merges, token_type=types, eos_token_id=0, bos_token_id=1)


def cuts(pieces, text):
    """How the text is cut before merging."""
    model = Tokenizer.from_str(pieces.source)
    return [text[start:stop] for _, (start, stop) in model.pre_tokenizer.pre_tokenize_str(text)]


# How each kind cuts "WE'LL see HelloWorld 12345/\n\n  x", by hand from the expression of the original.
CUTS = {
    "gpt-2": ["WE", "'", "LL", " see", " HelloWorld", " 12345", "/", "\n\n ", " x"],
    "smollm": ["WE", "'", "LL", " see", " HelloWorld", " ", "1", "2", "3", "4", "5", "/", "\n\n ", " x"],
    "llama-bpe": ["WE", "'LL", " see", " HelloWorld", " ", "123", "45", "/\n\n", " ", " x"],
    "qwen2": ["WE", "'LL", " see", " HelloWorld", " ", "1", "2", "3", "4", "5", "/\n\n", " ", " x"],
    "tekken": ["WE", "'LL", " see", " Hello", "World", " ", "1", "2", "3", "4", "5", "/\n\n", " ", " x"],
}


@pytest.mark.parametrize("pre", CUTS)
def test_text_is_cut_as_the_original_cuts_it(byte_level, pre):
    pieces, _ = build(byte_level | {"tokenizer.ggml.pre": pre})
    assert cuts(pieces, "WE'LL see HelloWorld 12345/\n\n  x") == CUTS[pre]
    ours = Ours(pieces, pieces.special, (0, 0, 0), None)
    for text in texts():
        assert ours.decode(ours.encode(text)) == text
    assert pieces.prefix == ((1,) if pre in ("llama-bpe", "tekken") else ())  # what absence means to llama.cpp


def test_gpt2_and_qwen2_give_the_ids_of_their_own_libraries(byte_level):
    vocabulary = {token: i for i, token in enumerate(byte_level["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ")) for merge in byte_level["tokenizer.ggml.merges"]]
    theirs = Tokenizer(models.BPE(vocabulary, merges))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    gpt2, _ = build(byte_level | {"tokenizer.ggml.pre": "gpt-2"})
    assert [each.ids for each in theirs.encode_batch(texts())] == gpt2.encode(texts())
    qwen, _ = build(byte_level | {"tokenizer.ggml.pre": "qwen2"})
    assert qwen.encode(["cafe\u0301"]) == qwen.encode([normalizers.NFC().normalize_str("cafe\u0301")])
    assert gpt2.encode(["cafe\u0301"]) != gpt2.encode(["caf\u00e9"])


def test_a_word_that_is_a_token_needs_no_merges_in_llama3(byte_level):
    merged = byte_level | {"tokenizer.ggml.merges": [], "tokenizer.ggml.pre": "llama-bpe"}
    tokens = byte_level["tokenizer.ggml.tokens"]
    whole = tokens.index("Ġand")
    assert build(merged)[0].encode([" and"]) == [[whole]]
    assert len(build(merged | {"tokenizer.ggml.pre": "qwen2"})[0].encode([" and"])[0]) == 4


def test_bos_eos_template_and_ends_come_from_the_file(byte_level):
    keys = {
        "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True,
        "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    pieces, config = build(byte_level | keys)
    assert pieces.prefix == (1,)
    whole = Tokenizer.from_str(pieces.source).encode("x").ids
    assert (whole[0], whole[-1], len(whole)) == (1, 0, 3)
    assert config["chat_template"] == "{{ messages }}"
    assert gguf_tokens.stop_ids(byte_level) == [0, 2]
    assert gguf_tokens.stop_ids(byte_level | {"tokenizer.ggml.eot_token_id": 1}) == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "kimi-k2"}, r"pre='kimi-k2': how it cuts text is not known; known are gpt-2, smollm, star"),
        ({"model": "t5"}, r"model='t5': known are 'llama' and 'gpt2'"),
        ({"merges": ["a b c"]}, r"merges has 'a b c': a merge is two pieces"),
        ({"add_space_prefix": True}, r"add_space_prefix=True: only for the model 'llama'"),
        ({"token_type": [1]}, r"token_type has 1 entries for \d+ tokens"),
        ({"tokens": ["a", "a"], "token_type": [1, 1]}, r"tokens names 1 tokens twice"),
        ({"remove_extra_whitespaces": True}, r"remove_extra_whitespaces=True: only False"),
        ({"precompiled_charsmap": [1]}, r"precompiled_charsmap: unknown, and it may change the ids"),
        ({"model": "llama"}, r"tokenizer\.ggml\.scores: missing"),
    ],
)  # fmt: skip
def test_what_cannot_be_exact_is_refused(byte_level, change, message):
    found = byte_level | {"tokenizer.ggml.pre": "gpt-2"} | {f"tokenizer.ggml.{key}": v for key, v in change.items()}
    with pytest.raises(ValueError, match=message):
        build(found)


def test_a_file_without_a_tokenizer_is_refused():
    with pytest.raises(ValueError, match=r"model\.gguf has no tokenizer"):
        gguf_tokens.describe({}, "model.gguf")
