"""Which processes of a run are alive, and what they do: RUN/heartbeats/process-I.json, for whoever wants to look.

Without it, a process whose peer has died waits in a collective until JAX ends it with a stack trace that names nobody.
Processes tell each other by the key-value store of `jax.distributed`, for a run directory in a bucket is not shared.
Each watches the next one, process 0, which has the store, and the verdict of whoever first misses one. Beats are
counted, and no clocks are compared.
"""

import atexit
import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
from jax._src import distributed  # the store has no public name; Orbax, too, takes it from here

from jaxllm.training.stop import leave

DIRECTORY = "heartbeats"
AGAIN = 75  # exit status where a process is missing: EX_TEMPFAIL of sysexits.h, "try again"
DAY_MS = 24 * 3600 * 1000
WAIT, WAIT_S = "wait", 60.0  # the phase of who waits for others, and how often it says for whom
PERIODS = 5  # without a beat, where something has failed already and the question is only who


class Heartbeat:
    """Says what this process does, and ends it when another one is missing; use as a context manager.

    A peer is missing if its process is gone (on this machine), if it has not beaten for `limit_s`, or if it ended with
    an error. This process then says so on stderr and exits: with 75, or 2 if the peer had an error of its own.

    Args:
      launch: a number that all processes of this launch share, so that what an earlier one left means nothing.
      limit_s: the longest silence, seconds.
      last_words: returns how to go on, for the message; it must not wait for other threads.

    Attributes:
      background: returns what goes on beside the phase, such as a checkpoint in writing, or "".
    """

    def __init__(self, run_dir: Path, launch: int, limit_s: float, last_words: Callable[[], str] = str):
        self._directory, self._launch, self._limit_s = run_dir / DIRECTORY, launch, limit_s
        self._last_words, self.background = last_words, str
        self._process, self._count = jax.process_index(), jax.process_count()
        self._phase, self._step, self._beats = "start", 0, 0
        self._met: set[str] = set()
        self._told = 0.0  # when it was last said who is waited for
        self._seen: dict[int, tuple[int, float]] = {}  # peer: its last beat, and when that was new
        self._cut_off = False  # from the store
        self._last: dict[int, dict] = {}  # peer: its last record
        self._period_s = min(limit_s / 10, max(1.0, self._count / 200))  # a thousand processes post 200 times a second
        self._over, self._writing = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._leaving = threading.Lock()

    def enter(self, phase: str, step: int) -> None:
        """Say what comes now: start, restore, compile, data, step, save, evaluate, sample or wait, for update `step`.

        The two that alternate with each update reach the file with the next beat, all others at once.
        """
        self._phase, self._step = phase, step
        if phase not in ("data", "step"):
            self._write()

    def meet(self, name: str) -> None:
        """Wait here, the first time for each `name`, for all processes: without a collective.

        For Gloo gives up if one comes to it 30 s after another. Who is lost, is missed before the day is over; who does
        something else, is named every minute.
        """
        if self._count == 1 or name in self._met:
            return
        self._met.add(name)
        before, self._told = self._phase, time.monotonic()
        self.enter(WAIT, self._step)
        distributed.global_state.client.wait_at_barrier(self._key(name), DAY_MS)
        self.enter(before, self._step)

    def __enter__(self) -> "Heartbeat":
        self._directory.mkdir(exist_ok=True)
        self._write()
        self._thread.start()
        if self._count > 1:
            self._answer_aborts()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: object) -> None:
        failed = isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)
        if (
            failed and self._count > 1
        ):  # a collective fails where a peer is gone; memory that is short is our own affair
            sys.stderr.write(f"process {self._process}: {str(error)[:2000]}\n")  # a verdict would be the last word
            self._look(PERIODS)
        self._over.set()
        self._thread.join()
        why = f"{kind.__name__}: {error}".splitlines()[0][:300] if kind else ""
        self._phase, self._step = (f"ended in phase {self._phase}: {why}", self._step) if kind else ("done", self._step)
        self._write()
        if kind and self._count > 1:  # the others end now, and will not be there for the good-bye that JAX waits for
            atexit.register(_leave_alone, 2 * self._period_s)

    def _beat(self) -> None:
        while not self._over.wait(self._period_s):
            self._write()
            if self._phase == WAIT and time.monotonic() - self._told > WAIT_S:
                self._name_the_late()
            if self._count > 1:
                self._check({0, (self._process + 1) % self._count} - {self._process}, self._limit_s)

    def _write(self) -> None:
        """Post a beat, and replace the file; without fsync, for what is lost with the machine means nothing."""
        with self._writing, contextlib.suppress(OSError):  # a full disk is for the checkpoints to say
            self._beats += 1
            record = {
                "process": self._process, "phase": self._phase, "step": self._step, "beside": self.background(),
                "time": time.strftime("%Y-%m-%d %H:%M:%S"), "beat": self._beats, "host": socket.gethostname(),
                "pid": os.getpid(), "pids": _pid_namespace(), "launch": self._launch,
            }  # fmt: skip
            if self._count > 1:
                self._post(self._process, record)
            temporary = self._directory / f".process-{self._process}.tmp"
            temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
            temporary.replace(self._directory / f"process-{self._process}.json")

    def _name_the_late(self) -> None:
        """Say for whom all others wait, in the first process of these."""
        self._told = time.monotonic()
        records = {process: self._get(process) or {} for process in range(self._count)}
        late = [process for process, record in records.items() if record.get("phase") != WAIT]
        if late and self._process == next((process for process in records if process not in late), None):
            those = "; ".join(" in ".join(self._describe(process, records[process])) for process in late[:4])
            more = f"; and {len(late) - 4} more" * (len(late) > 4)
            sys.stderr.write(f"waiting for {len(late)} of {self._count} processes: {those}{more}\n")
            sys.stderr.flush()

    def _describe(self, peer: int, record: dict) -> tuple[str, str]:
        """Return who a process is, and what it does."""
        place = f"pid {record['pid']} on {record['host']}" if record else "which never said where it is"
        beside = record.get("beside", "")
        doing = f"phase {record.get('phase', 'start')} of step {record.get('step', 0)}{f', {beside}' if beside else ''}"
        return f"process {peer} of {self._count} ({place})", doing

    def _check(self, peers: Iterable[int], silence_s: float) -> None:
        """End this process if one of `peers` is missing, or another process says that one is."""
        verdict = self._get("missing")
        for peer in () if verdict else sorted(peers):
            if found := self._missing(peer, silence_s):
                self._post("missing", found, once=True)
                verdict = self._get("missing") or found
                break
        if verdict:
            if self._process == 0 and not self._cut_off:
                time.sleep(2 * self._period_s)  # JAX aborts the others as soon as it is gone: let them read it before
            self._leaving.acquire()  # for good: one thread has the last word
            doing = f"{self._phase} of step {self._step}"
            words = f"error: {verdict['text']}; this is process {self._process}, in phase {doing}"
            leave(verdict["status"], lambda: f"{words}\n{self._last_words()}")

    def _missing(self, peer: int, silence_s: float) -> dict | None:
        """Return what to say of a peer that is missing, and with which status to end; None if it lives."""
        found, now = self._get(peer), time.monotonic()
        unreachable = found is None  # the store is of process 0
        record = self._last[peer] = found or self._last.get(peer, {})
        beat = record.get("beat", 0)
        before, since = self._seen.get(peer, (-1, now))
        if beat != before:
            before, since = self._seen[peer] = beat, now
        phase = record.get("phase", "start")
        if phase == "done":
            return None
        name, doing = self._describe(peer, record)
        if phase.startswith("ended"):
            if now - since < PERIODS * self._period_s and not unreachable:
                return None  # perhaps this process is about to end with the same error
            return {"process": peer, "status": 2, "text": f"{name} {phase}"}
        if _is_gone(record) or (unreachable and peer == 0):
            how = "lost" if unreachable else "killed"
            return {"process": peer, "status": AGAIN, "text": f"{name} is missing: it was {how} in {doing}"}
        if now - since > silence_s:
            silent = f"it was last heard of {now - since:.0f} s ago, in {doing}"
            return {"process": peer, "status": AGAIN, "text": f"{name} is missing: {silent}"}
        return None

    def _look(self, periods: int) -> None:
        """Look at all peers for some beats, and end this process if one is missing."""
        peers = {*range(self._count)} - {self._process}
        for _ in range(2 * periods):
            self._check(peers, periods * self._period_s)
            time.sleep(self._period_s)

    def _answer_aborts(self) -> None:
        """Have the last word where JAX aborts the process, which it does at once when process 0 is gone.

        The handler runs in the thread that aborts, and if nobody is missing the abort goes on.
        """
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._abort)  # or it would be freed
        if sys.platform.startswith("linux"):
            ctypes.CDLL(None).signal(int(signal.SIGABRT), self._handler)

    def _abort(self, number: int) -> None:
        self._cut_off = True  # the thread that aborts may hold a lock of the store: nobody asks it again
        if not self._over.is_set():
            self._check({*range(self._count)} - {self._process}, self._limit_s)

    def _key(self, name: object) -> str:
        return f"jaxllm/heartbeat/{self._launch}/{name}"

    def _post(self, name: object, record: dict, once: bool = False) -> None:
        """Write into the store, if it can be reached; `once`: what is there already stays."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            if not self._cut_off:
                client = distributed.global_state.client
                client.key_value_set(self._key(name), json.dumps(record), allow_overwrite=not once)

    def _get(self, name: object) -> dict | None:
        """Return a record of the store, empty if there is none; None: the store cannot be reached."""
        try:
            client = distributed.global_state.client
            return None if self._cut_off else json.loads(client.key_value_try_get(self._key(name)))
        except jax.errors.JaxRuntimeError as error:
            return {} if "NOT_FOUND" in str(error) else None


def _leave_alone(seconds: float) -> None:
    time.sleep(seconds)  # JAX aborts the others as soon as process 0 is gone: let them read first why
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2)


def _pid_namespace() -> str:
    """Return what tells containers apart, which may share the name of their machine."""
    with contextlib.suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _is_gone(record: dict) -> bool:
    """Whether the process of a record was on this machine and is no more."""
    here = socket.gethostname(), _pid_namespace()
    if not here[1] or (record.get("host"), record.get("pids")) != here:
        return False
    try:
        os.kill(record["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
