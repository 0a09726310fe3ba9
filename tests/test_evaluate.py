"""The command on a tiny random model: its loss is that of the logits, its errors are one line."""

import json

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm import evaluate, measure
from jaxllm.data.chat import encode_chat
from jaxllm.data.shard_writer import DatasetWriter, Encoded, chat_tokens, text_tokens
from jaxllm.data.tokenizers.tokenizer import byte_tokenizer
from jaxllm.language_model import LanguageModel
from jaxllm.models.build import init_params
from jaxllm.models.config import ModelConfig

CONFIG = ModelConfig(vocab_size=262, d_model=16, n_layers=1, n_heads=2, d_ff=32, max_seq_len=512)
TEXTS = ("the quick brown fox", "jumps over", "小红看见一只猫。")


@pytest.fixture(scope="module")
def lm():
    params = jax.jit(lambda: jax.tree.map(lambda leaf: leaf * 6, init_params(CONFIG, 0)))()
    return LanguageModel(CONFIG, params, byte_tokenizer(), chat=True)


@pytest.fixture(scope="module")
def model(lm, tmp_path_factory):
    directory = tmp_path_factory.mktemp("models") / "tiny"
    lm.save(directory)
    return str(directory)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("data") / "text"
    tokenizer = byte_tokenizer()
    with DatasetWriter(directory, tokenizer, "text") as writer:
        for split in ("train", "validation"):
            for number, text in enumerate(TEXTS):
                document = Encoded("t", str(number), tokenizer.encode(text), [], len(text.encode()))
                writer.add(split, text_tokens(tokenizer, document))
    return str(directory)


def test_perplexity_is_that_of_the_logits(lm, model, data, tmp_path, capsys):
    flags = ["--tasks", "perplexity", "--data", data, "--seq-len", "64", "--batch-size", "8"]
    assert evaluate.main([model, *flags, "--out", str(tmp_path / "r.json")]) is None
    nats, tokens = 0.0, 0
    for text in TEXTS:
        ids = np.array([lm.tokenizer.bos_id, *lm.tokenizer.encode(text), lm.tokenizer.eos_id])
        logits = np.asarray(lm.logits(ids[None, :-1]))[0]
        logits = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        nats, tokens = nats - logits[np.arange(len(ids) - 1), ids[1:]].sum(), tokens + len(ids) - 1
    found = json.loads((tmp_path / "r.json").read_text())["perplexity"]
    assert found["tokens"] == tokens
    assert found["nats_per_token"] == pytest.approx(nats / tokens, rel=1e-4)
    assert found["perplexity"] == pytest.approx(np.exp(nats / tokens), rel=1e-3)
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert found["bits_per_byte"] == pytest.approx(nats / np.log(2) / n_bytes, rel=1e-4)
    assert f"over {tokens} tokens" in capsys.readouterr().out


def test_a_huggingface_directory_needs_data_and_leaves_out_what_is_too_long_for_it(lm, tmp_path, capsys):
    jaxllm.export(lm, tmp_path / "exported")
    assert evaluate.main([str(tmp_path / "exported"), "--tasks", "perplexity"]) == 2
    assert "does not say what it was trained on; name a dataset with --data" in capsys.readouterr().err
    tokenizer = jaxllm.load(tmp_path / "exported").tokenizer
    with DatasetWriter(tmp_path / "chat", tokenizer, "chat") as writer:
        for split, length in (("train", 3), ("validation", 3), ("validation", 70)):
            turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * length}]
            writer.add(split, chat_tokens(tokenizer, Encoded("t", "0", *encode_chat(tokenizer, turns), 0)))
    flags = ["--tasks", "perplexity", "--data", str(tmp_path / "chat"), "--seq-len", "64", "--batch-size", "8"]
    assert evaluate.main([str(tmp_path / "exported"), *flags]) is None
    printed = capsys.readouterr()
    assert "1 of 2 conversations" in printed.err
    assert "over 4 tokens" in printed.out


