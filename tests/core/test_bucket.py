"""A directory in a bucket and its twin on this machine hold the same small files."""

import fcntl

import fsspec
import jax
import numpy as np
import pytest

from jaxllm.core import bucket, files
from jaxllm.data.prepare import prepare
from jaxllm.data.prepare_config import BytesTokenizer, PrepareConfig
from jaxllm.data.reading.sources import World
from jaxllm.training.config import MonitorConfig
from jaxllm.training.run_log import Position, RunLog


@pytest.fixture
def fs(tmp_path, monkeypatch):
    """An empty bucket in memory, and no twins yet."""
    monkeypatch.setattr(bucket, "TWINS", tmp_path / "twins")
    monkeypatch.setattr(bucket, "_mirrored", set())
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def stored(fs) -> dict[str, bytes]:
    return {name: fs.cat(name) for name in fs.find("/")}


def again(monkeypatch, url: str):
    """What another process sees."""
    monkeypatch.setattr(bucket, "_mirrored", set())
    return bucket.here(url)


def test_other_paths_are_left_alone(tmp_path):
    assert bucket.here("a/b") == bucket.Path("a/b")
    assert bucket.origin(tmp_path) == tmp_path
    bucket.push(tmp_path)


def test_what_changed_is_copied_and_nothing_else(fs, monkeypatch):
    twin = bucket.here("memory://b/run/")
    assert not twin.exists()
    files.write_json(twin / "recipe.yaml", 1)
    for name in ("checkpoints/5", "damaged/5"):
        (twin / name).mkdir(parents=True)
    for name in ("metrics.jsonl", ".lock", "checkpoints/5/x", "damaged/5/x"):
        (twin / name).write_text("old")
    assert stored(fs) == {"/b/run/recipe.yaml": b"1\n"}
    bucket.push(twin)
    bucket.push(twin / "checkpoints/5/x")
    assert set(stored(fs)) == {"/b/run/recipe.yaml", "/b/run/metrics.jsonl"}
    monkeypatch.setattr(fs.__class__, "put_file", lambda *_: pytest.fail("nothing has changed"))
    bucket.push(twin)


def test_a_twin_becomes_what_the_bucket_has(fs, monkeypatch):
    twin = bucket.here("memory://b/data")
    for name in ("a", "b"):
        files.write_text(twin / name, "old")
    fs.pipe("/b/data/a", b"new")
    fs.rm("/b/data/b")
    fs.pipe("/b/data/c/d", b"new")
    for name in ("checkpoints/5/x", "damaged/5/x", "tune/checkpoints/5/x"):
        fs.pipe(f"/b/data/{name}", b"large")
    assert again(monkeypatch, "memory://b/data/checkpoints/5") == twin / "checkpoints/5"
    kept = {path.relative_to(twin).as_posix(): path.read_text() for path in twin.rglob("*") if path.is_file()}
    assert kept == {"a": "new", "c/d": "new"}


