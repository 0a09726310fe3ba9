"""From a recipe to a trained run: builds the parts that the recipe names and hands them to the loop.

The one place where text (data, tokenizer, samples) and training meet. `train`, `tune` and `quickstart` call `train`.
"""

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from jaxllm.core import config as configs
from jaxllm.core import files
from jaxllm.core.batch import Batch
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.loader import Loader
from jaxllm.evaluation.likelihood import evaluate_loss
from jaxllm.models.accounting import flops_per_token, param_count, peak_flops
from jaxllm.models.config import ComputeConfig
from jaxllm.recipe import FILE_NAME, Recipe, check, load_recipe
from jaxllm.sharding import distributed
from jaxllm.sharding.mesh import make_mesh
from jaxllm.training.checkpoint import Checkpoints, load_params
from jaxllm.training.feed import Feed, place
from jaxllm.training.loop import Action, Observer, StopRequest, run_loop
from jaxllm.training.optim import optimizer
from jaxllm.training.run_log import RunLog
from jaxllm.training.schedules import learning_rate
from jaxllm.training.state import TrainState, init_state, param_shardings
from jaxllm.training.step import compile_step, eval_step

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


def train(recipe: Recipe, *, name: str = "train") -> RunResult:
    """Train as `recipe` says, from the beginning or from the newest checkpoint in `recipe.out`.

    Raises:
      ValueError: the recipe contradicts itself, the data, or the run that is already in `recipe.out`.
    """
    distributed.start(recipe.platform, recipe.data.batch_size // recipe.step.accumulate)
    loader = Loader(recipe.data, "train", jax.process_index(), jax.process_count())
    check(recipe, vocab_size=loader.vocab_size, n_devices=jax.device_count())
    tokens_per_step = recipe.data.batch_size * recipe.data.packing.seq_len
    steps_per_epoch = -(-loader.samples_per_epoch // recipe.data.batch_size)
    steps = recipe.steps.resolve(steps_per_epoch=steps_per_epoch, tokens_per_step=tokens_per_step)
    run_dir = Path(recipe.out)
    _claim(run_dir, recipe, loader)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("the first process has made the run directory")
    mesh = make_mesh(recipe.mesh)
    compute = recipe.compute.resolve(jax.default_backend(), recipe.model.n_layers)
    with jax.set_mesh(mesh), Checkpoints(run_dir, recipe.checkpoint) as checkpoints, StopRequest() as stop:
        run = _Run(recipe, run_dir, loader, mesh, compute, checkpoints, steps)
        state, shardings, sample = run.start()
        done = int(state.step)
        with RunLog(
            run_dir, name, recipe.monitor, done, steps, tokens_per_step=tokens_per_step, flops=run.flops_per_step()
        ) as log:
            log.say(run.describe(done, steps_per_epoch))
            loader.set_state({"sample": sample})
            run.attach(log, done, sample)
            compiled = compile_step(recipe.model, compute, recipe.optim, recipe.step, shardings)

            def update(state: TrainState, batch: Batch, step: int) -> tuple[TrainState, dict]:
                return compiled(state, batch, learning_rate(recipe.optim.schedule, recipe.optim.lr, step - 1, steps))

            with Feed(loader, mesh) as feed:
                observer = Observer(log.step, log.skipped)
                state = run_loop(state, update, feed, steps, run.actions(), observer, stop)
            step = int(state.step)
            if stop.reason and step not in checkpoints.steps():
                run.save(step, state)
            checkpoints.wait()
            if step < steps:
                log.say(f"stopped by {stop.reason} at step {step}; resume with: python -m jaxllm.train {run_dir}")
    return RunResult(run_dir, step, stop.reason)


def _claim(run_dir: Path, recipe: Recipe, loader: Loader) -> None:
    """Make `run_dir` the home of this run, or check that it already is."""
    if jax.process_index():
        return
    if (run_dir / FILE_NAME).exists():
        before = load_recipe(run_dir)
        changed = [key for key in FIXED if before.model_dump()[key] != recipe.model_dump()[key]]
        if changed:
            raise ValueError(
                f"{run_dir} already holds a run with another {', '.join(changed)}; choose another `out`, delete the "
                f"directory, or resume it unchanged with: python -m jaxllm.train {run_dir}"
            )
    elif run_dir.exists() and any(run_dir.iterdir()):
        raise ValueError(f"{run_dir} is not empty and holds no run; choose another `out`")
    run_dir.mkdir(parents=True, exist_ok=True)
    files.write_text(run_dir / FILE_NAME, configs.dump(recipe))
    if not (run_dir / "tokenizer").exists():
        shutil.copytree(loader.tokenizer_dir, run_dir / "tokenizer")


class _Run:
    """The parts of one run, and what is done with them between steps."""

    def __init__(
        self, recipe: Recipe, run_dir: Path, loader: Loader, mesh: Mesh, compute: ComputeConfig,
        checkpoints: Checkpoints, steps: int,
    ):  # fmt: skip
        self.recipe, self.run_dir, self.loader, self.mesh = recipe, run_dir, loader, mesh
        self.compute, self.checkpoints, self.steps = compute, checkpoints, steps
        self.val_loss: tuple[int, float] | None = None
        self._eval = jax.jit(functools.partial(eval_step, model=recipe.model, compute=compute))

    def start(self) -> tuple[TrainState, Any, int]:
        """Return (state, shardings, samples already used): restored if there is a checkpoint, else new."""
        recipe = self.recipe
        params = None
        if recipe.start_from is not None and not self.checkpoints.steps():
            params = self._starting_params()
        state, shardings = init_state(
            recipe.model, optimizer(recipe.optim), self.mesh, seed=recipe.seed,
            ema=recipe.step.ema_decay is not None, params=params,
        )  # fmt: skip
        if not self.checkpoints.steps():
            return state, shardings, 0
        abstract = jax.eval_shape(lambda: state)
        del state
        state, meta = self.checkpoints.restore(abstract, shardings)
        for key, now in self._fingerprints().items():
            if meta["fingerprints"][key] != now:
                raise ValueError(
                    f"{self.run_dir} was trained on another {key} (fingerprint {meta['fingerprints'][key]}, now {now});"
                    " restore the old one, or start a new run with `out` and `start_from`"
                )
        return state, shardings, meta["sample"]

    def _starting_params(self) -> Any:
        """Read the parameters of `start_from` straight into their places on the mesh."""
        from jaxllm.language_model import locate

        source, wanted = self.recipe.start_from, self.recipe.model
        run_dir, step = locate(source)
        found = load_recipe(run_dir).model
        if wanted.model_copy(update={"max_seq_len": found.max_seq_len}) != found:
            raise ValueError(f"`model` differs from the model of start_from={source}; leave `model` out of the recipe")
        if tokenizers.load(run_dir / "tokenizer").fingerprint != self.loader.tokenizer_fingerprint:
            raise ValueError(
                f"start_from={source} has another tokenizer than {self.recipe.data.sources[0].path}; prepare the data "
                f"with --tokenizer {run_dir}"
            )
        return load_params(run_dir, wanted, step=step, shardings=param_shardings(wanted, self.mesh))[0]

    def _fingerprints(self) -> dict[str, str]:
        return {"data": self.loader.fingerprint, "tokenizer": self.loader.tokenizer_fingerprint}

    def attach(self, log: RunLog, step: int, sample: int) -> None:
        """Remember where this process starts: sample index = start + steps done here * batch size."""
        self.log, self._first_step, self._first_sample = log, step, sample

    def actions(self) -> list[Action]:
        """Return what is due between steps, in order: the checkpoint last, so that it covers the others' lines."""
        monitor = self.recipe.monitor
        actions = []
        if self._has_validation():
            actions.append(Action(monitor.evaluate_every, self.evaluate))
        if monitor.prompts:
            actions.append(Action(monitor.sample_every, self.sample))
        return [*actions, Action(self.recipe.checkpoint.every, self.save)]

    def _has_validation(self) -> bool:
        manifests = (
            files.read_json(Path(source.path) / "manifest.json")
            for source in self.recipe.data.sources
            if source.validate_on
        )
        return any("validation" in manifest["splits"] for manifest in manifests)

    def evaluate(self, step: int, state: TrainState) -> None:
        """Measure the validation loss over the whole split (or `monitor.evaluate_batches` batches of it)."""
        validation = Loader(self.recipe.data, "validation", jax.process_index(), jax.process_count())

        def sums(batch: Batch) -> dict[str, Any]:
            return self._eval(_best_params(state), jax.tree.map(lambda x: place(x, self.mesh), batch))

        found = evaluate_loss(validation, sums, validation.bytes_per_token, self.recipe.monitor.evaluate_batches)
        self.val_loss = (step, found.nats_per_token)
        self.log.evaluation(step, {"val_loss": found.nats_per_token, "val_bits_per_byte": found.bits_per_byte})

    def sample(self, step: int, state: TrainState) -> None:
        """Write down what the model answers to `monitor.prompts` now."""
        from jaxllm.inference.sampling import Sampler
        from jaxllm.language_model import LanguageModel

        model = LanguageModel(
            self.recipe.model, _best_params(state), tokenizers.load(self.run_dir / "tokenizer"), chat=self.is_chat
        )
        monitor = self.recipe.monitor
        for prompt in monitor.prompts:
            answer = model.respond(prompt, max_new_tokens=monitor.sample_tokens, sampler=Sampler(temperature=0.0))
            self.log.sample(step, prompt, answer.text)

    @property
    def is_chat(self) -> bool:
        """Whether the run learns to answer (its first source holds conversations)."""
        return self.loader.datasets[0].kind == "chat"

    def save(self, step: int, state: TrainState) -> None:
        """Start writing a checkpoint; what was logged so far is handed to the operating system first."""
        self.log.flush()
        sample = self._first_sample + (step - self._first_step) * self.recipe.data.batch_size
        meta = {"step": step, "sample": sample, "fingerprints": self._fingerprints(), "chat": self.is_chat}
        val_loss = self.val_loss[1] if self.val_loss and self.val_loss[0] == step else None
        self.checkpoints.save(state, meta, val_loss)

    def flops_per_step(self) -> tuple[float, float | None]:
        """Return (model FLOPs of a step, peak FLOP/s of all devices or None)."""
        data = self.recipe.data
        tokens = data.batch_size * data.packing.seq_len
        peak = peak_flops(jax.devices()[0].device_kind)
        per_token = flops_per_token(self.recipe.model, data.packing.seq_len)
        return per_token * tokens, None if peak is None else peak * jax.device_count()

    def describe(self, done: int, steps_per_epoch: int) -> str:
        """Say in a line what is about to happen."""
        data, model = self.recipe.data, self.recipe.model
        tokens = data.batch_size * data.packing.seq_len
        kind = jax.devices()[0].device_kind
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.shape.items() if size > 1) or "one device"
        return (
            f"{param_count(model) / 1e6:,.1f}M parameters, {tokens:,} tokens/step, {self.steps:,} steps = "
            f"{self.steps * tokens / 1e6:,.1f}M tokens = {self.steps / steps_per_epoch:.1f} epochs; {kind} ({mesh}), "
            f"{self.compute.dtype}" + (f"; resuming at step {done}" if done else "")
        )


def _best_params(state: TrainState) -> Any:
    """Return the parameters that evaluation and users get: the moving average where one is kept."""
    return state.params if state.ema is None else state.ema
