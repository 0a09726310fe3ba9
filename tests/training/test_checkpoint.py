import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.models.config import ModelConfig
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.training.checkpoint import CheckpointConfig, Checkpoints, load_params
from jaxllm.training.optim import AdamW, Muon, optimizer
from jaxllm.training.state import TrainState, init_state

MODEL = ModelConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, d_ff=64, max_seq_len=32)


ADAMW, DATA = AdamW(), MeshConfig()


def make(optim=ADAMW, mesh=DATA, devices=8, seed=0, ema=False):
    return init_state(MODEL, optimizer(optim), make_mesh(mesh, jax.devices()[:devices]), seed=seed, ema=ema)


def save(directory, state, *steps, **options):
    with Checkpoints(directory, CheckpointConfig(**options)) as checkpoints:
        for step in steps:
            checkpoints.save(state, {"step": step, "sample": 8 * step}, val_loss=abs(step - 2.0))
            checkpoints.wait()
        return checkpoints.steps()


def assert_equal(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


@pytest.mark.parametrize(("optim", "ema"), [(AdamW(), True), (Muon(), False)])
def test_restores_bitwise_onto_another_mesh(tmp_path, optim, ema):
    state, _ = make(optim, MeshConfig(fsdp=8), ema=ema)
    save(tmp_path, state, 3)
    other, shardings = make(optim, MeshConfig(data=1, stage=2, tensor=2), devices=4, seed=1, ema=ema)
    with Checkpoints(tmp_path) as checkpoints:
        restored, meta = checkpoints.restore(jax.eval_shape(lambda: other), shardings)
    assert meta == {"step": 3, "sample": 24}
    assert_equal(restored, state)
    kernel = restored.params["blocks"]["ffn"]["up"]["kernel"]
    assert kernel.sharding == shardings.params["blocks"]["ffn"]["up"]["kernel"]


def test_keeps_the_last_and_the_best(tmp_path):
    state, _ = make(devices=1)
    assert save(tmp_path, state, 1, 2, 3, 4, 5, keep_last=2, keep_best=1) == [2, 4, 5]


def test_the_best_are_kept_through_a_resume(tmp_path):
    state = TrainState(jnp.int32(0), {"w": jnp.zeros(2)}, {"m": jnp.zeros(2)}, None, jnp.float32(0))

    def kept_after(keep_best, **losses):
        with Checkpoints(tmp_path, CheckpointConfig(keep_last=1, keep_best=keep_best)) as checkpoints:
            for step, loss in losses.items():
                checkpoints.save(state, {"step": int(step[1:])}, val_loss=loss)
            checkpoints.wait()
            return checkpoints.steps()

    assert kept_after(2, s1=3.0, s2=1.0, s3=2.0) == [2, 3]
    assert kept_after(2, s4=2.5, s5=1.5) == [2, 5]  # the third is worse than one that came after the resume
    assert kept_after(2, s6=None) == [2, 5, 6]  # not measured: kept as the last, never as one of the best
    assert kept_after(2, s7=9.0) == [2, 5, 7]
    assert kept_after(0, s8=0.5, s9=8.0) == [9]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, capsys):
    state, shardings = make(devices=1)
    save(tmp_path, state, 1, 2)
    for file in (tmp_path / "checkpoints" / "2" / "params").rglob("*"):
        if file.is_file() and file.stat().st_size > 1000:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with Checkpoints(tmp_path) as checkpoints:
        restored, meta = checkpoints.restore(jax.eval_shape(lambda: state), shardings)
        assert meta["step"] == 1
        assert capsys.readouterr().err == (
            "note: the checkpoint of step 2 is damaged (a file of it is missing, cut short or changed), and now in "
            f"{tmp_path / 'damaged' / '2'}; step 1 is used\n"
        )
        assert_equal(restored.params, state.params)
        assert checkpoints.steps() == [1]
        assert (tmp_path / "damaged" / "2" / "params").is_dir()
        checkpoints.save(restored, {"step": 2, "sample": 16})
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]


def test_what_must_stay_the_same_is_no_damage(tmp_path):
    state, shardings = make(devices=1)
    save(tmp_path, state, 1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {"step": 2, "sample": 0, "fingerprints": {"tokenizer": "a", "optim.kind": "adamw"}})
        checkpoints.wait()
        abstract = jax.eval_shape(lambda: state)
        with pytest.raises(ValueError, match=r"2 was trained with another tokenizer \(a, now b\) and another opt"):
            checkpoints.restore(abstract, shardings, {"tokenizer": "b", "optim.kind": "muon"})
        assert checkpoints.steps() == [1, 2]
        assert checkpoints.restore(abstract, shardings, {"optim.kind": "adamw"})[1]["step"] == 2


