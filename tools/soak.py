#!/usr/bin/env python3
"""Kill training runs, relaunch them, and compare what they leave with what an undisturbed run leaves.

    python tools/soak.py kills --kills 100 --processes 1    kill -9 of one or all processes at random moments
    python tools/soak.py phases --processes 4               kill -9 in each phase: who is left says who is missing
    python tools/soak.py elastic                            go on with other processes, devices, meshes and batches

Runs are of a tiny model on the CPU, of real processes with two devices each. Undisturbed and disturbed runs must have
the same metrics.jsonl and the same parameters, bit for bit; for `elastic`, the same samples and nearly the same losses.
"""

import argparse
import collections
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
RECIPE = """
out: {run}
steps: {steps}
model: {{preset: tiny, n_layers: 1, d_model: 32, n_heads: 2, d_ff: 48, vocab_size: 300}}
data: {{sources: [{{path: {data}}}], packing: {{seq_len: 32}}, batch_size: 8}}
optim: {{lr: 1e-2, schedule: {{kind: cosine, warmup: 4}}}}
step: {{ema_decay: 0.9}}
checkpoint: {{every: {every}, fast: {{directory: {fast}, every: 2}}}}
monitor: {{log_every: 1, evaluate_every: 40}}
platform: {{cpu_devices: 2, compile_cache: {cache}, silence_s: 20}}
compute: {{layers: scan}}
"""
FROM_FAST = "is of the fast checkpoints"
# A training process that dies as soon as its heartbeat file says that it is in a phase.
DIES = """
import os, signal, sys, time
from jaxllm.train import main
from jaxllm.training.heartbeat import Heartbeat

phase, step, *arguments = sys.argv[1:]
enter = Heartbeat.enter

def enter_and_die(self, now, at):
    enter(self, now, at)
    if now == phase and at >= int(step):
        time.sleep(3 * self._period_s)
        os.kill(os.getpid(), signal.SIGKILL)

Heartbeat.enter = enter_and_die
sys.exit(main(arguments))
"""


class Workplace:
    """A directory with a dataset, a compile cache and runs."""

    def __init__(self, directory: Path, steps: int, every: int, fast: str):
        self.directory, self.steps, self.every, self.fast = directory, steps, every, fast
        if not (directory / "data").exists():
            prepare = ["jaxllm.prepare", "--world", 300, "--tokenizer", "bytes", "--validation", 10]
            finish([python("-m", *prepare, "--out", directory / "data")])

    def launch(self, name: str, processes: int, *overrides: str, dies: dict[int, tuple] | None = None) -> list:
        """Start all processes of a run, of which those in `dies` end themselves in (phase, step)."""
        file = self.directory / f"{name}.yaml"
        places = {"run": self.directory / name, "data": self.directory / "data", "cache": self.directory / "cache"}
        file.write_text(RECIPE.format(**places, steps=self.steps, every=self.every, fast=self.fast))
        with socket.socket() as server:
            server.bind(("127.0.0.1", 0))
            port = server.getsockname()[1]
        started = []
        for index in range(processes):
            told = ["platform.distributed=true", f"platform.coordinator=127.0.0.1:{port}",
                    f"platform.n_processes={processes}", f"platform.process_index={index}"]  # fmt: skip
            how = ("-c", DIES, *dies[index]) if dies and index in dies else ("-m", "jaxllm.train")
            started.append(python(*how, file, *overrides, *told * (processes > 1)))
        return started

    def lines(self, name: str) -> int:
        """Return how many lines metrics.jsonl has."""
        path = self.directory / name / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def phase(self, name: str, process: int) -> str:
        """Return what the heartbeat of a process says last."""
        try:
            record = json.loads((self.directory / name / "heartbeats" / f"process-{process}.json").read_text())
        except (OSError, ValueError):
            return "before the first beat"
        return record["phase"] + ", a checkpoint in writing" * bool(record["beside"])

    def differences(self, one: str, other: str) -> list[str]:
        """Return what differs between two finished runs."""
        runs = [self.directory / name for name in (one, other)]
        found = [
            name for name in ("metrics.jsonl", "samples.jsonl")
            if len({(run / name).read_bytes() for run in runs}) > 1
        ]  # fmt: skip
        params = [_params(run) for run in runs]
        if params[0].keys() != params[1].keys():
            return [*found, "the names of parameters"]
        return found + [key for key in params[0] if params[0][key].tobytes() != params[1][key].tobytes()]


