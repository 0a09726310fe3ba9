"""The fast tier of checkpoints: a run goes on from it as if nothing had been, and never from another's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.data.prepare import prepare
from jaxllm.data.prepare_config import BytesTokenizer, PrepareConfig
from jaxllm.data.reading.sources import World
from jaxllm.recipe import load_recipe
from jaxllm.run import Run
from jaxllm.training.checkpoint import load_params
from jaxllm.training.config import CheckpointConfig
from jaxllm.training.state import TrainState
from jaxllm.training.tiers import Tiers, multihost_utils
from jaxllm.wiring import train

RECIPE = """
out: undisturbed
steps: 4
model: {preset: tiny, n_layers: 1, d_model: 16, n_heads: 2, d_ff: 32, vocab_size: 300, max_seq_len: 32}
data: {sources: [{path: data}], packing: {seq_len: 32}, batch_size: 8, verify: false, threads: 0}
optim: {lr: 1e-2}
checkpoint: {every: 4, fast: {directory: memory, every: 1}}
monitor: {log_every: 1, evaluate_every: 2, evaluate_batches: 1}
platform: {compile_cache: none}
compute: {layers: scan, dtype: float32}
"""


def test_a_run_goes_on_from_the_fast_tier_bit_for_bit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    given = {"tokenizer": BytesTokenizer(), "validation": 10, "seq_len": 32}
    prepare(PrepareConfig(inputs=(World(count=60),), out="data", **given))
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    train(load_recipe("recipe.yaml", ["checkpoint.fast.directory=none"]))
    save = Run.save

    def save_and_fail(run, step, state, fast=False):
        save(run, step, state, fast)
        if step == 3:
            raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(Run, "save", save_and_fail)
        train(load_recipe("recipe.yaml", ["out=run"]))
    assert not any((tmp_path / "run" / "checkpoints").iterdir())
    capsys.readouterr()
    train(load_recipe("run"))
    shown = capsys.readouterr()
    assert "resuming at step 3" in shown.out and "step 3 is of the fast checkpoints in" in shown.err
    runs = [tmp_path / name for name in ("undisturbed", "run")]
    assert len({(run / "metrics.jsonl").read_bytes() for run in runs}) == 1
    (one, _), (other, _) = (load_params(run, load_recipe(run).model) for run in runs)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), one, other)
    assert not list((tmp_path / "memory").iterdir()) and not (tmp_path / "run" / "fast.txt").exists()


def state_of(step):
    return TrainState(jnp.int32(step), {"w": jnp.arange(8.0) + step}, {"m": jnp.ones(2)}, None, jnp.float32(0))


def killed(place, launch, steps, *, main=(), config=None):
    """What a launch leaves that ended in disorder, and what it went on from."""
    config = config or CheckpointConfig(fast={"directory": str(place / "memory"), "every": 1})
    try:
        with Tiers(place / "run", config, launch) as tiers:
            found = None
            if tiers.resumes:
                like = state_of(0)
                found, meta = tiers.restore(jax.eval_shape(lambda: like), jax.tree.map(lambda x: x.sharding, like))
                assert meta["step"] == int(found.step)
                np.testing.assert_array_equal(found.params["w"], state_of(meta["step"]).params["w"])
                found = meta["step"]
            for step in sorted({*steps, *main}):
                tier = tiers.fast if step in steps else tiers
                tier.save(state_of(step), {"step": step})
                tier.wait()
            raise InterruptedError
    except InterruptedError:
        return found


def damage(place):
    for file in place.glob("memory/*/process-0/*/checkpoints/*/params/**/d/*"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def test_what_is_newer_and_whole_is_taken(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert killed(tmp_path, 1, (4, 5, 6), main=(3,)) is None
    assert killed(tmp_path, 2, (7,)) == 6
    assert killed(tmp_path, 3, (), main=(8,)) == 7
    assert capsys.readouterr().err.count("note: ") == 2
    assert killed(tmp_path, 4, (9,)) == 8
    assert "is used: process 0 has none after step 8\n" in capsys.readouterr().err
    damage(tmp_path)
    assert killed(tmp_path, 5, ()) == 8
    assert "the fast checkpoint of step 9 is of no use to these processes and this mesh (" in capsys.readouterr().err


def test_another_line_is_never_taken(tmp_path):
    (tmp_path / "run").mkdir()
    killed(tmp_path, 1, (4, 5), main=(3,))
    off = CheckpointConfig()
    assert killed(tmp_path, 2, (), config=off) == 3  # and takes other steps from there on
    assert list((tmp_path / "memory").glob("*/*/*"))
    assert killed(tmp_path, 3, (4,)) == 3
    (tmp_path / "run").rename(tmp_path / "before")
    (tmp_path / "run").mkdir()
    assert killed(tmp_path, 4, ()) is None
    assert [path.name for path in (tmp_path / "memory").glob("*/*/*")] == ["4"]


def test_all_processes_must_have_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    killed(tmp_path, 1, (5, 6), main=(3,))
    with monkeypatch.context() as patch:
        patch.setattr(multihost_utils, "process_allgather", lambda own: np.stack([own, np.array([4, 5, 0, 0])]))
        assert killed(tmp_path, 2, (6,)) == 5  # once more
        patch.setattr(multihost_utils, "process_allgather", lambda own: np.stack([own, np.zeros_like(own)]))
        assert killed(tmp_path, 3, ()) == 3
    assert "is used: process 1 has none after step 3\n" in capsys.readouterr().err
