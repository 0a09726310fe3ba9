"""Whole models: load, export, convert, sample and tune with Hugging Face directories."""

import json
import shutil
from contextlib import nullcontext

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm import huggingface
from jaxllm.convert import main as convert
from jaxllm.core.tree import named_leaves
from jaxllm.data.tokenizers.tokenizer import byte_tokenizer
from jaxllm.hf.checkpoint import Checkpoint, Writer
from jaxllm.huggingface import export
from jaxllm.inference.sampling import Sampler
from jaxllm.language_model import LanguageModel
from jaxllm.layers.config import ClampedGate, Experts, Rope
from jaxllm.locate import look
from jaxllm.models.accounting import param_count
from jaxllm.models.build import init_params
from jaxllm.models.config import ModelConfig
from jaxllm.sample import main as sample

CONFIG = ModelConfig(
    vocab_size=262, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=96, qk_norm="head"
)
GREEDY = Sampler(temperature=0)


def model(config=CONFIG):
    params = jax.jit(lambda: jax.tree.map(lambda leaf: leaf * 4, init_params(config, 0)))()
    return LanguageModel(config, params, byte_tokenizer(), chat=True, stop_ids=(7,))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(model(), tmp_path_factory.mktemp("models") / "qwen")


def test_an_export_loads_as_the_same_model(exported):
    before, after = model(), jaxllm.load(exported)
    assert json.loads((exported / "config.json").read_text())["model_type"] == "qwen3"  # the family with such norms
    assert after.config.model_dump(exclude={"head_dim"}) == before.config.model_dump(exclude={"head_dim"})
    for name, leaf in named_leaves(after.params).items():
        np.testing.assert_array_equal(leaf, named_leaves(before.params)[name])
    assert (after.stop_ids, after.is_chat) == (before.stop_ids, True)
    asked = [{"role": "user", "content": "你好"}]
    assert after.encode(asked) == before.encode(asked)
    assert after.chat(asked, max_new_tokens=8, sampler=GREEDY) == before.chat(asked, max_new_tokens=8, sampler=GREEDY)


