"""What was trained on, how hard it was, and what is wrong before anything is trained: inspect, spikes, --check."""

import json
import math

import jax
import numpy as np
import pytest

from jaxllm.data.loader import Loader
from jaxllm.data.prepare import prepare
from jaxllm.data.prepare_config import BytesTokenizer, PrepareConfig
from jaxllm.data.reading.sources import World
from jaxllm.inspect import main as inspect
from jaxllm.recipe import load_recipe
from jaxllm.train import main as train
from jaxllm.training.metrics import Spikes, read

RECIPE = """
out: run
steps: 3
model: {preset: tiny, n_layers: 1, d_model: 16, n_heads: 2, d_ff: 32, vocab_size: 300, max_seq_len: 32}
data: {sources: [{path: data}], packing: {seq_len: 32}, batch_size: 8, verify: false, threads: 0}
checkpoint: {every: 2}
monitor: {evaluate_batches: 1}
platform: {compile_cache: none}
compute: {layers: scan, dtype: float32, loss_chunk: 20}
"""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    path = tmp_path_factory.mktemp("forensics")
    jax.devices()  # all eight, for the tests that follow: a run that comes first takes as many as suit it
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        patch.setattr(Spikes, "FIRST", 1)
        inputs = (World(count=120),)
        prepare(PrepareConfig(inputs=inputs, out="data", tokenizer=BytesTokenizer(), validation=10, seq_len=32))
        (path / "recipe.yaml").write_text(RECIPE)
        assert train(["recipe.yaml", "monitor.loss_spike=1e-9", "optim.lr=10", "optim.schedule.warmup=0"]) == 0
        yield path


def test_losses_of_a_step_are_those_that_training_recorded(workspace, capsys):
    assert inspect(["run/checkpoints/2", "--step", "3", "--losses", "--json"]) is None
    shown = capsys.readouterr()
    assert shown.err == "losses by the checkpoint of step 2\n"
    records = [json.loads(line) for line in shown.out.splitlines()]
    nats = [nats for record in records for _, learned, nats in record["tokens"] if learned]
    assert np.mean(nats) == pytest.approx(read(workspace / "run" / "metrics.jsonl")[-2]["loss"], rel=1e-5)
    assert {record["sample"] for record in records} == set(range(16, 24))
    assert records[0]["source"] == "world"
    assert "document" in records[0]


def test_losses_are_shown_with_the_hardest_tokens(workspace, capsys):
    inspect(["run", "--step", "1", "--rows", "1", "--losses"])
    shown = capsys.readouterr().out
    assert "nats per token: document" in shown
    assert "hardest: " in shown
    assert inspect(["data", "--losses"]) == 2
    assert "--losses needs the model of a run" in capsys.readouterr().err


def test_a_spike_writes_down_the_documents_of_its_step(workspace):
    path = max((workspace / "run" / "spikes").glob("*.jsonl"))
    step = int(path.stem.removeprefix("step-"))
    written = [json.loads(line) for line in path.read_text().splitlines()]
    loader = Loader(load_recipe(workspace / "run").data.model_copy(update={"sources": _absolute(workspace)}))
    first = 8 * (step - 1)
    expected = [
        (sample, document)
        for sample in range(first, first + 8)
        for document in loader.plans[0].documents(loader.locate(sample)[1]).tolist()
    ]
    assert [(each["sample"], each["document"]) for each in written] == expected
    assert all(each["text"] and each["source"] == "world" for each in written)


def _absolute(workspace):
    [source] = load_recipe(workspace / "run").data.sources
    return (source.model_copy(update={"path": str(workspace / "data")}),)


def test_a_spike_stands_out_of_what_came_before():
    spikes = Spikes(6.0)
    quiet = [4 + 0.1 * math.sin(step) for step in range(200)]
    assert [spikes(loss) for loss in quiet] == [None] * 200
    assert spikes(8.0) == pytest.approx(4, abs=0.05)
    assert spikes(math.nan) is None
    assert spikes(4.1) is None
    assert Spikes(None)(1e9) is None
    level = [spikes(6.0) is not None for _ in range(200)]  # a jump that lasts is reported and then known
    assert level[0]
    assert not any(level[100:])


def test_check_finds_nothing_in_a_good_recipe_and_leaves_nothing(workspace, capsys):
    before = sorted(workspace.rglob("*"))
    assert train(["recipe.yaml", "out=other", "--check"]) == 0
    shown = capsys.readouterr().out
    assert shown.endswith("nothing is wrong; train it without --check\n")
    assert "wrong" not in shown.removesuffix("nothing is wrong; train it without --check\n")
    assert "98.8% of the positions" in shown
    assert sorted(workspace.rglob("*")) == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.sources.0.path=nowhere"], "wrong data             nowhere"),
        (["data.batch_size=7"], "rows is not divisible by"),
        (["out=data"], "wrong run directory    data is not empty"),
        (["steps=100 epochs", "data.epochs=1"], "wrong length "),
        (["monitor.prompts=[" + "x" * 50 + "]", "monitor.sample_tokens=4"], "monitor.prompts.0 has 51 tokens"),
        (["checkpoint.keep_last=1000000000"], "wrong disk"),
        (["checkpoint.fast.directory=/proc/jaxllm", "checkpoint.fast.every=1"], "wrong fast checkpoint "),
        (["model.d_ff=1000000000000"], "wrong memory"),
        (["start_from=nothing"], "wrong start_from       nothing does not exist"),
    ],
)
def test_check_names_what_is_wrong(workspace, capsys, overrides, message):
    assert train(["recipe.yaml", "--check", *(["out=other"] if overrides[0] != "out=data" else []), *overrides]) == 1
    assert message in capsys.readouterr().out


def test_check_refuses_conversations_for_a_model_of_whole_texts(workspace, capsys):
    talk = PrepareConfig(inputs=(World(count=40),), out="talk", tokenizer=BytesTokenizer(), chat=True, validation=0)
    prepare(talk)
    vae = ["model.latent.size=8", "model.latent.slots=2", "model.latent.encoder_layers=1", "data.packing.whole=true"]
    long = ["data.packing.seq_len=1024", "model.max_seq_len=1024", "model.positions={kind: learned}"]
    assert train(["recipe.yaml", "out=other", "data.sources.0.path=talk", *vae, *long, "--check"]) == 1
    shown = capsys.readouterr().out
    assert "model.latent learns whole texts, and talk has conversations; prepare it as text" in shown, shown
