"""What a recipe may not say of itself, before anything is compiled."""

import json
import re
from pathlib import Path

import pytest

from jaxllm.core import config as configs
from jaxllm.data.loader import DataConfig, Source
from jaxllm.models.config import ModelConfig, Pipeline
from jaxllm.recipe import Recipe, check, knows_world, load_recipe, of_command_line
from jaxllm.train import main as train

TINY = (
    "out=x", "data.sources.0.path=y", "model.preset=tiny", "model.max_seq_len=32", "model.vocab_size=300",
    "data.packing.seq_len=32", "data.batch_size=24",
)  # fmt: skip
EXPERTS = ("model.ffn.kind=experts", "model.ffn.number=4", "model.ffn.top_k=2")


def recipe(*overrides: str) -> Recipe:
    return load_recipe(None, [*TINY, *overrides])


def problems(made: Recipe, n_devices: int = 1, vocab_size: int = 300) -> list[str]:
    with pytest.raises(ValueError, match=r"^the recipe contradicts itself:\n") as error:
        check(made, vocab_size=vocab_size, n_devices=n_devices)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_a_path_without_a_recipe_is_said_with_what_was_meant(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("own/train.yaml", "runs/one/recipe.yaml", "runs/two/recipe.yaml", "empty/notes.txt"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    for path, said in {
        "run/one": "run/one does not exist; did you mean runs/one?",
        "own/trian.yaml": "own/trian.yaml does not exist; did you mean own/train.yaml?",
        "own/train.yaml/x": "own/train.yaml/x does not exist; give a RECIPE.yaml or a RUN_DIR",
        "own": "own is no run directory (no recipe.yaml); recipes and runs in it: own/train.yaml",
        "runs": "runs is no run directory (no recipe.yaml); recipes and runs in it: runs/one, runs/two",
        "empty": "empty is no run directory (no recipe.yaml)",
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(said)}$"):
            load_recipe(path)
    assert train([]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: no recipe and no run is given\nusage: python -m jaxllm.train RECIPE.yaml")
    assert error.endswith("\n--help lists all keys\n") and error.count("\n") == 5


def test_a_new_run_with_the_recipe_of_another_is_said_to_be_new(tmp_path, capsys):
    old, new = tmp_path / "old", tmp_path / "new"
    for run_dir in (old, new):
        run_dir.mkdir()
        (run_dir / "recipe.yaml").write_text(configs.dump(recipe()))
    of_command_line([str(old)], "")
    of_command_line([str(old), f"out={new}"], "")
    assert capsys.readouterr().err == ""
    (new / "recipe.yaml").unlink()
    of_command_line([str(old), f"out={new}"], "")
    assert capsys.readouterr().err == f"note: {new} is a new run from the beginning; of {old} it has the recipe alone\n"


@pytest.mark.parametrize("accumulate", [7, 48])
def test_microbatches_divide_the_batch(accumulate):
    expected = f"data.batch_size=24 is not divisible by step.accumulate={accumulate}"
    assert problems(recipe(f"step.accumulate={accumulate}")) == [expected]


def test_microbatches_of_one_row_are_for_one_device_and_the_size_that_is_advised_is_accepted():
    check(recipe("step.accumulate=24"), vocab_size=300, n_devices=1)
    [problem] = problems(recipe("step.accumulate=24"), n_devices=2)
    assert "= 1 rows is not divisible by stage x data x fsdp x expert = 2 devices; use step.accumulate=12, " in problem
    assert "data.batch_size=48" in problem
    check(recipe("step.accumulate=24", "data.batch_size=48"), vocab_size=300, n_devices=2)
    check(recipe("step.accumulate=24", "mesh.tensor=2"), vocab_size=300, n_devices=2)


def test_rows_are_shared_by_devices_in_two_chunks_each():
    check(recipe("mesh.context=4"), vocab_size=300, n_devices=8)
    assert problems(recipe("mesh.context=3", "mesh.data=1", "data.packing.seq_len=32"), 3) == [
        "data.packing.seq_len=32 for mesh.context=3 must be a multiple of 6, or of 768 for the kernel of TPUs"
    ]
    [problem] = problems(recipe("mesh.context=4", "model.positions.kind=relative"), 8)
    assert problem.startswith("mesh.context=4 is for decoder-only models without a bias on scores")


def test_all_contradictions_are_said_at_once():
    made = recipe("model.max_seq_len=16", "step.accumulate=7", "monitor.prompts=[a]", "mesh.data=2", "mesh.tensor=3")
    assert [problem.split()[0] for problem in problems(made, 6, vocab_size=301)] == [
        "model.vocab_size=300", "data.packing.seq_len=32", "data.batch_size=24",
        "monitor.sample_tokens=64",
    ]  # fmt: skip


def test_a_model_that_is_not_described_is_asked_for_by_a_preset(tmp_path):
    with pytest.raises(ValueError, match=r"missing key 'data'; give data\.sources\.0\.path=\.\.\. on the command line"):
        load_recipe(None, ["out=x", "model.preset=tiny"])
    (tmp_path / "r.yaml").write_text("out: x\ndata: {sources: [{path: y}]}\nmodel: {pre-set: tiny}\n")
    with pytest.raises(ValueError, match=r"give model\.preset=NAME \(such as llama-3m\)") as error:
        load_recipe(tmp_path / "r.yaml", ["stesp=5"])
    _, missing, *unknown = str(error.value).splitlines()
    assert missing.startswith("  missing keys 'model.vocab_size', 'model.d_model', ")
    assert unknown == [
        "  unknown key 'model.pre-set'; did you mean 'model.preset'?", "  unknown key 'stesp'; did you mean 'steps'?",
    ]  # fmt: skip


def test_a_run_on_the_micro_world_is_known_by_its_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, source in (("own", "text"), ("made", "world")):
        path = tmp_path / name / "train" / "shard-00000.origins.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps({"source": source, "location": "1"}) + "\n")
    model = ModelConfig(vocab_size=9, d_model=2, n_layers=1, n_heads=1, d_ff=2, max_seq_len=8)
    for names, known in ((("own",), False), (("own", "made"), True), (("gone",), False)):
        data = DataConfig(sources=tuple(Source(path=name) for name in names), batch_size=1)
        (tmp_path / "run").mkdir(exist_ok=True)
        (tmp_path / "run" / "recipe.yaml").write_text(configs.dump(Recipe(out="run", model=model, data=data)))
        assert knows_world("run") is known
        assert knows_world("run/checkpoints/7") is known
    assert not knows_world("nowhere")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["step.elbo.free_bits=0.5"], "step.elbo is for a VAE, and model.latent is not set; leave one out"),
        (["step.router_bias_step=1e-2"], "step.router_bias_step is for model.ffn.biased, which is not set"),
        ([*EXPERTS, "step.router_bias_step=0"], "step.router_bias_step is for model.ffn.biased, which is not set"),
        (["model.latent.size=4", "data.packing.whole=true", "step.elbo.period=500"],
         "step.elbo.period=500 ends before step.elbo.warmup=1000, so that the KL term never has its whole weight"),
    ],
)  # fmt: skip
def test_options_that_nothing_reads_are_refused(overrides, said):
    [problem] = problems(recipe(*overrides))
    assert problem.startswith(said)