def test_a_directory_without_a_tokenizer_is_one_for_ids(exported, tmp_path, capsys, monkeypatch):
    bare = shutil.copytree(exported, tmp_path / "bare", ignore=shutil.ignore_patterns("token*", "chat*"))
    lm, whole = jaxllm.load(bare), jaxllm.load(exported)
    ids = whole.encode("abc")
    np.testing.assert_array_equal(lm.logits([ids]), whole.logits([ids]))
    [answer], [full] = (each.generate(ids, max_new_tokens=8, sampler=GREEDY) for each in (lm, whole))
    assert answer == full._replace(text="")
    assert lm.stop_ids == whole.stop_ids
    again = export(lm, tmp_path / "again")
    assert not list(again.glob("token*"))
    for name in ("model.safetensors", "config.json"):
        assert (again / name).read_bytes() == (bare / name).read_bytes()
    for text in (
        lambda: lm.generate("abc"), lambda: lm.generate([ids], stop=["x"]), lambda: lm.decode(ids),
        lambda: lm.save(tmp_path / "run"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"a directory with tokenizer\.json, .*but no text and no run$"):
            text()
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(huggingface, "read_params", None)  # what needs text reads no weights first
    for command, line in ((sample, [str(bare), "--prompt", "Hi"]), (convert, [str(bare), str(tmp_path / "run")])):
        assert command(line) == 2
        assert "Without a tokenizer" in capsys.readouterr().err


def test_what_was_looked_at_is_loaded_without_another_look(exported, monkeypatch):
    config, found = look(exported)
    monkeypatch.setattr(huggingface, "describe", None)
    lm = huggingface.load(found)
    monkeypatch.undo()
    assert lm.config == config == look(exported)[0]
    assert lm.stop_ids == model().stop_ids


def test_a_config_that_does_not_say_which_model_it_is_of(tmp_path):
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(ValueError, match=r"config\.json has no model_type, so it does not say which model this is"):
        jaxllm.load(tmp_path)


def test_a_converted_model_is_checked_at_each_load(exported, tmp_path):
    assert convert([str(exported), str(tmp_path / "run")]) is None
    path = tmp_path / "run" / "golden.json"
    kept = json.loads(path.read_text())["logits"]
    logits = jaxllm.load(tmp_path / "run").logits(np.arange(1, 17)[None])[0, -1]
    np.testing.assert_allclose(kept[-1], logits[-1], rtol=1e-5)
    path.write_text(json.dumps({"logits": [kept[0] + 0.1, *kept[1:]]}))
    with pytest.raises(
        ValueError, match=r"golden\.json: the model no longer computes what it did.*differ by up to 1\.00e-01"
    ):
        jaxllm.load(tmp_path / "run")


def test_converted_to_a_run_and_back(exported, tmp_path, capsys):
    assert convert([str(exported), str(tmp_path / "run")]) is None
    assert convert([str(tmp_path / "run"), str(tmp_path / "again")]) is None
    assert "to the last bit" in capsys.readouterr().out
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "chat_template.jinja"):
        assert (tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes(), name
    assert convert([str(exported), str(tmp_path / "run")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_tied_head_that_the_family_must_write_apart_is_counted_twice(tmp_path, capsys):
    config = CONFIG.model_copy(update={"embed_scale": 3.0, "tie_embeddings": True})
    LanguageModel(config, init_params(config, 0), byte_tokenizer()).save(tmp_path / "run")
    assert convert([str(tmp_path / "run"), str(tmp_path / "exported")]) is None
    n, head = param_count(config), config.vocab_size * config.d_model
    assert f": {n:,} parameters ({n + head:,} as written, where shared ones stand twice);" in capsys.readouterr().out


@pytest.mark.parametrize("tied", [True, False])
def test_a_padded_vocabulary_is_trimmed_and_an_imported_one_is_whole(tied, tmp_path, capsys):
    lm = model(CONFIG.model_copy(update={"vocab_size": 288, "tie_embeddings": tied}))
    lm.save(tmp_path / "run")
    assert convert([str(tmp_path / "run"), str(tmp_path / "hf")]) is None
    assert "as written, without rows that are of no token" in capsys.readouterr().out
    tokens = np.arange(6, 30)[None]
    expected = lm.logits(tokens)[..., :262]
    again = jaxllm.load(tmp_path / "hf")
    assert again.config.vocab_size == lm.tokenizer.vocab_size == 262
    np.testing.assert_allclose(again.logits(tokens), expected, atol=1e-5)
    whole = LanguageModel(lm.config, lm.params, lm.tokenizer, imported=True)
    whole.save(tmp_path / "imported")  # a run that remembers it
    assert jaxllm.load(export(jaxllm.load(tmp_path / "imported"), tmp_path / "whole")).config.vocab_size == 288
    transformers = pytest.importorskip("transformers", reason="pip install 'jaxllm[parity]' compares with transformers")
    torch = pytest.importorskip("torch", reason="pip install 'jaxllm[parity]' compares with torch")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(torch.from_numpy(tokens)).logits
    np.testing.assert_allclose(theirs.detach(), expected, atol=1e-4 * np.abs(expected).max())


def test_sample_reads_the_directory(exported, capsys):
    assert sample([str(exported), "--prompt", "Hi", "--max-new-tokens", "4", "--temperature", "0"]) is None
    answer = model().chat([{"role": "user", "content": "Hi"}], max_new_tokens=4, sampler=GREEDY)
    assert capsys.readouterr().out == answer.text + "\n"


def test_a_factor_on_embeddings_moves_into_the_table(tmp_path):
    lm = model(CONFIG.model_copy(update={"embed_scale": 32**0.5, "tie_embeddings": True}))
    again = jaxllm.load(export(lm, tmp_path / "scaled"))
    tokens = np.arange(6, 30)[None]
    np.testing.assert_allclose(again.logits(tokens), lm.logits(tokens), atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "change", "own"),
    [
        ("mixtral", {"qk_norm": "none"}, {}),
        ("qwen3_moe", {}, {"renormalise": False}),
        ("gpt_oss", {"qk_norm": "none", "bias": True, "sinks": True}, {"clamped": ClampedGate(limit=0.5)}),
    ],
)
def test_a_model_with_experts_is_exported_loaded_and_generates(model_type, change, own, tmp_path):
    experts = Experts(number=4, top_k=2, balance=0.02, router_z=0.001).model_copy(update=own)
    lm = model(CONFIG.model_copy(update={"ffn": experts, **change}))
    path = export(lm, tmp_path / "sparse")
    raw = json.loads((path / "config.json").read_text())
    assert (raw["model_type"], raw["router_aux_loss_coef"]) == (model_type, 0.02)
    again = jaxllm.load(path)
    assert again.config.ffn == experts
    for name, leaf in named_leaves(again.params).items():
        np.testing.assert_array_equal(leaf, named_leaves(lm.params)[name])
    answer = again.generate("one of four", max_new_tokens=8, sampler=GREEDY)[0]
    tokens = [*again.encode("one of four"), *answer.tokens]
    greedy = np.argmax(lm.logits(np.array([tokens]))[0], axis=-1)  # one full forward pass, of the model before
    assert greedy[-len(answer.tokens) - 1 : -1].tolist() == answer.tokens
    written = export(again, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (written / name).read_bytes() == (path / name).read_bytes()


def test_rotating_a_part_of_a_head_is_not_exported_as_a_family_that_rotates_all(tmp_path):
    lm = model(CONFIG.model_copy(update={"positions": Rope(fraction=0.5)}))
    with pytest.raises(ValueError, match="no family of transformers"):
        export(lm, tmp_path / "out")


def test_a_head_that_differs_from_the_tied_table_is_refused(tmp_path):
    path = export(model(CONFIG.model_copy(update={"tie_embeddings": True})), tmp_path / "tied")
    for factor, accepted in ((1, True), (-1, False)):
        tensors = dict(Checkpoint(path))
        writer = Writer(path)
        for name, tensor in {**tensors, "lm_head.weight": factor * tensors["model.embed_tokens.weight"]}.items():
            writer.add(name, tensor)
        writer.close()
        refused = pytest.raises(ValueError, match=r"lm_head\.weight: differs from model\.embed")
        with nullcontext() if accepted else refused:
            jaxllm.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not known; known are llama"),
        ({"attention_sink_size": 4}, "attention_sink_size=4: unknown, and it may change the model"),
        ({"num_hidden_layers": 3}, r"model\.layers\.2\.input_layernorm\.weight: missing"),
    ],
)
def test_what_cannot_be_exact_is_refused(exported, tmp_path, change, message):
    for path in exported.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    raw = json.loads((exported / "config.json").read_text())
    if "num_hidden_layers" in change:
        raw["layer_types"] = ["full_attention"] * 3
    (tmp_path / "config.json").write_text(json.dumps(raw | change))
    with pytest.raises(ValueError, match=message):
        jaxllm.load(tmp_path)


def test_a_model_that_no_family_computes_is_refused(tmp_path):
    lm = model(CONFIG.model_copy(update={"parallel": True}))
    with pytest.raises(ValueError, match=r"no family of transformers computes this.*parallel=True"):
        export(lm, tmp_path / "out")
    assert not (tmp_path / "out").exists()
