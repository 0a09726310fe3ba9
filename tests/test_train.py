"""Whole runs as a user makes them: real processes, really killed."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

STEPS = 24
RECIPE = """
out: {run}
steps: {steps}
model: {{preset: tiny, n_layers: 1, d_model: 32, n_heads: 2, d_ff: 48, vocab_size: 300}}
data: {{sources: [{{path: {data}}}], packing: {{seq_len: 32}}, batch_size: 4}}
optim: {{lr: 1e-2, schedule: {{kind: cosine, warmup: 4}}}}
step: {{ema_decay: 0.9}}
checkpoint: {{every: 4}}
monitor: {{log_every: 1, evaluate_every: 8}}
platform: {{cpu_devices: 2, compile_cache: {cache}}}
compute: {{layers: scan}}
"""


def python(*arguments, how="-m", **options):
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": ""}
    environment.pop("JAX_NUM_CPU_DEVICES")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": environment, **options}
    return subprocess.Popen([sys.executable, how, *map(str, arguments)], **options)


def run(*arguments):
    process = python(*arguments)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A dataset, a compile cache and the run that nobody disturbs."""
    path = tmp_path_factory.mktemp("train")
    status, output = run(
        "jaxllm.prepare", "--world", 300, "--tokenizer", "bytes", "--validation", 10, "--out", path / "data"
    )
    assert status == 0, output
    status, output = run("jaxllm.train", recipe(path, "undisturbed"))
    assert status == 0, output
    return path


def recipe(path: Path, name: str, steps: int = STEPS) -> Path:
    file = path / f"{name}.yaml"
    file.write_text(RECIPE.format(run=path / name, data=path / "data", cache=path / "cache", steps=steps))
    return file


def final_params(run_dir: Path):
    """Every array of the last checkpoint's parameters, read as inference does."""
    from jaxllm.recipe import load_recipe
    from jaxllm.training.checkpoint import load_params

    params, meta = load_params(run_dir, load_recipe(run_dir).model)
    assert meta["step"] == STEPS
    return params


