"""Small real things the data tests share."""

import pytest

from jaxllm.data.shard_writer import DatasetWriter, Encoded, chat_tokens, text_tokens
from jaxllm.data.tokenizers import tokenizer
from jaxllm.data.tokenizers.pieces_training import TokenizerConfig

TEXTS = [
    "The quick brown fox jumps over the lazy dog. 12 foxes, 345 dogs.\n\n    indented = True\n",
    "she sells sea shells on the sea shore, the shells she sells are sea shells",
    "敏捷的棕色狐狸跳过了懒狗。狐狸和狗都在跳。",
    "un renard brun saute par-dessus le chien paresseux, été comme hiver",
]


@pytest.fixture(scope="session")
def texts():
    """Four short documents in English, Chinese and French."""
    return TEXTS


@pytest.fixture(scope="session")
def bpe():
    """A BPE tokenizer trained on a few lines of English, Chinese and French."""
    return tokenizer.train(TEXTS * 3, TokenizerConfig(vocab_size=420, character_coverage=1.0))


@pytest.fixture(scope="session")
def byte():
    """The byte tokenizer: id = byte + 6."""
    return tokenizer.byte_tokenizer()


@pytest.fixture
def text_dataset(tmp_path, byte):
    """Return a function that writes documents of the given numbers of bytes and returns the directory."""

    def write(sizes, name="text", shard_tokens=40, validation=()):
        with DatasetWriter(tmp_path / name, byte, "text", shard_tokens=shard_tokens) as writer:
            for split, lengths in (("train", sizes), ("validation", validation)):
                for number, size in enumerate(lengths):
                    text = "".join(chr(97 + (number + i) % 26) for i in range(size))
                    document = Encoded(name, f"{split} {number}", byte.encode(text), [], size)
                    writer.add(split, text_tokens(byte, document))
        return tmp_path / name

    return write


@pytest.fixture
def chat_dataset(tmp_path, byte):
    """Return a function that writes conversations of (prompt, answer with eos) tokens and returns the directory."""

    def write(sizes, name="chat", validation=()):
        with DatasetWriter(tmp_path / name, byte, "chat") as writer:
            for split, lengths in (("train", sizes), ("validation", validation)):
                for number, (prompt, answer) in enumerate(lengths):
                    ask, reply = 10 + number % 200, 20 + number % 200
                    ids = [1] + [ask] * (prompt - 1) + [reply] * (answer - 1) + [2]
                    trained = [False] * prompt + [True] * answer
                    conversation = Encoded(name, f"{split} {number}", ids, trained, 0)
                    writer.add(split, chat_tokens(byte, conversation))
        return tmp_path / name

    return write