def test_inference_names_a_damaged_checkpoint_and_the_one_before(tmp_path):
    state, _ = make(devices=1)
    save(tmp_path, state, 1, 2)
    file = tmp_path / "checkpoints" / "2" / "meta" / "metadata"
    file.write_text(file.read_text()[:9])
    why = r"\(a file of it is missing, cut short or changed\)"
    with pytest.raises(ValueError, match=rf"checkpoints/2 cannot be read {why}; use the one before: .*checkpoints/1$"):
        load_params(tmp_path, MODEL)
    assert load_params(tmp_path, MODEL, step=1)[1]["step"] == 1


def test_a_flipped_bit_is_damage(tmp_path, capsys):
    state, shardings = make(devices=1)
    for run, part in enumerate((0.3, 0.5, 0.7)):
        save(tmp_path / str(run), state, 1, 2)
        largest = max(
            (tmp_path / str(run) / "checkpoints" / "2" / "params").rglob("d/*"), key=lambda path: path.stat().st_size
        )
        content = bytearray(largest.read_bytes())
        content[int(part * len(content))] ^= 1
        largest.write_bytes(content)
        with Checkpoints(tmp_path / str(run)) as checkpoints:
            restored, meta = checkpoints.restore(jax.eval_shape(lambda: state), shardings)
        assert meta == {"step": 1, "sample": 8}
        assert_equal(restored, state)
    said = capsys.readouterr().err  # Orbax itself sees some of them
    assert "the bits of params are not those that were written" in said


def test_any_one_damaged_file_costs_that_checkpoint_alone(tmp_path):
    state, shardings = make(devices=1)
    save(tmp_path / "run", state, 1, 2)
    newest = tmp_path / "run" / "checkpoints" / "2"
    names = [path.relative_to(newest) for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    arrays = sorted((name for name in names if "d" in name.parts), key=lambda name: (newest / name).stat().st_size)
    lost = 0
    for number, name in enumerate([*arrays[-3:], "meta/metadata"]):
        place = tmp_path / str(number)
        shutil.copytree(tmp_path / "run", place)
        path = place / "checkpoints" / "2" / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with Checkpoints(place) as checkpoints:
            restored, meta = checkpoints.restore(jax.eval_shape(lambda: state), shardings)
            assert_equal(restored, state)
            assert checkpoints.steps() == list(range(1, meta["step"] + 1)), name
            lost += meta["step"] == 1
    assert lost >= 2  # not everything that Orbax writes does it read


@pytest.mark.parametrize("content", ["", "{}", '{"val_loss"'])
def test_a_damaged_validation_loss_is_forgotten(tmp_path, content):
    state, shardings = make(devices=1)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, {"step": 1, "sample": 0}, val_loss=2.0)
    (tmp_path / "checkpoints" / "1" / "metrics" / "metrics").write_text(content)
    assert load_params(tmp_path, MODEL)[1]["step"] == 1
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(jax.eval_shape(lambda: state), shardings)[1]["step"] == 1


def test_a_disk_that_is_full_is_said_in_one_line(tmp_path):
    state, _ = make(devices=1)
    save(tmp_path, state, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Checkpoints(tmp_path) as checkpoints:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        try:
            with pytest.raises(OSError, match=r"2 could not be written \(.*newest complete one is of step 1; "):
                checkpoints.save(state, {"step": 2, "sample": 0})
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert checkpoints.steps() == [1]


def test_inference_reads_the_moving_average_where_there_is_one(tmp_path):
    state, _ = make(devices=1, ema=True)
    state = state._replace(ema=jax.tree.map(lambda x: x + 1, state.params))
    save(tmp_path, state, 1)
    params, meta = load_params(tmp_path, MODEL)
    assert meta["sample"] == 8
    assert_equal(params, state.ema)


def test_missing_checkpoints_are_said_clearly(tmp_path):
    with pytest.raises(ValueError, match="has no checkpoints/ directory"):
        load_params(tmp_path, MODEL)
    state, _ = make(devices=1)
    save(tmp_path, state, 4)
    (tmp_path / "new/checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"new/checkpoints has no checkpoint; there is none yet$"):
        load_params(tmp_path / "new", MODEL)
    with pytest.raises(ValueError, match=r"no checkpoint 7; it has steps \[4\]"):
        load_params(tmp_path, MODEL, step=7)
