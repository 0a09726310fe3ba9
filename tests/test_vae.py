"""A VAE as a user meets it: trained by the command's loop, resumed, loaded, asked for texts, saved."""

import copy
import json
import shutil

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.data.prepare import prepare
from jaxllm.data.prepare_config import BytesTokenizer, PrepareConfig
from jaxllm.data.reading.sources import RowFiles
from jaxllm.data.shards import Dataset
from jaxllm.evaluate import main as evaluate
from jaxllm.inference.decode import Limits, Request
from jaxllm.inference.sampling import Sampler
from jaxllm.locate import look
from jaxllm.recipe import check, load_recipe
from jaxllm.sample import main as sample
from jaxllm.training.metrics import read
from jaxllm.wiring import train

SENTENCES = [
    "a man runs", "two dogs play", "the sun is red", "a child eats", "snow falls", "she reads a book", "cats sleep",
    "he sings", "the old boat sinks", "we wait here",
]  # fmt: skip
RECIPE = """
out: run
steps: 300
model: {vocab_size: 262, d_model: 32, n_layers: 1, n_heads: 2, d_ff: 64, max_seq_len: 32, positions: {kind: learned},
  tie_embeddings: true, latent: {size: 8, slots: 4, encoder_layers: 1}}
data: {sources: [{path: data}], packing: {seq_len: 24, whole: true}, batch_size: 8, verify: false, threads: 0}
optim: {kind: muon, lr: 1e-2, schedule: {kind: cosine, warmup: 10}}
step: {elbo: {warmup: 200, free_bits: 1.0}}
checkpoint: {every: 300}
monitor: {log_every: 100, evaluate_every: 150, sample_every: 150, sample_tokens: 20, prompts: [a man runs]}
platform: {compile_cache: none}
compute: {layers: scan, dtype: float32}
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Ten sentences, learned by heart."""
    jax.devices()  # all eight, before `train` can ask for one per core
    path = tmp_path_factory.mktemp("vae")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        lines = [*SENTENCES, "two men play"]
        (path / "texts.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
        source = RowFiles(path="texts.jsonl", fields="text")
        prepare(PrepareConfig(inputs=(source,), out="data", tokenizer=BytesTokenizer(), validation=1, seq_len=24))
        (path / "recipe.yaml").write_text(RECIPE)
        train(load_recipe("recipe.yaml"))
    return path / "run"


@pytest.fixture(scope="module")
def vae(run):
    return jaxllm.load(run)


def held_in(run):
    """The sentences that were trained on: one of the eleven is held out."""
    dataset = Dataset.open(run.parent / "data", "train")
    return [bytes((dataset.tokens(i)[1:-1] - 6).tolist()).decode() for i in range(len(dataset))]


def test_it_reconstructs_what_it_has_learned_by_heart(vae, run):
    texts = held_in(run)
    assert len(texts) == 10
    assert vae.reconstruct(texts) == texts
    assert vae.decode(vae.encode(texts).mean, temperature=1e-4) == texts


def test_the_run_has_the_bound_and_its_parts(run):
    lines = read(run / "metrics.jsonl")
    steps, evaluated = ([each for each in lines if key in each] for key in ("kl_weight", "val_loss"))
    assert [each["kl_weight"] for each in steps[::50]] == pytest.approx([0.005, 0.255, 0.505, 0.755, 1, 1])
    assert evaluated[-1].keys() >= {"val_reconstruction", "val_kl", "val_accuracy", "val_active_units"}
    assert steps[-1]["kl"] > 4  # free bits hold
    assert steps[-1]["reconstruction"] < 0.1 < steps[0]["reconstruction"]
    assert read(run / "samples.jsonl")[-1]["text"] == "a man runs" or "a man runs" not in held_in(run)


def test_a_resumed_run_computes_what_an_undisturbed_one_does(run, monkeypatch):
    monkeypatch.chdir(run.parent)
    short = ["monitor.prompts=[]", "monitor.evaluate_every=100", "checkpoint.every=2"]
    train(load_recipe("recipe.yaml", ["out=straight", "steps=4", *short]))
    shutil.copytree("straight", "again")
    shutil.rmtree("again/checkpoints/4")
    train(load_recipe("again"))
    assert (run.parent / "again/metrics.jsonl").read_bytes() == (run.parent / "straight/metrics.jsonl").read_bytes()


def test_a_saved_one_is_the_same_to_the_last_bit(vae, tmp_path):
    vae.save(tmp_path / "saved")
    other = jaxllm.load(tmp_path / "saved")
    assert other.config == vae.config
    jax.tree.map(np.testing.assert_array_equal, other.params, vae.params)
    jax.tree.map(np.testing.assert_array_equal, other.encode("a dog"), vae.encode("a dog"))


def test_encode_is_of_each_text_alone(vae):
    both = vae.encode(["a dog", "the old boat sinks"])
    assert both.mean.shape == both.logvar.shape == (2, 8)
    np.testing.assert_allclose(both.mean[:1], vae.encode("a dog").mean, atol=1e-5)
    with pytest.raises(ValueError, match=r"text 1 has 41 tokens; the model takes 1 to 32"):
        vae.encode(["a", "b" * 40])
    with pytest.raises(ValueError, match="no texts"):
        vae.encode([])


def test_samples_repeat_by_seed(vae):
    texts = vae.sample(4, seed=1, temperature=0.7)
    assert len(texts) == 4
    assert texts == vae.sample(4, seed=1, temperature=0.7) != vae.sample(4, seed=2, temperature=0.7)
    assert vae.sample(2, seed=1) == vae.decode(np.random.default_rng(1).standard_normal((2, 8), np.float32))
    with pytest.raises(ValueError, match="count=0 must be"):
        vae.sample(0)


def test_the_ends_of_a_line_are_the_reconstructions(vae, run):
    one, other, *_ = held_in(run)
    line = vae.interpolate(one, other, 5)
    assert len(line) == 5
    assert (line[0], line[-1]) == (one, other)
    with pytest.raises(ValueError, match="steps=1 must be"):
        vae.interpolate(one, other, 1)


def test_evaluate_measures_the_bound_of_the_run_with_its_parts_and_nothing_else(run, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    for data in ([], ["--data", "data", "--seq-len", "24"]):
        flags = ["--tasks", "perplexity", "--batch-size", "8", *data]
        assert evaluate(["run", *flags, "--out", "found.json"]) is None
        found = json.loads((run.parent / "found.json").read_text())["perplexity"]
        last = [line for line in read(run / "metrics.jsonl") if "val_loss" in line][-1]
        assert found["nats_per_token"] == pytest.approx(last["val_loss"], rel=1e-4)
        assert {key: found[key] for key in ("kl", "reconstruction", "accuracy", "active_units")} == pytest.approx(
            {key: last[f"val_{key}"] for key in ("kl", "reconstruction", "accuracy", "active_units")}, rel=1e-4
        )
    assert "nats of latent per text" in capsys.readouterr().out
    assert sample(["run", "--prompt", "a"]) == 2
    assert "is a VAE: jaxllm.load it in Python" in capsys.readouterr().err
    assert evaluate(["run", "--tasks", "qa"]) == 2
    assert "is a VAE and continues no text" in capsys.readouterr().err


def test_what_is_no_vae_and_what_a_vae_is_not_are_refused(vae, run, monkeypatch):
    with pytest.raises(ValueError, match="this is no VAE"):
        jaxllm.VAE(vae.config.model_copy(update={"latent": None}), vae.params, vae.tokenizer)
    with pytest.raises(ValueError, match="is a VAE and continues no text"):
        look(run)
    with pytest.raises(ValueError, match=r"latent 0 has shape \(3,\); the model's are of 8 numbers"):
        vae.decoder.generate([Request([1], source=[0.0] * 3)], Sampler(), Limits(4))
    with pytest.raises(ValueError, match="a VAE, which no other program reads"):
        jaxllm.export(vae, run.parent / "export")
    monkeypatch.chdir(run.parent)
    with pytest.raises(ValueError, match=r"model\.latent learns whole texts; set data\.packing\.whole=true"):
        check(load_recipe("recipe.yaml", ["data.packing.whole=false"]), vocab_size=262, n_devices=8)


def test_a_tokenizer_without_a_prefix_reads_and_writes_the_same(vae):
    """As Qwen's, whose texts begin with nothing; rows of our data begin with bos whatever the tokenizer."""
    bare = jaxllm.VAE(vae.config, vae.params, copy.copy(vae.tokenizer))
    bare.tokenizer.prefix = ()
    np.testing.assert_array_equal(bare.encode(["a man runs", ""]).mean, vae.encode(["a man runs", ""]).mean)
    assert bare.sample(2, seed=1) == vae.sample(2, seed=1)


def test_a_second_vae_of_the_same_kind_compiles_nothing(vae, caplog):
    """A run makes one whenever samples are due."""
    expected = vae.reconstruct("a man runs")
    other = jaxllm.VAE(vae.config, vae.params, vae.tokenizer, compute=vae.compute)
    with jax.log_compiles():
        assert other.reconstruct("a man runs") == expected
    assert not [record.message for record in caplog.records if record.message.startswith("Compiling")]


@pytest.mark.parametrize("prompt", ["x" * 32, "x" * 31])
def test_a_prompt_that_is_too_long_is_refused_before_anything_is_compiled(prompt, run, monkeypatch, caplog):
    monkeypatch.chdir(run.parent)
    with jax.log_compiles(), pytest.raises(ValueError, match=r"monitor\.prompts\.0 has 3[23] tokens"):
        train(load_recipe("recipe.yaml", ["out=long", f"monitor.prompts=[{prompt}]"]))
    assert not [record.message for record in caplog.records if record.message.startswith("Compiling")]
