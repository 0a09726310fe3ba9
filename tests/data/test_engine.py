import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jaxllm.data import engine, stages
from jaxllm.data.cleaning.clean import CleanConfig
from jaxllm.data.prepare import prepare
from jaxllm.data.prepare_config import BytesTokenizer, PrepareConfig
from jaxllm.data.reading.sources import RowFiles, TextFiles, parts
from jaxllm.data.shards import SPLITS, Dataset
from jaxllm.data.stages import Clean, keep_first


def content(directory):
    """The bytes of a dataset, but for the account of how it was made."""
    paths = sorted(path for path in Path(directory).rglob("*") if path.is_file() and path.stem != "report")
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in paths}


def told(directory):
    """The account of a dataset, but for what differs from run to run."""
    report = json.loads((Path(directory) / "report.json").read_text())
    return {key: value for key, value in report.items() if key not in ("seconds", "stages", "directory")}


@pytest.fixture
def lines(tmp_path):
    """Six files of lines, some of which are in several of them."""
    for number in range(6):
        text = "".join(f"line {line % (400 - number)} of file {line % 7 * number}\n" for line in range(400))
        (tmp_path / f"{number}.txt").write_text(text)
    return TextFiles(path=str(tmp_path / "?.txt"), split="line")


def config(source, out, **changes):
    return PrepareConfig(inputs=(source,), out=str(out), **{"tokenizer": BytesTokenizer(), "part_bytes": 1} | changes)


# Fingerprints of what the code made before it worked in parts.
BEFORE = {False: ("e75a5fd034766d2b", "fd77416ec00f48eb"), True: ("c091a3d818eafadb", "13a143812b568ef8")}


@pytest.mark.parametrize("chat", [False, True])
def test_any_number_of_workers_and_any_parts_give_the_same_bytes(tmp_path, lines, chat):
    if chat:
        for number in range(4):
            row = '{"messages": [{"role": "user", "content": "q%d"}, {"role": "assistant", "content": "a%d"}]}\n'
            bad = '{"messages": [{"role": "user", "content": "q"}]}\n'
            rows = [row % (each % 30, each % (9 + number)) for each in range(60)]
            (tmp_path / f"{number}.jsonl").write_text("".join([*rows, bad, "{\n"]))
    source = RowFiles(path=str(tmp_path / "?.jsonl")) if chat else lines
    changes = {"chat": chat, "errors": "skip", "validation": 9 if chat else 0.1}
    prepare(config(source, tmp_path / "whole", part_bytes=1 << 30, **changes))
    for workers in (1, 2, 3):
        prepare(config(source, tmp_path / f"{workers}", engine={"workers": workers}, **changes))
        assert content(tmp_path / f"{workers}") == content(tmp_path / "whole")
        assert told(tmp_path / f"{workers}") == told(tmp_path / "whole")
    found = told(tmp_path / "whole")
    assert found["rules"]["duplicate"]["dropped"] > 80
    assert found["problems"] == (5 if chat else 0)  # of the rows without an answer three are copies of the first
    assert tuple(Dataset.open(tmp_path / "whole", split).fingerprint for split in SPLITS) == BEFORE[chat]
    assert not list(tmp_path.glob(".*"))


def test_the_sample_of_a_tokenizer_is_the_same_whatever_the_parts_are(tmp_path, lines):
    sampled = {"kind": "train", "vocab_size": 300, "sample_bytes": 500}
    for name, size in (("whole", 1 << 30), ("parts", 1)):
        prepare(config(lines, tmp_path / name, part_bytes=size, tokenizer=sampled, engine={"workers": 1}))
    assert content(tmp_path / "whole") == content(tmp_path / "parts")