def test_a_router_that_would_learn_nothing_is_refused():
    [problem] = problems(recipe(*EXPERTS, "model.ffn.top_k=1"))
    assert problem.startswith("model.ffn.top_k=1 with renormalise makes every weight 1")
    check(recipe(*EXPERTS, "model.ffn.top_k=1", "model.ffn.renormalise=false"), vocab_size=300, n_devices=1)


def test_options_of_a_part_that_is_there_are_accepted():
    for overrides in (
        ["model.latent.size=4", "data.packing.whole=true", "step.elbo.period=500", "step.elbo.warmup=500"],
        [*EXPERTS, "model.ffn.biased=true", "step.router_bias_step=0"],
    ):
        check(recipe(*overrides), vocab_size=300, n_devices=1)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.ffn.shared=1"], "no shared experts beside them; leave out shared=1"),
        (["model.ffn.activation=gelu"], "and activation=gelu"),
        (["model.dense.number=1", "model.dense.d_ff=8"], "dense layers have no clamped gates"),
    ],
)
def test_parts_that_would_be_computed_without_a_clamped_gate_are_refused(overrides, said):
    recipe(*EXPERTS, "model.ffn.clamped.limit=5")
    with pytest.raises(ValueError, match=said):
        recipe(*EXPERTS, "model.ffn.clamped.limit=5", *overrides)


STAGES = ("mesh.data=1", "mesh.stage=2")


@pytest.mark.parametrize(
    ("overrides", "devices", "found"),
    [
        (("compute.pipeline.rounds=2",), 1, "compute.pipeline is for mesh.stage, which is 1; leave one out"),
        ((*STAGES, "model.n_layers=3"), 2, "3 layers are not divisible by mesh.stage=2 x compute.pipeline.rounds=1;"),
        ((*STAGES, "compute.pipeline.rounds=2", "model.n_layers=6"), 2, "6 layers are not divisible by mesh.stage=2 x"),
        ((*STAGES, "compute.pipeline.microbatches=3"), 2, "compute.pipeline.microbatches=3 is not a multiple of mesh"),
        ((*STAGES, "mesh.fsdp=2", "data.batch_size=40"), 4, "40 rows are not divisible by 8 microbatches (compute"),
        ((*STAGES, "step.accumulate=2"), 2, "12 rows are not divisible by 8 microbatches (compute.pipeline) x 1 parts"),
    ],
)
def test_layers_and_rows_are_dealt_out_evenly_to_the_stages(overrides, devices, found):
    [problem] = problems(recipe("model.n_layers=4", *overrides), devices)
    assert found in problem


def test_a_pipeline_is_idle_while_it_fills_and_empties():
    check(recipe("model.n_layers=4", *STAGES), vocab_size=300, n_devices=2)
    assert Pipeline().idle(1) == 0
    assert Pipeline(microbatches=4).idle(4) == pytest.approx(3 / 7)
    assert Pipeline(microbatches=4, rounds=2).idle(4) == pytest.approx(3 / 11)


@pytest.mark.parametrize(
    ("name", "own"), [("masked-lm", "head, stack"), ("translation", "decoder, encoder, logit_bias")]
)
def test_a_preset_of_another_kind_of_model_is_refused(name, own):
    with pytest.raises(
        configs.ConfigError, match=f"model.preset=llama-3m is decoder-only, and {own} of `model`.* leave the pre"
    ):
        load_recipe(f"configs/{name}.yaml", ["model.preset=llama-3m"])
