"""What can be seen of a run: names in the program and its trace, norms by block, goodput; and memory that is moved."""

import functools
import json
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.batch import Batch
from jaxllm.models.config import ComputeConfig, ModelConfig, Pipeline
from jaxllm.planning.aot import Job, abstract
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.training import goodput
from jaxllm.training.block_norms import block_norms
from jaxllm.training.checkpoint import _bit_sums
from jaxllm.training.config import AdamW, MonitorConfig, StepConfig
from jaxllm.training.feed import place
from jaxllm.training.goodput import Goodput
from jaxllm.training.metrics import MetricsWriter, read
from jaxllm.training.optim import optimizer
from jaxllm.training.profile import Profile
from jaxllm.training.state import init_state
from jaxllm.training.step import compile_step, device_bytes

MODEL = ModelConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, d_ff=64, max_seq_len=32)
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 17)).astype(np.int32)
ONES, PLACES = np.ones((8, 16), np.int32), np.tile(np.arange(16, dtype=np.int32), (8, 1))
BATCH = Batch(TOKENS[:, :-1], TOKENS[:, 1:], ONES.astype(np.float32), ONES, PLACES)


@functools.cache
def run(offload=False, remat="dots", block_norms=False):
    """Return (first state, parameters before the last update, state, metrics, bytes and text of the program)."""
    mesh, step, optim = (
        make_mesh(MeshConfig(fsdp=2), jax.devices()[:2]),
        StepConfig(offload=offload, block_norms=block_norms),
        AdamW(),
    )
    compute = ComputeConfig(dtype="float32", layers="scan", remat=remat)
    with jax.set_mesh(mesh):
        state, shardings = init_state(MODEL, optimizer(optim), mesh, seed=0, offload=offload)
        first, lr = jax.device_get(state), np.float32(1e-2)
        batch = place(BATCH, mesh)
        program = compile_step(MODEL, compute, optim, step, shardings).lower(state, batch, lr).compile()
        state, _ = program(state, batch, lr)
        before = jax.device_get(state.params)
        state, metrics = program(state, batch, lr)
    return first, before, state, metrics, device_bytes(program), program.as_text()


def test_every_process_has_the_norms_of_all_blocks_also_of_other_stages():
    step, compute = StepConfig(block_norms=True), ComputeConfig(layers="scan", pipeline=Pipeline(microbatches=2))
    job = Job(MODEL, compute, AdamW(), step, MeshConfig(data=1, stage=2), 8, 16)
    state, batch, mesh = abstract(job, jax.devices()[:2])
    shardings, resolved = jax.tree.map(lambda leaf: leaf.sharding, state), compute.resolve("cpu", 2)
    with jax.set_mesh(mesh):
        program = compile_step(MODEL, resolved, AdamW(), step, shardings).lower(state, batch, np.float32(1)).compile()
    metrics = program.output_shardings[1]
    assert "grad_norm/blocks" in metrics
    assert all(sharding.is_fully_replicated for sharding in metrics.values())


def test_the_program_names_its_parts_and_says_what_memory_it_takes():
    *_, memory, text = run()
    names = set(re.findall(r'op_name="([^"]*)"', text))
    found = lambda word, names: [each for each in names if re.search(rf"[/(]{word}[/)]", each)]
    backward = {each for each in names if "transpose(" in each}
    for part in ("embedding", "attention", "ffn"):
        assert found(part, names - backward) and found(part, backward), part
    assert found("loss", names) and found("optimizer", names)  # the loss makes its gradient on the way
    assert set(memory) == {"arguments", "results", "temporary"} and memory["arguments"] > 10 * memory["results"]