def start(source, out, workers, *more):
    """Start `prepare` as a user does."""
    flags = ["--text", source.path, "--split", "line", "--tokenizer", "bytes", "--out", str(out), "part_bytes=1"]
    command = [sys.executable, "-m", "jaxllm.prepare", *flags, "--workers", str(workers), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def alive(pid):
    """Whether a process is at work still: one that ended may wait for its parent to ask."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize(("stage", "workers"), [("text", 1), ("text", 2), ("ids", 2)])
def test_a_killed_process_goes_on_where_it_was_and_gives_the_same_bytes(tmp_path, lines, stage, workers):
    for number in range(6):
        path = tmp_path / f"{number}.txt"
        path.write_text("".join(f"{line} {each}" for each in range(20) for line in path.open()))
    prepare(config(lines, tmp_path / "whole"))
    out, work = tmp_path / "d", tmp_path / ".d.work"
    process = start(lines, out, workers)
    while not (done := sorted(work.glob(f"{stage}-*"))):
        assert process.poll() is None, "it was done before it could be killed"
        time.sleep(0.002)
    ours = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    deadline = time.time() + 20
    while any(alive(pid) for pid in ours):
        assert time.time() < deadline, "a worker outlives the process that it works for"
        time.sleep(0.01)
    assert not out.exists() and len(ours) == (workers if workers > 1 else 0)
    before = {path: path.stat().st_mtime_ns for path in done}
    second = start(lines, out, workers)
    said, errors = second.communicate()
    assert second.returncode == 0, errors
    label = "reading" if stage == "text" else "reading and tokenising"
    assert f"{label}: " in said and f" of 6 parts found done in {work}\n" in said
    assert content(out) == content(tmp_path / "whole") and told(out) == told(tmp_path / "whole")
    assert before and not work.exists()


def test_what_changed_is_done_again_and_nothing_else(tmp_path, lines, monkeypatch):
    def made():
        done.clear()
        with pytest.raises(ValueError, match="no more"):
            prepare(config(lines, tmp_path / "d", **changes))
        return sorted(done)

    done = []
    save = stages.save_array
    changes = {"engine": {"workers": 1}}

    def watch(path, array):
        done.append(path.name)
        save(path, array)

    monkeypatch.setattr(stages, "save_array", watch)
    monkeypatch.setattr("jaxllm.data.prepare.DatasetWriter", lambda *_: (_ for _ in ()).throw(ValueError("no more")))
    assert made() == ["digests.npy"] * 6 + ["ids.npy"] * 6 + ["index.npy"] * 6
    assert made() == []
    (tmp_path / "5.txt").write_text("line 3 of file 0\nanother line\n")
    assert made() == ["digests.npy", "ids.npy", "index.npy"]
    changes["validation"] = 3
    assert made() == []
    changes["errors"] = "skip"  # there were no errors: what is done holds
    assert made() == []
    changes["tokenizer"] = {"kind": "train", "vocab_size": 310}
    assert made() == ["index.npy"] * 6
    changes["clean"] = {"min_chars": 3}
    assert made() == ["digests.npy"] * 6 + ["ids.npy"] * 6 + ["index.npy"] * 6
    assert len(list((tmp_path / ".d.work").glob("text-*"))) == len(list((tmp_path / ".d.work").glob("ids-*"))) == 6


def test_a_kill_while_results_are_removed_leaves_none_of_them(tmp_path, lines, monkeypatch):
    def killed(path, **_):
        if path.exists():
            next(path for path in sorted(path.rglob("*")) if path.is_file()).unlink()
            raise KeyboardInterrupt

    serial = {"engine": {"workers": 1}}
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine, "shutil", SimpleNamespace(rmtree=killed))
        prepare(config(lines, tmp_path / "d", **serial))
    before = content(tmp_path / "d")
    prepare(config(lines, tmp_path / "d", overwrite=True, **serial))
    assert content(tmp_path / "d") == before and not list(tmp_path.glob(".*"))


def test_two_at_once_on_one_directory(tmp_path, lines):
    with engine.Work(tmp_path / "d", print):
        second = start(lines, tmp_path / "d", 1)
        assert second.communicate(timeout=60)[1] == (
            f"error: {tmp_path / 'd'} is being prepared by process {os.getpid()} of {os.uname().nodename}; wait for "
            "it, or choose another directory\n"
        )
        assert second.returncode == 2 and (tmp_path / ".d.work" / "lock").exists()
    assert start(lines, tmp_path / "d", 1).wait() == 0


def test_a_full_disk_loses_nothing(tmp_path, lines, monkeypatch, capsys):
    save, count = stages.save_array, 0

    def full(path, array):
        nonlocal count
        count += 1
        if count > 15:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(path, array)

    monkeypatch.setattr(stages, "save_array", full)
    serial = config(lines, tmp_path / "d", engine={"workers": 1})
    with pytest.raises(OSError, match=r"the disk is full \(.*index\.npy\); free some space and run the same command"):
        prepare(serial)
    kept = {path for path in (tmp_path / ".d.work").iterdir() if path.is_dir()}
    assert len(kept) == 6 + 1 + 1 + 3 and not list((tmp_path / ".d.work").glob(".*"))
    count = -99
    prepare(serial)
    assert count == -96  # three parts were left to do
    monkeypatch.undo()
    prepare(config(lines, tmp_path / "whole"))
    assert content(tmp_path / "d") == content(tmp_path / "whole")


def test_the_first_error_in_the_order_of_parts_is_told(tmp_path):
    for number in range(5):
        (tmp_path / f"{number}.jsonl").write_text(
            '{"text": "a"}\n' * (1 + 3000 * (number == 1)) + "{bad\n" * (number > 0)
        )
    with pytest.raises(ValueError, match=r"1\.jsonl:3002: not JSON"):
        prepare(config(RowFiles(path=str(tmp_path / "?.jsonl")), tmp_path / "d", engine={"workers": 3}))
    assert len(list((tmp_path / ".d.work").glob("text-*"))) == 1
    (tmp_path / "1.jsonl").write_text('{"text": "b"}\n')
    skip = config(RowFiles(path=str(tmp_path / "?.jsonl")), tmp_path / "d", errors="skip")
    assert prepare(skip).problems == 3


def test_a_file_that_grows_while_it_is_read(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n")
    task = Clean(tmp_path / "o", tuple(parts(TextFiles(path=str(path)))), CleanConfig(), False, "skip")
    path.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"a\.txt changed while it was read; run this again"):
        task(lambda *_: None)
    assert not (tmp_path / "o").exists()


class Fatal:
    """A task that nobody can read and live."""

    def __init__(self, out):
        self.out = out

    def __reduce__(self):
        return os.abort, ()


def test_a_worker_that_dies_is_named(tmp_path):
    task = Fatal(tmp_path / "x")
    with pytest.raises(OSError, match=r"a worker process ended with status -6 at x; if the memory is full, use fewer"):
        engine.run([task, task], 2, lambda *_: None)


def test_first_copies_stay():
    digest = lambda *numbers: np.array([(1, number) for number in numbers], np.uint64).reshape(-1, 2)
    kept = keep_first([digest(5, 3, 5), digest(), digest(3, 9), digest(9, 1)])
    assert [each.tolist() for each in kept] == [[True, True, False], [], [False, True], [False, True]]
    other = np.array([(2, 5), (5, 1)], np.uint64)  # the first half counts as well
    assert keep_first([digest(5), other])[1].all()