def _params(run_dir: Path) -> dict[str, np.ndarray]:
    sys.path.insert(0, str(ROOT))
    from jaxllm.core.tree import named_leaves
    from jaxllm.recipe import load_recipe
    from jaxllm.training.checkpoint import load_params

    params, _ = load_params(run_dir, load_recipe(run_dir).model)
    return {name: np.asarray(leaf) for name, leaf in named_leaves(params).items()}


def python(*arguments: object) -> subprocess.Popen:
    """Start a Python process of the repository on the CPU."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"}
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)], cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def finish(processes: list[subprocess.Popen], statuses: tuple[int, ...] = (0,), seconds: float = 600) -> list[str]:
    """Wait for processes and return what they said; end the program if one has another status."""
    outputs = [process.communicate(timeout=seconds)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        if process.returncode not in statuses:
            sys.exit(f"status {process.returncode}, and not {statuses}:\n{output}")
    return outputs


def kills(place: Workplace, n_kills: int, n_processes: int, seed: int) -> None:
    """Kill one or all processes at random moments, `n_kills` times, in as many runs as it takes."""
    generator, start = random.Random(seed), time.monotonic()
    finish(place.launch("undisturbed", n_processes))
    done, run, phases, ends, from_fast = 0, 0, collections.Counter(), collections.Counter(), 0
    while done < n_kills:
        run += 1
        name, here = f"run-{run}", 0
        while True:
            processes, begun = place.launch(name, n_processes), time.monotonic()
            early = generator.random() < 0.2  # while it starts, restores or compiles
            wait_s, target = generator.random() * 6, place.lines(name) + generator.randint(1, 3 * place.every)
            while all(each.poll() is None for each in processes) and done < n_kills:
                if time.monotonic() - begun > wait_s if early else place.lines(name) >= target:
                    break
                time.sleep(0.01)
            time.sleep(0 if early else generator.random() * 0.3)  # a checkpoint may be in writing
            victims = [generator.randrange(n_processes)] if generator.random() < 0.5 else [*range(n_processes)]
            alive = [index for index in victims if done < n_kills and processes[index].poll() is None]
            for index in alive:
                processes[index].send_signal(signal.SIGKILL)
            for index in alive:
                processes[index].wait()
            if not alive:
                break
            done, here = done + 1, here + 1
            phases[place.phase(name, alive[0])] += 1
            killed_s = time.monotonic()
            for index, output in enumerate(finish(processes, (-signal.SIGKILL, -signal.SIGABRT, 0, 75))):
                from_fast += FROM_FAST in output
                if index not in alive:
                    named = any(f"process {victim} of" in output for victim in alive)
                    ends[f"status {processes[index].returncode}, {'named' if named else 'not named'}"] += 1
            print(
                f"kill {done}: {name}, processes {alive}, all ended {time.monotonic() - killed_s:.1f} s later",
                flush=True,
            )
        from_fast += any(FROM_FAST in output for output in finish(processes))
        if found := place.differences("undisturbed", name):
            sys.exit(f"{name} differs after {here} kills: {found}")
        print(f"{name}: {here} kills, the same metrics.jsonl and parameters as undisturbed", flush=True)
        shutil.rmtree(place.directory / name)
    print(f"{done} kills in {run} runs of {place.steps} steps of {n_processes} processes: nothing differs")
    print(f"{time.monotonic() - start:.0f} s, seed {seed}; phases: {dict(phases)}; survivors: {dict(ends)}")
    print(f"launches that went on from the fast tier: {from_fast}")


def phases(place: Workplace, n_processes: int) -> None:
    """Kill the first and the last process in each phase; the others must name it, and its phase."""
    finish(place.launch("undisturbed", n_processes))
    for victim in (n_processes - 1, 0):
        name = f"victim-{victim}"
        for phase, step in (("compile", 1), ("data", 7), ("save", 20), ("restore", 0), ("step", 25)):
            processes = place.launch(name, n_processes, dies={victim: (phase, step)})
            processes[victim].wait(timeout=300)
            killed_s = time.monotonic()
            outputs = finish(processes, (-signal.SIGKILL, 75))
            took = time.monotonic() - killed_s
            said = (
                rf"error: process {victim} of {n_processes} \(pid {processes[victim].pid} .* in phase {phase} of step"
            )
            for index, output in enumerate(outputs):
                if index != victim and not re.search(said, output):
                    sys.exit(f"process {index} does not name {victim} and {phase}:\n{output}")
            line = next(line for line in outputs[victim - 1].splitlines() if line.startswith("error:"))
            print(f"{phase}: the others end {took:.1f} s later with status 75: {line}", flush=True)
        finish(place.launch(name, n_processes))
        print(f"{name}: what differs from undisturbed: {place.differences('undisturbed', name)}", flush=True)


def elastic(place: Workplace) -> None:
    """Go on with other processes, devices and meshes, and then another batch; compare with one process throughout."""
    for name, stages in (
        ("one", [(1, ()), (1, ("data.batch_size=16",))]),
        ("many", [(2, ()), (4, ("mesh.fsdp=4", "mesh.data=2")), (1, ("platform.cpu_devices=4", "mesh.tensor=2")),
                  (2, ("mesh.data=1", "mesh.context=2", "mesh.tensor=2")), (2, ("data.batch_size=16", "mesh.fsdp=2"))]),
    ):  # fmt: skip
        for number, (n_processes, overrides) in enumerate(stages):
            last = number == len(stages) - 1
            until = place.steps // 2 if number == len(stages) - 2 else place.every * (number + 1)
            processes = place.launch(name, n_processes, *overrides)
            while not last and not (place.directory / name / "checkpoints" / str(until)).exists():
                time.sleep(0.01)
                if any(process.poll() is not None for process in processes):
                    finish(processes)
            for process in processes if not last else ():
                process.kill()
            outputs = finish(processes, (0,) if last else (-signal.SIGKILL, -signal.SIGABRT, 75))
            # Both change the batch after the same step.
            for path in () if last else (place.directory / name / "checkpoints").glob("[0-9]*"):
                if not path.name.isdigit() or int(path.name) > until:
                    shutil.rmtree(path)
            about = next(line for line in outputs[0].splitlines() if " parameters, " in line)
            print(f"{name}, {n_processes} processes, {' '.join(overrides)}: {about}", flush=True)
    one, many = (
        [json.loads(line) for line in (place.directory / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("one", "many")
    )
    same = [(each["step"], each.get("sample")) for each in one] == [(each["step"], each.get("sample")) for each in many]
    apart = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(one, many, strict=True) if "loss" in a]
    print(f"samples of all {len(apart)} steps the same: {same}; losses at most {max(apart):.1e} apart")
    if not same or max(apart) > 1e-4:
        sys.exit("they differ")


def main() -> None:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("kills", "phases", "elastic"))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--fast", default="none", help="directory of a fast tier, used every 2 steps (default: none)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="directory to work in (default: a temporary one)")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="jaxllm-soak-") as temporary:
        place = Workplace(flags.out or Path(temporary), flags.steps, flags.every, flags.fast)
        match flags.what:
            case "kills":
                kills(place, flags.kills, flags.processes, flags.seed)
            case "phases":
                phases(place, flags.processes)
            case "elastic":
                elastic(place)


if __name__ == "__main__":
    main()