def test_what_waits_in_the_memory_of_the_host_changes_nothing():
    state, metrics = run()[2:4]
    moved, same = run(offload=True, remat="offload")[2:4]
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(moved.opt_state) if leaf.ndim} == {"pinned_host"}
    assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(moved.params)} == {"device"}
    np.testing.assert_allclose(metrics["loss"], same["loss"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.params, moved.params)
    near = jax.device_put(moved.opt_state, jax.tree.map(lambda leaf: leaf.sharding, state.opt_state))
    assert _bit_sums(moved.opt_state) == _bit_sums(near)


def test_norms_of_blocks_are_those_of_their_leaves():
    _, before, state, metrics, *_ = run(block_norms=True)
    assert metrics["grad_norm/blocks"].shape == (2,)
    total = sum(float(jnp.sum(jnp.square(value))) for key, value in metrics.items() if key.startswith("grad_norm/"))
    np.testing.assert_allclose(total**0.5, metrics["grad_norm"], rtol=1e-5)
    change = jax.tree.map(lambda a, b: np.asarray(a) - b, state.params["blocks"], before["blocks"])
    for layer in range(2):
        expected = sum(float(np.square(leaf[layer]).sum()) for leaf in jax.tree.leaves(change)) ** 0.5
        np.testing.assert_allclose(metrics["update_norm/blocks"][layer], expected, rtol=1e-3)
    norms = block_norms({"encoder": {"blocks": {"a": jnp.ones((3, 4))}}, "embed": jnp.ones((9,))})
    assert {key: value.tolist() for key, value in norms.items()} == {"encoder/blocks": [2.0] * 3, "embed": 3.0}


def test_lists_are_written_down_and_shown_layer_by_layer(tmp_path, monkeypatch):
    logged, asked = [], {}
    run = types.SimpleNamespace(
        log=logged.append, finish=lambda: logged.append("finished"), define_metric=lambda *_, **__: None, summary={}
    )
    fake = types.SimpleNamespace(init=lambda **options: asked.update(options) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = MetricsWriter(tmp_path, wandb="project")
    writer.metrics(1, {"loss": 2.0, "grad_norm/blocks": [1.0, float("nan")]})
    writer.close()
    assert read(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 2.0, "grad_norm/blocks": [1.0, "nan"]}]
    assert {**logged[0], "grad_norm/blocks/001": 0} == {
        "loss": 2.0, "grad_norm/blocks/000": 1.0, "grad_norm/blocks/001": 0, "step": 1
    }  # fmt: skip
    assert logged[1] == "finished" and asked["project"] == "project" and asked["resume"] == "allow"
    again = dict(asked)
    MetricsWriter(tmp_path, wandb="project").close()
    assert again == asked  # the next process of a run goes on with the same one
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install 'jaxllm\[wandb\]'"):
        MetricsWriter(tmp_path, wandb="project")


def test_goodput_counts_all_since_the_first_start(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(goodput.time, "time", lambda: now[0])
    first = Goodput(tmp_path, 0, [])
    first.add(30.0)
    now[0] += 40
    kept = {"step": 4, **first.values()}
    assert kept["goodput"] == 30 / 40
    first.add(10.0)  # is lost with what came after step 4
    now[0] += 60
    second = Goodput(tmp_path, 4, [kept])
    second.add(20.0)
    second.add(-1.0)
    now[0] += 25
    assert second.values() == {"productive_s": 50.0, "wall_s": 125.0, "goodput": 0.4}
    assert [record["step"] for record in read(tmp_path / goodput.FILE_NAME)] == [0, 4]


def test_a_trace_of_some_steps_names_their_parts(tmp_path):
    scoped = jax.jit(lambda x: jnp.sin(x) @ x)

    def attend(x):
        with jax.named_scope("attention"):
            return scoped(x)

    step, profile = jax.jit(attend), Profile(tmp_path, MonitorConfig(profile="2:3").profiled)
    x = jnp.ones((64, 64))
    for number in range(1, 5):
        profile.before(number, x)
        x = step(x)
        profile.after(number, x)
        assert profile._running == (number == 2)
    [trace] = (tmp_path / "profile").rglob("*.xplane.pb")
    assert b"attention" in trace.read_bytes()
    profile = Profile(tmp_path / "stopped", (1, 9))
    for number in (5, 6):  # a resumed run begins in the midst
        profile.before(number, x)
    profile.close()
    assert list((tmp_path / "stopped").rglob("*.xplane.pb"))
    with pytest.raises(ValueError, match="profile=5:3 ends before it begins"):
        MonitorConfig(profile="5:3")


def test_timing_has_what_a_reader_asks_for(tmp_path):
    from jaxllm.training.run_log import Position, RunLog

    with RunLog(
        tmp_path, "t", MonitorConfig(log_every=2), 4, begin=Position(0, 0, 8), tokens_per_step=16, flops=(1e9, 1e12)
    ) as log:
        log.compiled(3.0, "memory")
        for step in range(1, 5):
            log.step(step, {"loss": 1.0, "skipped": 0.0}, 4.0 if step == 1 else 1.0, 0.25)
    one, two = (json.loads(line) for line in (tmp_path / "timing.jsonl").read_text().splitlines())
    assert (one["compile_s"], one["productive_s"], two["productive_s"]) == (3.0, 0.75 * 2, 0.75 * 4)
    assert "compile_s" not in two and two["mfu"] == pytest.approx(1e-3) and two["data_wait_s"] == 0.25
