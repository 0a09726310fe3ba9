import json

import pytest

from jaxllm.data.chat import ChatTemplate, encode_chat
from jaxllm.data.tokenizers import tokenizer as tokenizers

TEXTS = ["Hello world", " two  spaces", "naïve café, 你好！", "emoji 👩‍🔬 end", "tabs\tand\nlines\r\n", "", "a" * 300]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|im_start|>' + message['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A byte-level BPE with a chat template, as transformers saves it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    model = Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=specials, initial_alphabet=alphabet)
    model.train_from_iterator(TEXTS * 3, trainer)
    path = tmp_path_factory.mktemp("tokenizer")
    model.save(str(path / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}, "chat_template": CHATML}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_texts_come_back_whole_and_streamed(byte_level):
    tokenizer = tokenizers.load(byte_level)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        stream = tokenizer.stream()
        assert "".join(stream.push(token) for token in ids) + stream.flush() == text


def test_special_tokens_come_from_the_template_alone(byte_level):
    tokenizer = tokenizers.load(byte_level)
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.prefix) == (2, 0, ())
    assert not set(tokenizer.encode("<|im_start|>user")) & set(tokenizer.special.values())
    ids, _ = encode_chat(tokenizer, [{"role": "user", "content": "<|im_end|>"}], add_generation_prompt=True)
    assert ids.count(2) == 1
    assert ids[0] == 1


def test_a_conversation_is_encoded_at_once_and_its_answers_are_marked(byte_level):
    tokenizer = tokenizers.load(byte_level)
    tokenizer.chat = ChatTemplate(MARKED, tuple(tokenizer.special), "", "<|im_end|>")
    ids, trained = encode_chat(tokenizer, [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "你 b"}])
    assert tokenizer.decode([token for token, learned in zip(ids, trained, strict=True) if learned]) == "你 b"
    assert [token for token, learned in zip(ids, trained, strict=True) if learned][-1] == tokenizer.eos_id
    assert not trained[0]


def test_answers_without_generation_tags_are_those_that_transformers_finds_with_them(byte_level):
    from transformers import PreTrainedTokenizerFast

    tokenizer = tokenizers.load(byte_level)
    marked = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    )
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(byte_level / "tokenizer.json"), eos_token="<|im_end|>")
    turns = ("user", "Hello"), ("assistant", " two  spaces\n"), ("user", "naïve"), ("assistant", "你好！")
    messages = [{"role": role, "content": content} for role, content in turns]
    expected = theirs.apply_chat_template(
        messages, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, trained = encode_chat(tokenizer, messages)
    assert tokenizer.chat.source == CHATML
    assert (ids, trained) == (expected["input_ids"], [bool(each) for each in expected["assistant_masks"]])
    assert sum(trained) > 4 and not trained[-1]


def test_a_saved_copy_is_the_same_tokenizer(byte_level, tmp_path):
    tokenizer = tokenizers.load(byte_level)
    tokenizer.save(tmp_path)
    copy = tokenizers.load(tmp_path)
    assert copy.fingerprint == tokenizer.fingerprint
    assert copy.encode("naïve 你好") == tokenizer.encode("naïve 你好")
    assert copy.chat.source == CHATML


def test_metaspace_pieces_with_byte_fallback(tmp_path):
    from tokenizers import Tokenizer, decoders, models, normalizers, processors

    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    vocabulary |= {"▁": 259, "a": 260, "b": 261, "▁a": 262, "ab": 263}
    merges = [("▁", "a"), ("a", "b")]
    model = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    model.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    model.decoder = decoders.Sequence(steps)
    model.add_special_tokens(["<unk>", "<s>", "</s>"])
    model.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A <s> $B", [("<s>", 1)])
    model.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    tokenizer = tokenizers.load(tmp_path)
    assert (tokenizer.prefix, tokenizer.bos_id, tokenizer.eos_id) == ((1,), 1, 2)
    for text in ("ab a", "é你", " a"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    first = tokenizer.encode("你")
    stream = tokenizer.stream()
    assert [stream.push(token) for token in first][-1] == "你"


def test_gpt2s_two_files_and_a_directory_without_any(byte_level, tmp_path):
    model = json.loads((byte_level / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    pairs = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    tokenizer = tokenizers.load(tmp_path)
    assert tokenizer.encode("naïve café") == tokenizers.load(byte_level).encode("naïve café")
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ValueError, match="how qwen2 cuts text before it merges is not in these files"):
        tokenizers.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json, tokenizer\.model or vocab\.json"):
        tokenizers.load(tmp_path.parent)
