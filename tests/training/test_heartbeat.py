"""What a process makes of the beats of its peers; whole runs are in tests/test_train.py."""

import json
import re
import subprocess
import sys
import time

import jax
import pytest

from jaxllm.training import heartbeat
from jaxllm.training.heartbeat import Heartbeat


class Left(BaseException):
    """Instead of the end of the process."""


class Store(dict):
    """The key-value store of jax.distributed, as far as heartbeats use it."""

    gone = False

    def key_value_set(self, key, value, allow_overwrite):
        if self.gone or (key in self and not allow_overwrite):
            raise jax.errors.JaxRuntimeError("UNAVAILABLE" if self.gone else "ALREADY_EXISTS: key")
        self[key] = value

    def key_value_try_get(self, key):
        if self.gone or key not in self:
            raise jax.errors.JaxRuntimeError("UNAVAILABLE" if self.gone else "NOT_FOUND: key")
        return self[key]


def store():
    return heartbeat.distributed.global_state.client


@pytest.fixture
def beating(tmp_path, monkeypatch):
    """Return a function that makes the heartbeat of one of two processes; what would end it raises Left."""

    def leave(status, words):
        raise Left(status, words())

    monkeypatch.setattr(heartbeat, "leave", leave)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    (tmp_path / heartbeat.DIRECTORY).mkdir()
    monkeypatch.setattr(heartbeat.distributed.global_state, "client", Store())

    def make(process, launch=7):
        monkeypatch.setattr(jax, "process_index", lambda: process)
        return Heartbeat(tmp_path, launch, 0.2, lambda: "resume so")

    return make


def change(process, launch=7, **values):
    key = f"jaxllm/heartbeat/{launch}/{process}"
    store()[key] = json.dumps({**json.loads(store()[key]), **values})


def test_a_peer_that_was_killed_is_named_with_what_it_did(beating):
    one, two = beating(0), beating(1)
    two.background = lambda: "while the checkpoint of step 4 is written"
    two.enter("compile", 5)
    one.enter("save", 5)
    one._check([1], 0.2)  # it lives
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    change(1, pid=dead.pid)
    with pytest.raises(Left) as left:
        one._check([1], 0.2)
    status, words = left.value.args
    assert status == heartbeat.AGAIN == 75
    assert words.startswith(f"error: process 1 of 2 (pid {dead.pid} on ")
    assert words.endswith(
        ") is missing: it was killed in phase compile of step 5, while the checkpoint of step 4 is written; "
        "this is process 0, in phase save of step 5\nresume so"
    )
    three = beating(1)  # whoever asks later hears of the first that was missed
    with pytest.raises(Left, match="process 1 of 2"):
        three._check([0], 0.2)
    beating(0, launch=8)._check([1], 0.2)  # but not the next launch


def test_silence_is_missed_after_its_limit_and_no_pid_of_elsewhere_counts(beating):
    one, two = beating(0), beating(1)
    two.enter("restore", 3)
    change(1, pid=2**22, host="elsewhere")
    one._check([1], 0.2)
    time.sleep(0.1)
    change(1, beat=9)
    one._check([1], 0.2)
    time.sleep(0.15)
    one._check([1], 0.2)
    time.sleep(0.1)
    with pytest.raises(Left, match="it was last heard of 0 s ago, in phase restore of step 3"):
        one._check([1], 0.2)


def test_process_0_is_gone_with_the_store(beating):
    one, zero = beating(1), beating(0)
    zero.enter("save", 4)
    one._check([0], 0.2)
    store().gone = True
    with pytest.raises(Left, match=r"process 0 of 2 .* is missing: it was lost in phase save of step 4"):
        one._check([0], 0.2)


def test_who_never_said_anything_is_missed_too(beating):
    one = beating(0)
    one._check([1], 0.05)
    time.sleep(0.1)
    with pytest.raises(Left, match=r"process 1 of 2 \(which never said where it is\) is missing"):
        one._check([1], 0.05)


def test_an_error_of_a_peer_is_said_and_its_end_is_none(beating, monkeypatch):
    monkeypatch.setattr(heartbeat.atexit, "register", lambda *_: None)  # this process is to live on
    monkeypatch.setattr(Heartbeat, "_answer_aborts", lambda _: None)
    monkeypatch.setattr(heartbeat, "PERIODS", 1)
    monkeypatch.setattr(Heartbeat, "_beat", lambda _: None)
    one = beating(0)
    with beating(1) as two:
        two.enter("step", 3)
    one._check([1], 0)
    time.sleep(0.05)
    one._check([1], 0)
    with pytest.raises(ValueError), beating(1) as two:
        two.enter("data", 3)
        raise ValueError("a shard is short\nvery")
    one = beating(0)
    one._check([1], 0.2)
    time.sleep(0.05)
    with pytest.raises(Left) as left:
        one._check([1], 0.2)
    assert left.value.args[0] == 2
    assert ") ended in phase data: ValueError: a shard is short; this is" in left.value.args[1]


@pytest.mark.parametrize(("error", "looks"), [("RESOURCE_EXHAUSTED: 9G of 8G", False), ("INTERNAL: gloo", True)])
def test_memory_that_is_short_is_nobody_elses_fault_and_every_other_error_is_said(
    beating, monkeypatch, capsys, error, looks
):
    monkeypatch.setattr(heartbeat.atexit, "register", lambda *_: None)
    for name in ("_answer_aborts", "_beat"):
        monkeypatch.setattr(Heartbeat, name, lambda _: None)
    one = beating(0)  # whose peer is missing
    one._period_s = 0.02
    with pytest.raises(Left if looks else jax.errors.JaxRuntimeError), one:
        raise jax.errors.JaxRuntimeError(error)
    assert (f"process 0: {error}\n" == capsys.readouterr().err) == looks


def test_a_single_process_beats(tmp_path):
    with Heartbeat(tmp_path, 1, 0.2) as heart:
        heart.enter("step", 4)
        path = tmp_path / heartbeat.DIRECTORY / "process-0.json"
        before = json.loads(path.read_text())["beat"]
        time.sleep(0.2)
        record = json.loads(path.read_text())
        assert record["beat"] > before and (record["phase"], record["step"]) == ("step", 4)
    assert json.loads(path.read_text())["phase"] == "done"


def test_processes_meet_once_at_a_barrier_of_the_store_and_the_late_are_named(beating, tmp_path, monkeypatch, capsys):
    waited, one, two = [], beating(0), beating(1)
    two.enter("compile", 3)

    def wait_at_barrier(store, *what):
        waited.append((what, json.loads(store["jaxllm/heartbeat/7/0"])["phase"]))
        one._name_the_late()

    monkeypatch.setattr(Store, "wait_at_barrier", wait_at_barrier, raising=False)
    one.enter("evaluate", 3)
    one.meet("evaluate")
    one.meet("evaluate")
    assert waited == [(("jaxllm/heartbeat/7/evaluate", heartbeat.DAY_MS), "wait")]
    assert re.fullmatch(
        r"waiting for 1 of 2 processes: process 1 of 2 \(pid \d+ on .*\) in phase compile of step 3\n",
        capsys.readouterr().err,
    )
    assert json.loads(store()["jaxllm/heartbeat/7/0"])["phase"] == "evaluate"
    one.enter("wait", 3)
    two.enter("wait", 3)
    one._name_the_late()  # nobody, in whoever waits
    two.enter("compile", 3)
    two._name_the_late()  # nor in who is late
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    Heartbeat(tmp_path, 7, 0.2).meet("compile")
    assert len(waited) == 1
