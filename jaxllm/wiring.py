"""From a recipe to a trained run: builds the parts that the recipe names and hands them to the loop.

`train`, `tune` and `quickstart` call `train`; what happens between the steps is in `jaxllm.run`.
"""

import re
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.core import config as configs
from jaxllm.core import files
from jaxllm.core.batch import Batch
from jaxllm.core.bucket import LOCK, here, named, origin, push
from jaxllm.core.wording import count
from jaxllm.data.loader import Loader
from jaxllm.models.accounting import memory_line
from jaxllm.recipe import FILE_NAME, Recipe, changes, check, load_recipe
from jaxllm.run import Run
from jaxllm.sharding import distributed
from jaxllm.sharding.mesh import make_mesh, reader
from jaxllm.training import heartbeat, lock
from jaxllm.training.feed import Feed
from jaxllm.training.heartbeat import Heartbeat
from jaxllm.training.loop import Observer, run_loop
from jaxllm.training.profile import Profile
from jaxllm.training.run_log import RunLog
from jaxllm.training.schedules import learning_rate
from jaxllm.training.state import TrainState
from jaxllm.training.step import compile_step, device_bytes
from jaxllm.training.stop import StopRequest
from jaxllm.training.tiers import Tiers

# What a resumed run may not change: these decide what was computed so far. Everything else (steps, batch size, mesh,
# intervals) may be set anew.
FIXED = ("model", "seed", "start_from")


@dataclass(frozen=True)
class RunResult:
    """How a run ended.

    Attributes:
      stopped: name of the signal that ended it early, or "".
    """

    run_dir: Path
    step: int
    stopped: str

    @property
    def status(self) -> int:
        """Exit status for the command, as of any program that a signal ended: 128 + its number; 0 = ran to its end."""
        if not self.stopped:
            return 0
        known = self.stopped in signal.Signals.__members__  # else it came to another process, from a scheduler mostly
        return 128 + (signal.Signals[self.stopped] if known else signal.SIGTERM)