def assert_same_run(one: Path, other: Path):
    import jax

    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), final_params(one), final_params(other)
    )


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def lines(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.soak
def test_kill_9_at_random_moments_changes_nothing(workspace):
    run_dir, file = workspace / "killed", recipe(workspace, "killed")
    generator, kills = random.Random(time.time_ns()), 0
    for _ in range(3):
        process = python("jaxllm.train", file)
        target = lines(run_dir) + generator.randint(1, 9)
        while process.poll() is None and lines(run_dir) < min(target, STEPS):
            time.sleep(0.02)
        time.sleep(generator.random() * 0.3)  # a save may be under way
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert kills >= 1
    status, output = run("jaxllm.train", file)
    assert status == 0, output
    assert_same_run(run_dir, workspace / "undisturbed")


# A training process that is killed in the middle of a checkpoint; independent of how Orbax calls its functions.
DIES = """
import os, shutil, signal, sys
from pathlib import Path
from jaxllm.train import main

moment, step, recipe = sys.argv[1:]
make, move, remove = os.mkdir, os.rename, shutil.rmtree

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def is_ours(path, ending=""):
    return Path(path).parent.name == "checkpoints" and Path(path).name.startswith(step + ending)

def mkdir(path, *arguments, **options):
    make(path, *arguments, **options)
    if moment == "begun" and is_ours(path, "."):
        die()

def rename(source, target, *arguments, **options):
    if moment == "written" and is_ours(target):
        die()
    move(source, target, *arguments, **options)

def rmtree(path, *arguments, **options):
    if moment == "deleting" and is_ours(path):
        remove(Path(path) / "params")
        die()
    remove(path, *arguments, **options)

os.mkdir, os.rename, shutil.rmtree = mkdir, rename, rmtree
main([recipe])
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_checkpoint_changes_nothing(workspace):
    run_dir, file = workspace / "halves", recipe(workspace, "halves")
    checkpoints, resumed = run_dir / "checkpoints", 0
    # (moment, of which checkpoint, complete checkpoints then)
    for moment, step, complete in (("begun", 8, [4]), ("written", 12, [4, 8]), ("deleting", 4, [4, 8, 12])):
        process = python(DIES, moment, step, file, how="-c")
        output, _ = process.communicate(timeout=240)
        assert process.returncode == -signal.SIGKILL, output
        assert not resumed or f"resuming at step {resumed}" in output
        assert sorted(int(path.name) for path in checkpoints.iterdir() if path.name.isdigit()) == complete
        resumed = complete[-1]
        halves = [path for path in checkpoints.glob("*") if not path.name.isdigit()]
        assert [path.name.partition(".")[0] for path in halves] == [str(step)] * (moment != "deleting")
        assert moment != "written" or any((halves[0] / "params" / "d").iterdir())  # the arrays are all there
    status, output = run("jaxllm.train", file)
    assert status == 0, output
    assert f"resuming at step {resumed}" in output
    assert_same_run(run_dir, workspace / "undisturbed")
    assert sorted(os.listdir(checkpoints)) == sorted(os.listdir(workspace / "undisturbed" / "checkpoints"))


def test_sigterm_saves_says_how_to_resume_and_resumes_bitwise(workspace):
    run_dir, file = workspace / "stopped", recipe(workspace, "stopped")
    process = python("jaxllm.train", file)
    while process.poll() is None and lines(run_dir) < 3:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 143
    assert f"python -m jaxllm.train {run_dir}" in output
    status, output = run("jaxllm.train", run_dir)
    assert status == 0, output
    assert_same_run(run_dir, workspace / "undisturbed")


def test_a_finished_run_is_not_trained_again(workspace):
    paths = [workspace / "undisturbed" / name for name in ("metrics.jsonl", "recipe.yaml")]
    before = [path.read_bytes() for path in paths]
    status, output = run("jaxllm.train", workspace / "undisturbed", "optim.lr=1e-9")
    assert status == 0, output
    assert "nothing is trained" in output
    status, output = run("jaxllm.train", workspace / "undisturbed", "steps=1")
    assert status == 2
    assert "steps=1 ends before step" in output
    assert [path.read_bytes() for path in paths] == before


def test_resume_refuses_what_would_not_be_the_same_run(workspace):
    import shutil

    for name in ("other-data", "other-model"):
        shutil.copytree(workspace / "undisturbed", workspace / name)
    status, output = run(
        "jaxllm.prepare", "--world", 310, "--tokenizer", "bytes", "--validation", 10, "--out", workspace / "data2"
    )
    assert status == 0, output
    run_dir = workspace / "other-data"
    status, output = run("jaxllm.train", run_dir, f"data.sources.0.path={workspace / 'data2'}", "steps=30")
    assert status == 2
    assert "was trained with another data" in output
    run_dir = workspace / "other-model"
    status, output = run("jaxllm.train", run_dir, "model.d_ff=64")
    assert status == 2
    assert "already holds a run with another model" in output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vocab_size=100", "model.vocab_size=100 is smaller than the tokenizer's"),
        ("data.packing.seq_len=4096", "data.packing.seq_len=4096 is longer than model.max_seq_len=128"),
        ("step.accumulate=3", "data.batch_size=4 is not divisible by step.accumulate=3"),
        ("step.accumulate=8", "data.batch_size=4 is not divisible by step.accumulate=8"),
        ("mesh.fsdp=3", "devices exactly; they are no multiple of 3"),
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("data.sources.0.path=/nowhere", "/nowhere"),
    ],
)
def test_contradictions_are_errors_before_any_compile(workspace, override, message, capsys):
    from jaxllm.train import main

    # this process has eight devices already
    assert main([str(recipe(workspace, "wrong")), "platform.cpu_devices=none", override]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
    assert not (workspace / "wrong").exists()


def test_records_hold_what_a_reader_needs(workspace):
    records = read_jsonl(workspace / "undisturbed" / "metrics.jsonl")
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.5
    assert [record["step"] for record in records if "val_loss" in record] == [8, 16, 24]
    timing = read_jsonl(workspace / "undisturbed" / "timing.jsonl")
    assert all(record["tokens_per_s"] > 0 for record in timing if "tokens_per_s" in record)


def free_port():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def two_processes(file, *overrides):
    """Start a run of two processes with two devices each."""
    port = free_port()
    processes = [
        ("platform.distributed=true", f"platform.coordinator=127.0.0.1:{port}", "platform.n_processes=2",
         f"platform.process_index={index}") for index in range(2)
    ]  # fmt: skip
    return [python("jaxllm.train", file, *overrides, *each) for each in processes]


def finish(processes, seconds=240):
    """Wait for both; a peer of one that hangs must not outlive the test."""
    try:
        return [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def until(processes, run_dir, n_lines):
    saved = lambda: any(path.name.isdigit() for path in (run_dir / "checkpoints").glob("*"))  # whole, by step 8
    while all(process.poll() is None for process in processes) and not (lines(run_dir) >= n_lines and saved()):
        time.sleep(0.02)


@pytest.mark.slow
def test_two_processes_compute_what_one_does_also_when_one_is_killed_and_one_stopped(workspace):
    run_dir, file = workspace / "two", recipe(workspace, "two")
    whole = two_processes(recipe(workspace, "two-undisturbed"))
    outputs = finish(whole)
    assert [process.returncode for process in whole] == [0, 0], outputs
    fast = f"checkpoint.fast={{directory: {workspace / 'memory'}, every: 1}}"
    processes = two_processes(file, "platform.silence_s=5", fast)
    until(processes, run_dir, 6)
    processes[1].kill()
    processes[1].wait()
    killed_s = time.monotonic()
    outputs = finish(processes, 60)
    assert time.monotonic() - killed_s < 30
    assert processes[0].returncode == 75, outputs
    why = rf"error: process 1 of 2 \(pid {processes[1].pid} on .*\) is missing: it was killed in phase \w+ of step \d+"
    assert re.search(
        rf"{why}.*; this is process 0, in phase \w+ of step \d+\n.* python -m jaxllm.train {run_dir}\n", outputs[0]
    )
    processes = two_processes(run_dir)
    until(processes, run_dir, 9)
    processes[1].send_signal(signal.SIGTERM)
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [143, 143], outputs
    assert "resuming at step" in outputs[0]
    stopped = int(re.search(r"stopped by a signal to another process at step (\d+)", outputs[0])[1])
    assert str(stopped) in os.listdir(run_dir / "checkpoints")
    processes = two_processes(run_dir)
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert f"resuming at step {stopped}" in outputs[0]
    assert_same_run(run_dir, workspace / "two-undisturbed")
    one, two = (read_jsonl(each / "metrics.jsonl") for each in (workspace / "undisturbed", run_dir))
    assert [(each["step"], each.get("sample")) for each in two] == [(each["step"], each.get("sample")) for each in one]
    for key in ("loss", "val_loss"):
        expected = [each[key] for each in one if key in each]
        np.testing.assert_allclose([each[key] for each in two if key in each], expected, rtol=1e-4)


@pytest.mark.slow
def test_two_runs_in_one_directory_are_refused(workspace):
    first = python("jaxllm.train", recipe(workspace, "busy", steps=10_000))
    while first.poll() is None and lines(workspace / "busy") < 1:
        time.sleep(0.02)
    status, output = run("jaxllm.train", recipe(workspace, "busy"))
    first.kill()
    first.communicate()
    assert status == 2
    assert f"in use by another process (pid {first.pid} on" in output
