"""Runs inside this process: what is refused before anything is written, and how a run goes on."""

import re
import resource
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import jaxllm
from jaxllm.data.loader import Loader
from jaxllm.data.prepare import prepare
from jaxllm.data.prepare_config import BytesTokenizer, PrepareConfig
from jaxllm.data.reading.sources import World
from jaxllm.data.tokenizers import tokenizer as tokenizers
from jaxllm.inspect import main as inspect
from jaxllm.language_model import LanguageModel
from jaxllm.models import presets
from jaxllm.recipe import Recipe, load_recipe
from jaxllm.run import Run
from jaxllm.sharding.mesh import make_mesh
from jaxllm.train import main as train_command
from jaxllm.training.checkpoint import Checkpoints
from jaxllm.training.metrics import read
from jaxllm.training.state import TrainState
from jaxllm.tune import main as tune_command
from jaxllm.wiring import RunResult, _claimed, _kept, check_home, total_steps, train

RECIPE = """
out: runs/one
steps: 4
model: {preset: tiny, n_layers: 1, d_model: 16, n_heads: 2, d_ff: 32, vocab_size: 300, max_seq_len: 32}
data: {sources: [{path: data}], packing: {seq_len: 32}, batch_size: 8, verify: false, threads: 0}
optim: {lr: 1e-2, schedule: {kind: cosine, warmup: 0}}
checkpoint: {every: 2}
monitor: {log_every: 1, evaluate_every: 2, evaluate_batches: 1}
platform: {compile_cache: none}
compute: {layers: scan, dtype: float32}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A dataset with and one without held-out documents, and a finished run of four steps."""
    path = tmp_path_factory.mktemp("wiring")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        for name, validation in (("data", 10), ("whole", 0)):
            prepare(
                PrepareConfig(
                    inputs=(World(count=120),), out=name, tokenizer=BytesTokenizer(), validation=validation, seq_len=32
                )
            )
        (path / "recipe.yaml").write_text(RECIPE)
        train(load_recipe("recipe.yaml"))
    return path