def test_the_twin_of_a_run_that_writes_stays(fs, monkeypatch):
    twin = bucket.here("memory://b/run")
    files.write_text(twin / "metrics.jsonl", "1\n")
    (twin / "metrics.jsonl").write_text("1\n2\n")
    with open(twin / bucket.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert (again(monkeypatch, "memory://b/run") / "metrics.jsonl").read_text() == "1\n2\n"
    assert (again(monkeypatch, "memory://b/run") / "metrics.jsonl").read_text() == "1\n"


def test_a_run_that_writes_inside_of_what_is_mirrored_stays_and_has_no_second_index(fs, monkeypatch):
    twin = bucket.here("memory://b/all")
    files.write_text("memory://b/all/run/metrics.jsonl", "1\n")
    files.write_text(twin / "run.json", "old")
    fs.pipe({"/b/all/run.json": b"new", "/b/all/run/metrics.jsonl": b"2\n", "/b/all/run/recipe.yaml": b"new"})
    again(monkeypatch, "memory://b/all/run/recipe.yaml")
    assert (twin / "run.json").read_text() == "old" and (twin / "run/recipe.yaml").read_text() == "new"
    monkeypatch.setattr(bucket, "_mirrored", set())
    with open(twin / "run" / bucket.LOCK, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert bucket.here(twin / "run/x") == twin / "run/x"  # its own name on this machine
        again(monkeypatch, "memory://b/all")
    assert [(twin / name).read_text() for name in ("run.json", "run/metrics.jsonl")] == ["new", "1\n"]
    assert [path.name for path in twin.rglob(".*")] == [bucket.LOCK]
    assert bucket.named(twin / "run") == "memory://b/all/run"


def test_the_manifest_of_a_cut_upload_is_missing(fs, monkeypatch):
    twin = bucket.here("memory://b/data")
    for content in ("old", "new"):
        for name in ("manifest.json", "tokenizer", "x"):
            twin.mkdir(exist_ok=True)
            (twin / name).write_text(content * 2)
        if content == "old":
            bucket.push(twin)
    with monkeypatch.context() as patch:
        put = fs.put_file
        cut = lambda _, file, remote: pytest.fail("cut") if remote.endswith("x") else put(file, remote)
        patch.setattr(fs.__class__, "put_file", cut)
        with pytest.raises(pytest.fail.Exception):
            bucket.push(twin)
    assert stored(fs) == {"/b/data/tokenizer": b"newnew", "/b/data/x": b"oldold"}
    assert not bucket.is_pushed(twin / "manifest.json") and bucket.is_pushed(twin / "tokenizer")
    bucket.push(twin)
    assert set(stored(fs).values()) == {b"newnew"} and bucket.is_pushed(twin / "manifest.json")


def test_a_dataset_whose_upload_was_cut_is_uploaded_by_the_same_command(fs, monkeypatch):
    config = PrepareConfig(inputs=(World(count=40),), tokenizer=BytesTokenizer(), out="memory://b/data", seq_len=32)
    with monkeypatch.context() as patch, pytest.raises(ValueError, match=r"memory://b/data.*no network"):
        patch.setattr(fs.__class__, "put_file", lambda *_: (_ for _ in ()).throw(OSError("no network")))
        prepare(config)
    assert stored(fs) == {}
    prepare(config)
    assert {"/b/data/manifest.json", "/b/data/train/shard-00000.tokens.npy"} <= set(stored(fs))
    with pytest.raises(FileExistsError, match=r"^memory://b/data exists"):
        prepare(config)


def test_another_process_pushes_the_batch_that_it_refuses(fs, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    place = {"begin": Position(0, 0, 1), "tokens_per_step": 1, "flops": (1.0, None)}
    log = RunLog(bucket.here("memory://b/run"), "train", MonitorConfig(), 9, **place)
    log.skipped(3, {"tokens": np.zeros(1)}, {"loss": np.nan, "grad_norm": 1.0})
    assert set(stored(fs)) == {"/b/run/skipped/step-3-process-1.npz"}


def test_new_directories_and_files_in_a_bucket(fs):
    with files.new_directory("memory://b/export") as temporary:
        (temporary / "config.json").write_text("{}")
    files.write_text("memory://b/results.json", "[]")
    assert stored(fs) == {"/b/export/config.json": b"{}", "/b/results.json": b"[]"}
    with pytest.raises(ValueError, match="is not empty"):
        files.check_empty("memory://b/export")


@pytest.mark.parametrize(("url", "why"), [("nothing://b/x", "Protocol not known"), ("memory:///", "")])
def test_a_bucket_that_cannot_be_used(fs, monkeypatch, url, why):
    monkeypatch.setattr(fs.__class__, "find", lambda *_, **__: (_ for _ in ()).throw(OSError("no permission")))
    with pytest.raises(ValueError, match=f"{url}.*({why}|no permission)"):
        bucket.here(url)