def train(recipe: Recipe, *, name: str = "train", goes_on: bool = True) -> RunResult:
    """Train as `recipe` says, from the beginning or from the newest checkpoint in `recipe.out`.

    Args:
      goes_on: whether to say of a run that was finished before how it can be made longer.
    Raises:
      ValueError: the recipe contradicts itself, the data, or the run that is already in `recipe.out`.
    """
    distributed.start(recipe.platform, recipe.data.batch_size // recipe.step.accumulate)
    mesh = make_mesh(recipe.mesh)
    loader = Loader(recipe.data, "train", *reader(mesh))
    check(recipe, vocab_size=loader.vocab_size, n_devices=jax.device_count())
    run, run_dir = Run(recipe, loader, mesh), here(recipe.out)
    with (
        jax.set_mesh(mesh),
        _claimed(run_dir, recipe, loader) as launch,
        Heartbeat(run_dir, launch, recipe.platform.silence_s, lambda: _kept(run_dir)) as heart,
        Tiers(run_dir, recipe.checkpoint, launch) as checkpoints,
        StopRequest(mesh, lambda: f"left without saving: {_kept(run_dir)}") as stop,
    ):
        heart.background, run.meet = lambda: checkpoints.writing, heart.meet
        heart.enter("restore" if checkpoints.resumes else "start", 0)
        state = run.start(checkpoints)
        steps, done = total_steps(recipe, loader, run.begin.step, run.begin.sample), run.begin.step
        if steps < done:
            raise ValueError(
                f"steps={recipe.steps.root} ends before step {done}, where this run is already; give more steps to "
                "train on, or another `out` for another run"
            )
        changed = changes(load_recipe(run_dir), recipe) if done else []
        if steps > done:  # the merged recipe of a resumed run, now that nothing of it was refused
            _write_recipe(run_dir, recipe)
        with RunLog(
            run_dir, name, recipe.monitor, steps,
            begin=run.begin, tokens_per_step=run.tokens_per_step, flops=run.flops_per_step(),
            documents=run.documents,
        ) as log:  # fmt: skip
            log.say(run.describe(steps))
            if changed:
                unused = "; the run is finished, so none of it is used" * (steps == done)
                log.say(f"note: not as it was until step {done}: {', '.join(changed)}{unused}")
            for note in run.notes(steps):
                log.say(note)
            chats = [str(each.directory) for each in loader.datasets if each.kind == "chat"]
            if name == "train" and chats and not done and recipe.data.objective.kind == "next_token":
                log.say(f"note: of the conversations in {' and '.join(chats)} only the answers are learned, as in tune")
            if steps == done:
                more = f"; to go on: python -m jaxllm.train {recipe.out} steps=N" * goes_on
                log.say(f"finished: all {count(steps, 'step')} are done, nothing is trained{more}")
            else:
                for line in (run.memory()[0], *run.efficiency()):
                    log.say(line)
            state = _train(run, state, steps, log, stop, heart)
            step = int(state.step)
            if step < steps:
                log.say(f"stopped by {stop.reason} at step {step}; resume with: python -m jaxllm.train {recipe.out}")
    return RunResult(run_dir, step, stop.reason if stop.agreed else "")


def _train(run: Run, state: TrainState, steps: int, log: RunLog, stop: StopRequest, heart: Heartbeat) -> TrainState:
    """Run the loop and make sure that its last state is on disk."""
    recipe, optim = run.recipe, run.recipe.optim
    actions = run.actions(log)
    run.catch_up(actions, state, steps)
    run.loader.set_state({"sample": run.begin.sample})
    if steps > run.begin.step:
        log.say("compiling the step ...")
    jitted = compile_step(recipe.model, run.compute, optim, recipe.step, run.shardings, run.loader.texts_per_row)
    profile, program = Profile(run.run_dir, recipe.monitor.profiled), None

    def update(state: TrainState, batch: Batch, step: int) -> tuple[TrainState, dict]:
        nonlocal program
        lr = np.float32(learning_rate(optim.schedule, optim.lr, step - 1, steps))
        if program is None:
            heart.enter("compile", step)
            start = time.perf_counter()
            program = jitted.lower(state, batch, lr).compile()
            memory = memory_line(device_bytes(program))
            log.compiled(time.perf_counter() - start, f"memory per device, by the compiler: {memory}")
            heart.meet("compile")
            heart.enter("step", step)
        profile.before(step, state)
        state, metrics = program(state, batch, lr)
        profile.after(step, state)
        return state, metrics

    with Feed(run.loader, run.mesh) as feed, closing(profile):
        observer = Observer(log.step, log.skipped, run.rescue, heart.enter)
        state = run_loop(state, update, feed, steps, actions, observer, stop)
    heart.enter("save", int(state.step))
    run.save_once(int(state.step), state)
    return state


def total_steps(recipe: Recipe, loader: Loader, done: int, sample: int) -> int:
    """Return after how many updates the run ends, of which `done` have used `sample` samples.

    A length in tokens or epochs is a number of samples, rounded up to whole batches: what was done with another batch
    size counts as what it was.

    Raises:
      ValueError: the data ends before, or rounding makes the run more than twice as long as was asked.
    """
    size, limit = recipe.data.batch_size, loader.n_samples
    steps = recipe.steps.resolve(loader.samples_per_epoch, recipe.data.packing.seq_len)  # in samples, unless in steps
    if not isinstance(recipe.steps.root, int):
        target = steps
        if limit is not None and 0 < target - limit < recipe.data.epochs:  # each epoch is rounded up to whole samples
            target = limit
        steps = max(done + -(-(target - sample) // size), done)
        used = sample + (steps - done) * size
        used = used if limit is None else min(used, limit)
        if steps > done and used > 2 * target:
            raise ValueError(
                f"steps={recipe.steps.root} asks for {count(target, 'sample')}, and whole batches of data.batch_size="
                f"{size} would make it {used}; lower data.batch_size to {target - sample}, or give steps as a number"
            )
    last = sample + (steps - done - 1) * size  # where the last batch starts; it may be filled up
    if steps > done and limit is not None and last >= limit:
        raise ValueError(
            f"steps={recipe.steps.root} needs {last + size} samples, and data.epochs={recipe.data.epochs} are {limit}; "
            f"set steps={done + max(0, -(-(limit - sample) // size))}, data.epochs higher, or data.epochs=none to "
            "repeat the data"
        )
    return steps


@contextmanager
def _claimed(run_dir: Path, recipe: Recipe, loader: Loader) -> Iterator[int]:
    """Hold `run_dir` as the home of this run, with a recipe and a tokenizer in it; yield a number of this launch."""
    first = jax.process_index() == 0
    if first:
        check_home(run_dir, recipe)
        run_dir.mkdir(parents=True, exist_ok=True)
    with lock.run_lock(run_dir) if first else nullcontext():
        if not (run_dir / FILE_NAME).exists():
            _write_recipe(run_dir, recipe)
        if first and not (run_dir / "tokenizer").exists():
            with files.new_directory(run_dir / "tokenizer") as temporary:
                shutil.copytree(loader.tokenizer_dir, temporary, dirs_exist_ok=True)
        if first:
            shutil.rmtree(run_dir / heartbeat.DIRECTORY, ignore_errors=True)
        launch = np.int32(time.time_ns() // 1000 % 2**31)
        try:
            launch = multihost_utils.broadcast_one_to_all(launch)  # when the first process has made the directory
            run_dir.mkdir(parents=True, exist_ok=True)  # of a run in a bucket, the twin on another machine
            yield int(launch)
        finally:
            if first:
                push(run_dir)


def check_home(run_dir: Path, recipe: Recipe) -> None:
    """Raise ValueError unless `run_dir` is free or holds this run."""
    if (run_dir / FILE_NAME).exists():
        before = load_recipe(run_dir)
        changed = [key for key in FIXED if before.model_dump()[key] != recipe.model_dump()[key]]
        if changed:
            raise ValueError(
                f"{named(run_dir)} already holds a run with another {', '.join(changed)}; choose another `out`, delete "
                f"the directory, or resume it unchanged with: python -m jaxllm.train {named(run_dir)}"
            )
    elif run_dir.exists():  # what a run leaves that was killed before it wrote its recipe is no obstacle
        leftover = re.compile(rf"{re.escape(LOCK)}|\.{re.escape(FILE_NAME)}\..*\.tmp")
        if any(not leftover.fullmatch(path.name) for path in run_dir.iterdir()):
            raise ValueError(f"{named(run_dir)} is not empty and holds no run; choose another `out`")


def _kept(run_dir: Path) -> str:
    """Say what is on disk of a run that is left without saving; asks the file system alone, for any thread."""
    steps = [int(path.name) for path in (origin(run_dir) / "checkpoints").glob("*") if path.name.isdigit()]
    kept = f"the newest checkpoint is of step {max(steps)}; resume" if steps else "nothing was saved yet; begin anew"
    return f"{kept} with: python -m jaxllm.train {named(run_dir)}"


def _write_recipe(run_dir: Path, recipe: Recipe) -> None:
    if jax.process_index() == 0:
        files.write_text(run_dir / FILE_NAME, configs.dump(recipe))