def test_applications_are_asked_and_shown(model, tmp_path, capsys):
    flags = ["--tasks", "classification", "--n", "4", "--splits", "new_combinations,pretrain_only"]
    assert evaluate.main([model, *flags, "--out", str(tmp_path / "r.json")]) is None
    found = json.loads((tmp_path / "r.json").read_text())["applications"]
    assert [found[split]["classification"]["n"] for split in ("new_combinations", "pretrain_only")] == [4, 4]
    out = capsys.readouterr().out
    assert "0.0% (0/4)" in out
    assert "topic_zh" in out


def test_only_a_model_of_the_world_is_asked_its_exercises(model, data, capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(measure, "check_lengths", lambda arguments, model, tasks, splits: asked.append(tasks))
    monkeypatch.setattr(measure, "perplexity", lambda *_: pytest.fail("far enough"))
    monkeypatch.setattr(measure, "knows_world", lambda _: True)
    with pytest.raises(pytest.fail.Exception):
        evaluate.main([model, "--data", data, "--batch-size", "8"])
    assert (asked.pop(), capsys.readouterr().err) == (list(evaluate.TASKS), "")
    monkeypatch.undo()
    assert evaluate.main([model, "--data", data, "--batch-size", "8", "--seq-len", "64"]) is None
    printed = capsys.readouterr()
    assert "note: perplexity alone, because this model was not trained on the micro-world" in printed.err
    assert "--tasks perplexity,generation" in printed.err
    assert "perplexity" in printed.out and "application" not in printed.out


def test_tasks_that_are_too_long_for_the_model_are_named_with_those_that_are_not(lm, tmp_path, capsys):
    config = CONFIG.model_copy(update={"max_seq_len": 150})
    LanguageModel(config, lm.params, byte_tokenizer(), chat=True).save(tmp_path / "short")
    path = str(tmp_path / "short")
    assert evaluate.main([path, "--n", "2", "--tasks", "perplexity,classification,qa"]) == 2
    error = capsys.readouterr().err
    assert error == (
        f"error: prompts of qa (up to 159 tokens) are longer than the 149 tokens that {path} takes; "
        "use --tasks perplexity,classification\n"
    )
    assert evaluate.main([path, "--n", "2", "--tasks", "classification"]) is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--tasks", "perplexity,poetry"],
            "--tasks has 'poetry', which does not exist; use any of perplexity,generation",
        ),
        (
            ["--tasks", "qa", "--splits", "old"],
            "--splits has 'old', which does not exist; use any of new_combinations,",
        ),
        (["--tasks", "qa", "--n", "0"], "--n 0 must be at least 1"),
        (["--batch-size", "0"], "--batch-size 0 must be at least 1"),
        (
            ["--tasks", "perplexity", "--batch-size", "12"],
            "--batch-size 12 does not divide by 8 devices; use a multiple",
        ),
        (["--tasks", "perplexity"], "was trained on is not here (not-recorded); name a dataset with --data"),
        (["--tasks", "perplexity", "--data", "nowhere"], "nowhere"),
    ],
)
def test_user_errors_are_one_line(model, flags, message, capsys):
    assert evaluate.main([model, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_another_tokenizer_is_refused(model, tmp_path, capsys):
    from jaxllm.data.tokenizers import tokenizer
    from jaxllm.data.tokenizers.pieces_training import TokenizerConfig

    other = tokenizer.train(TEXTS * 3, TokenizerConfig(vocab_size=300, character_coverage=1.0))
    with DatasetWriter(tmp_path / "d", other, "text") as writer:
        for split in ("train", "validation"):
            writer.add(split, text_tokens(other, Encoded("t", "0", other.encode(TEXTS[0]), [], len(TEXTS[0]))))
    flags = ["--tasks", "perplexity", "--data", str(tmp_path / "d"), "--batch-size", "8"]
    assert evaluate.main([model, *flags]) == 2
    assert "prepare the data with --tokenizer MODEL" in capsys.readouterr().err