@pytest.fixture
def workspace(trained, tmp_path, monkeypatch):
    """The same, for one test."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def steps_and_samples(run_dir):
    return [(each["step"], each["sample"]) for each in read(run_dir / "metrics.jsonl") if "sample" in each]


def test_a_copied_run_goes_on_in_its_own_place_and_another_batch_size_in_the_same_order(workspace, capsys):
    original = (workspace / "runs" / "one" / "metrics.jsonl").read_bytes()
    shutil.copytree(workspace / "runs" / "one", workspace / "copy")
    assert train(load_recipe("copy", ["data.batch_size=16", "steps=6"])).run_dir.name == "copy"
    assert steps_and_samples(workspace / "copy")[3:] == [(4, 24), (5, 32), (6, 48)]
    assert (workspace / "runs" / "one" / "metrics.jsonl").read_bytes() == original
    for step, rows in ((4, "24 25 31"), (5, "32 33 47"), (6, "48 63"), (7, "64 79")):
        assert inspect(["copy", "--step", str(step)]) is None
        shown = capsys.readouterr().out
        assert all(f"sample {row}" in shown for row in rows.split())
        assert f"sample {int(rows.split()[-1]) + 1}" not in shown


def test_a_stop_before_the_evaluation_is_caught_up(workspace):
    path = workspace / "runs" / "one" / "metrics.jsonl"
    before = path.read_text()
    lines = before.splitlines(keepends=True)
    assert "val_loss" in lines[-1]
    path.write_text("".join(lines[:-1]))
    train(load_recipe("runs/one"))
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["step.ema_decay=0.9", "steps=9"], r"with another step.ema_decay \(none, now a moving average\)"),
        (["optim.kind=muon", "steps=9"], r"with another optim.kind \(adamw, now muon\)"),
        (["data.seed=1", "data.batch_size=16"], r"with another data \(.*; .* \(not as in its recipe: data.seed\)$"),
        (["data.epochs=1", "steps=1000000"], r"steps=1000000 needs \d+ samples, and data.epochs=1 are \d+; set steps="),
        (["monitor.prompts=[" + "x" * 50 + "]", "monitor.sample_tokens=4"], "monitor.prompts.0 has 51 tokens"),
        (["model.d_ff=48"], "already holds a run with another model"),
    ],
)
def test_a_refused_resume_changes_nothing(workspace, overrides, message):
    files = {path: path.stat().st_mtime_ns for path in (workspace / "runs" / "one").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        train(load_recipe("runs/one", overrides))
    for alive in (".lock", "heartbeats/process-0.json"):
        files.pop(workspace / "runs" / "one" / alive)
    assert all(path.stat().st_mtime_ns == time for path, time in files.items())


def test_a_tokenizer_that_was_copied_by_half_is_copied_anew(workspace, monkeypatch):
    recipe = load_recipe("recipe.yaml", ["out=runs/two", "steps=1"])
    run_dir, begun = workspace / "runs" / "two", []

    def cut(source, target, **_):
        target.mkdir(exist_ok=True)
        (target / "half").touch()
        raise KeyboardInterrupt

    def start(*_):
        begun.append(sorted(path.name for path in run_dir.iterdir()))
        raise InterruptedError

    monkeypatch.setattr(Run, "start", start)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "copytree", cut)
        train(recipe)
    assert not (run_dir / "tokenizer").exists() and not begun
    with pytest.raises(InterruptedError):
        train(recipe)
    assert begun == [[".lock", "checkpoints", "heartbeats", "recipe.yaml", "tokenizer"]]
    files = {path.name: path.read_bytes() for path in (run_dir / "tokenizer").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (workspace / "data" / "tokenizer").iterdir()}


def test_a_checkpoint_before_the_next_evaluation_ranks_by_the_last_one(workspace):
    train(load_recipe("runs/one", ["steps=6", "monitor.evaluate_every=4", "checkpoint={every: 1, keep_last: 9}"]))
    measured = {each["step"]: each["val_loss"] for each in read("runs/one/metrics.jsonl") if "val_loss" in each}
    with Checkpoints(workspace / "runs" / "one") as checkpoints:
        ranked_by = {step: checkpoints.meta(step)["val_loss"] for step in (4, 5, 6)}
    assert ranked_by == {4: measured[4], 5: measured[4], 6: measured[6]}


def test_a_disk_that_fills_up_costs_only_the_steps_since_the_last_checkpoint(workspace):
    recipe = load_recipe("runs/one", ["steps=8", "monitor.evaluate_every=100"])
    shutil.copytree("runs/one", "undisturbed")
    train(load_recipe("undisturbed", ["steps=8", "monitor.evaluate_every=100"]))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))  # as a full disk: records fit, checkpoints do not
    try:
        with pytest.raises(
            OSError, match=r"checkpoints/6 could not be written .*newest complete one is of step 4; mak"
        ):
            train(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert train(recipe).step == 8
    assert (workspace / "runs/one/metrics.jsonl").read_bytes() == Path("undisturbed/metrics.jsonl").read_bytes()
    assert sorted(path.name for path in Path("runs/one/checkpoints").iterdir()) == ["6", "8"]


@pytest.mark.parametrize(
    ("found", "free"), [(".recipe.yaml.7.tmp", True), (".lock", True), ("notes.txt", False), ("checkpoints", False)]
)
def test_what_a_run_killed_at_its_start_leaves_is_no_obstacle(tmp_path, found, free):
    (tmp_path / found).touch()
    with nullcontext() if free else pytest.raises(ValueError, match="holds no run"):
        check_home(tmp_path, None)


def test_each_process_has_the_directory_that_only_the_first_one_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with _claimed(tmp_path / "twins" / "run", None, None):
        assert not list((tmp_path / "twins" / "run").iterdir())


def test_rows_are_at_least_one(workspace, capsys):
    assert inspect(["data", "--rows", "0"]) == 2
    assert capsys.readouterr() == ("", "error: --rows=0: show at least one row\n")


def test_another_tokenizer_is_called_so(workspace):
    manifest = workspace / "data" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokenizer_fingerprint": "', '"tokenizer_fingerprint": "0'))
    with pytest.raises(ValueError, match=r"was trained with another tokenizer \(\w+, now 0\w+\)"):
        train(load_recipe("runs/one", ["steps=9"]))


def test_data_without_held_out_documents_trains_and_says_so_once(workspace, capsys):
    train(load_recipe("recipe.yaml", ["out=runs/two", "data.sources.0.path=whole", "steps=2"]))
    assert capsys.readouterr().out.count("no validation split") == 1
    assert [record["step"] for record in read(workspace / "runs" / "two" / "metrics.jsonl")] == [1, 2]


def test_start_from_a_checkpoint_needs_no_model_section(workspace):
    (workspace / "named").mkdir()
    (workspace / "named" / "run.json").write_text('{"model": "../runs/one"}')
    text = "\n".join(line for line in RECIPE.splitlines() if not line.startswith("model"))
    (workspace / "tune.yaml").write_text(text)
    for source in ("runs/one/checkpoints/2", "named"):
        assert tokenizers.load(source).fingerprint == tokenizers.load("runs/one").fingerprint
        assert load_recipe("tune.yaml", [f"start_from={source}"]).model == load_recipe("runs/one").model


def test_tune_needs_conversations_and_train_says_that_it_has_them(workspace, capsys):
    assert tune_command(["recipe.yaml", "start_from=runs/one", "out=runs/two"]) == 2
    assert (
        "error: no conversations in data: prepared as text; prepare conversations (--chat)" in capsys.readouterr().err
    )
    assert not (workspace / "runs" / "two").exists()
    talk = PrepareConfig(inputs=(World(count=40),), out="talk", tokenizer=BytesTokenizer(), chat=True, validation=0)
    prepare(talk)
    flags = [
        "recipe.yaml",
        "data.sources.0.path=talk",
        "data.packing.seq_len=1024",
        "model.max_seq_len=1024",
        "steps=1",
    ]
    note = "note: of the conversations in talk only the answers are learned, as in tune"
    for steps, notes in ((1, 1), (2, 0)):  # said once, and not again by a resumed run
        assert train_command([*flags, f"steps={steps}", "out=runs/three"]) == 0
        assert capsys.readouterr().out.count(note) == notes
    lm = jaxllm.load("runs/three")
    LanguageModel(lm.config, lm.params, lm.tokenizer, stop_ids=(7,)).save("runs/stops")  # as a published one may
    assert tune_command([*flags, "start_from=runs/stops", "out=runs/four"]) == 0
    assert note not in capsys.readouterr().out
    assert jaxllm.load("runs/four").stop_ids == (lm.tokenizer.eos_id, 7)


def test_length_in_samples_survives_another_batch_size(workspace):
    def steps(*overrides, done=0, sample=0):
        recipe = load_recipe("recipe.yaml", overrides)
        return total_steps(recipe, loader(recipe), done, sample)

    def loader(recipe):
        return Loader(recipe.data)

    size = loader(load_recipe("recipe.yaml")).samples_per_epoch
    assert steps("steps=1 epoch") == -(-size // 8)
    assert steps("steps=2 epochs", "data.epochs=2") == -(-2 * size // 8)
    assert steps("steps=2 epochs", "data.batch_size=16", done=5, sample=40) == 5 + -(-(2 * size - 40) // 16)
    assert steps("steps=3200 tokens", "data.batch_size=4", done=3, sample=24) == 3 + 19
    assert steps("steps=320 tokens", done=10, sample=80) == 10  # over already
    assert steps("steps=20", "data.batch_size=16", done=5, sample=40) == 20


def test_more_epochs_begin_behind_the_last_sample_and_not_behind_its_filled_up_batch(workspace):
    size = Loader(load_recipe("recipe.yaml").data).samples_per_epoch
    batch = next(rows for rows in (32, 40, 48, 56) if size % rows)
    one = ["out=runs/epochs", f"data.batch_size={batch}", "data.epochs=1", "steps=1 epoch"]
    train(load_recipe("recipe.yaml", one))
    steps = -(-size // batch)
    assert read(Path("runs/epochs/metrics.jsonl"))[-1]["step"] == steps
    with Checkpoints("runs/epochs") as checkpoints:
        assert checkpoints.meta(steps)["sample"] == size
    train(load_recipe("runs/epochs/recipe.yaml", ["data.epochs=2", f"steps={steps + 1}"]))
    last = [record for record in read(Path("runs/epochs/metrics.jsonl")) if "sample" in record][-1]
    assert (last["step"], last["sample"]) == (steps + 1, size)


@pytest.mark.parametrize("kernel", ["cudnn", "splash"])
def test_what_was_trained_with_the_kernel_of_an_accelerator_is_read_anywhere(workspace, capsys, kernel):
    path = Path("runs/one/recipe.yaml")
    expected = jaxllm.load("runs/one").logits([[7, 8, 9]])
    text = path.read_text().replace("kernel: auto", f"kernel: {kernel}")
    assert f"kernel: {kernel}" in text
    path.write_text(text)
    lm = jaxllm.load("runs/one")
    np.testing.assert_array_equal(lm.logits([[7, 8, 9]]), expected)
    assert not inspect(["runs/one", "--losses", "--rows=1"])
    recipe = load_recipe("runs/one", ["compute.kernel=auto", "monitor.prompts=[The]", "monitor.sample_tokens=2"])
    run, said = Run(recipe, Loader(recipe.data), make_mesh(recipe.mesh)), []
    run.recipe = load_recipe("runs/one", ["monitor.prompts=[The]", "monitor.sample_tokens=2"])  # as on its accelerator
    run.log = SimpleNamespace(sample=lambda *sample: said.append(sample[:2]))
    run.write_samples(4, TrainState(0, lm.params, (), None, 0.0))
    assert said == [(4, "The")]
    with pytest.raises(ValueError, match=f"compute.kernel={kernel} cannot compute this attention: it is for a"):
        train(load_recipe("runs/one", ["steps=6"]))


def announced(*overrides):
    """What a new run says first: its line and its notes."""
    recipe = load_recipe("recipe.yaml", overrides)
    loader = Loader(recipe.data)
    run = Run(recipe, loader, make_mesh(recipe.mesh))
    steps = total_steps(recipe, loader, 0, 0)
    return run.describe(steps), "".join(run.notes(steps))


def test_that_the_two_losses_are_of_different_mixtures_is_said(workspace):
    sources = ["data.sources.1={path: whole, weight: 0.2, validate_on: false}"]
    assert "weights, and of the held-out documents of data" in announced(*sources)[1]


def test_a_dataset_in_place_of_a_recipe_is_said_to_be_one(workspace, capsys):
    assert train_command(["data"]) == 2
    advised = "python -m jaxllm.train configs/own-text/pretrain.yaml data.sources.0.path=data"
    assert f"error: data is a dataset, and no recipe or run; learn from it with a recipe, such as: {advised}\n" == (
        capsys.readouterr().err
    )


def test_a_batch_larger_than_an_epoch_is_said_and_twice_the_length_is_refused(workspace):
    size = Loader(load_recipe("recipe.yaml").data).samples_per_epoch
    line, note = announced(f"data.batch_size={size + 8}", "steps=1 epoch")
    assert f"positions/step, 1 step = {(size + 8) * 32 / 1000:.1f}k positions = {(size + 8) / size:.1f} epochs" in line
    assert f"note: an epoch has {size:,} samples, fewer than data.batch_size={size + 8}" in note
    assert announced(f"data.batch_size={size}", "steps=1 epoch")[1] == ""
    with pytest.raises(ValueError, match=r"steps=320 tokens asks for 10 samples, .*would make it 24; lower .* to 10,"):
        announced("data.batch_size=24", "steps=320 tokens")


def test_conversations_that_are_left_out_are_counted(tmp_path):
    prepare(PrepareConfig(inputs=(World(count=60),), out=str(tmp_path / "chat"), tokenizer=BytesTokenizer(), chat=True))
    data = {"sources": [{"path": str(tmp_path / "chat")}], "packing": {"seq_len": 90, "long": "drop"}, "batch_size": 4}
    recipe = Recipe(out="out", model=presets.get("tiny"), data=data)
    loader = Loader(recipe.data)
    [note] = Run(recipe, loader, make_mesh(recipe.mesh)).notes(1000)
    [plan] = loader.plans
    longer = int((plan.dataset.lengths - 1 > 90).sum())
    assert 0 < longer < len(plan.dataset)
    assert f"{longer} of {len(plan.dataset)} conversations of {tmp_path / 'chat'} are longer than" in note


def test_a_finite_order_fills_up_its_last_batch_and_is_no_longer_than_asked(workspace):
    size = Loader(load_recipe("recipe.yaml").data).samples_per_epoch
    line, _ = announced("data.epochs=1", f"data.batch_size={3 * size}", "steps=1 epoch")
    assert f"1 step = {size * 32 / 1000:.1f}k positions = 1.0 epochs" in line


def test_a_warmup_that_leaves_no_time_for_the_fall_is_said(workspace):
    rises = [announced("steps=9", f"optim.schedule.warmup={warmup}")[1] for warmup in (50, 5, 4, 0.05)]
    assert "the learning rate rises over all 9 steps (optim.schedule.warmup=50); 0.05, which" in rises[0]
    assert "rises over 5 of the 9 steps (optim.schedule.warmup=5)" in rises[1]
    assert rises[2:] == ["", ""]


def test_a_run_speaks_before_it_compiles_and_after_its_first_step_and_a_finished_one_only_says_so(workspace, capsys):
    recipe = load_recipe("recipe.yaml", ["out=runs/two", "steps=3", "monitor.log_every=100", "optim.schedule.warmup=9"])
    train(recipe)
    said = capsys.readouterr().out
    begin, _, _ = said.partition("compiling the step ...\n")
    assert re.search(r"memory per device.*; this process may hold 0\.6 GB, 0\.6 GB with platform\.keep_memory", begin)
    first, last = re.findall(r"^train (\d)/3  loss [\d.]+  (.*)$", said, re.MULTILINE)
    assert first[0] == "1" and re.fullmatch(r"compiled and done in \d+ s", first[1])
    assert last[0] == "3" and last[1].endswith("  0:00 left")
    train(recipe)
    said = capsys.readouterr().out
    more = "to go on: python -m jaxllm.train runs/two steps=N"
    assert f"finished: all 3 steps are done, nothing is trained; {more}" in said
    assert not any(word in said for word in ("memory per device", "compiling", "learning rate"))
    train(recipe, goes_on=False)
    said = capsys.readouterr().out
    assert "nothing is trained\n" in said and "not as it was" not in said


def test_what_a_resumed_run_has_another_way_is_said(workspace, capsys):
    overrides = ["data.batch_size=16", "optim.lr=0.5"]
    change = "data.batch_size=16 (was 8), optim.lr=0.5 (was 0.01)"
    train(load_recipe("runs/one", overrides))
    said = capsys.readouterr().out
    assert f"note: not as it was until step 4: {change}; the run is finished, so none of it is used\n" in said
    assert "512 positions/step from step 4 on, 4 steps = 1.0k positions" in said
    train(load_recipe("runs/one", [*overrides, "steps=5"]))
    said = capsys.readouterr().out
    assert f"note: not as it was until step 4: steps=5 (was 4), {change}\n" in said
    assert "512 positions/step from step 4 on, 5 steps = 1.5k positions" in said


def test_what_is_left_without_saving_is_said_with_what_was_kept(workspace):
    (workspace / "runs/one/checkpoints/6.orbax-checkpoint-tmp").mkdir()
    assert _kept(Path("runs/one")).endswith("checkpoint is of step 4; resume with: python -m jaxllm.train runs/one")
    assert "nothing was saved yet; begin anew with:" in _kept(Path("runs/none"))


@pytest.mark.parametrize(
    ("stopped", "status"), [("", 0), ("SIGINT", 130), ("SIGTERM", 143), ("a signal to another process", 143)]
)
def test_the_exit_status_is_that_of_the_signal(stopped, status):
    assert RunResult(Path("r"), 3, stopped).status == status
