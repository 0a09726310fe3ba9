import pytest

from jaxllm.data.tokenizers import tokenizer as tokenizers
from jaxllm.data.tokenizers.fast_export import to_json
from jaxllm.data.tokenizers.fast_pieces import FastPieces
from jaxllm.data.tokenizers.pieces import SentencePieces
from jaxllm.data.tokenizers.pieces_training import TokenizerConfig

CORPUS = [
    "The cat sat on the mat, and the dog ran 12 miles.\n",
    "猫坐在垫子上，狗跑了十二里。\n",
    "  indented code()\n",
] * 40
TEXTS = ["The dog sat", " two  spaces", "naïve 猫 café\n\n", "12345", "emoji 👩‍🔬", "", "tab\tand\r\n", "<bos>the<eos>"]


@pytest.mark.parametrize("algorithm", ["bpe", "unigram", "bytes"])
def test_the_tokenizers_library_gives_every_text_the_same_ids(algorithm):
    if algorithm == "bytes":
        tokenizer = tokenizers.byte_tokenizer()
    else:
        tokenizer = tokenizers.train(CORPUS, TokenizerConfig(algorithm=algorithm, vocab_size=400))
    exported = FastPieces(to_json(tokenizer))
    assert (exported.size, exported.special) == (tokenizer.vocab_size, tokenizer.special)
    assert exported.prefix == tokenizer.prefix
    texts = [text for text in TEXTS + CORPUS[:3] if algorithm != "unigram" or "<" not in text]  # see to_json
    for text in texts:
        ids = tokenizer.encode(text)
        assert exported.encode([text]) == [ids]
        assert b"".join(map(exported.bytes_of, ids)).decode() == text


def test_a_sentencepiece_model_from_elsewhere_is_not_rewritten():
    tokenizer = tokenizers.train(CORPUS, TokenizerConfig(vocab_size=400))
    tokenizer.pieces = SentencePieces(tokenizer.pieces.proto, escape_mark=False)
    with pytest.raises(ValueError, match=r"passed on as tokenizer\.model"):
        to_json(tokenizer)
