"""The voice of a run: files, TensorBoard, the record of refused steps, and what a person sees while it trains: one live
line on a terminal, one line per interval elsewhere.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from jaxllm.core.bucket import named, push
from jaxllm.core.files import write_text
from jaxllm.training.config import MonitorConfig
from jaxllm.training.goodput import Goodput, device_memory
from jaxllm.training.loop import Diverged
from jaxllm.training.metrics import MetricsWriter, Spikes, read

MAX_DUMPS = 20  # spikes of one process whose documents are written down


class Position(NamedTuple):
    """Where a process begins: `step` updates used `sample` samples, and each further one uses `batch_size`."""

    step: int
    sample: int
    batch_size: int

    def at(self, step: int) -> int:
        """Return how many samples are used after update `step`."""
        return self.sample + (step - self.step) * self.batch_size


class RunLog:
    """Writes what happens in one run; on processes other than the first it only guards.

    Args:
      begin: where this process begins; lines of later steps are dropped from the files.
      flops: (model FLOPs of one step, peak FLOP/s of all devices or None).
      documents: what the batch of a step is made of, asked when its loss stands out or its update is refused.
    """

    def __init__(
        self, run_dir: Path, name: str, config: MonitorConfig, steps: int, *, begin: Position, tokens_per_step: int,
        flops: tuple[float, float | None], documents: Callable[[int], Iterable[dict]] = lambda step: (),
    ):  # fmt: skip
        self._run_dir, self._config, self._steps = run_dir, config, steps
        self._tokens_per_step, self._flops = tokens_per_step, flops
        self._begin, self._skipped_in_a_row = begin, 0
        before = [record for record in read(run_dir / "timing.jsonl") if record["step"] <= begin.step]
        self._elapsed = max((record["elapsed_s"] for record in before), default=0.0)  # by earlier processes of this run
        self._goodput = Goodput(run_dir, begin.step, before)
        self._window: list[tuple[float, float]] = []
        self._timed, self._compile_s = False, 0.0
        self._writer = (
            MetricsWriter(run_dir, resume_from=begin.step, wandb=config.wandb) if jax.process_index() == 0 else None
        )
        self._name, self._first_end = name, 0.0
        self._documents, self._spikes, self._dumps = documents, Spikes(config.loss_spike), 0
        self._console = Console()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
            console=self._console, disable=self._writer is None or not self._console.is_terminal,
            speed_estimate_period=600.0,  # s; its own 30 may see no two updates of slow steps
        )  # fmt: skip
        self._task = self._bar.add_task(name, completed=begin.step, total=steps, facts="compiling")

    def __enter__(self) -> "RunLog":
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
        if self._writer is not None:
            self._writer.close()

    def say(self, text: str) -> None:
        """Print a line, above the progress."""
        if self._writer is not None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def compiled(self, seconds: float, memory: str) -> None:
        """Record that the step was compiled, and say what the compiler makes of its memory."""
        self._compile_s = seconds
        self.say(memory)

    def _progress(self, step: int, facts: str) -> None:
        """Show that `step` updates are done."""
        self._bar.update(self._task, completed=step, facts=facts)
        if self._bar.disable and self._writer is not None:
            left = ""
            if timed := step - self._begin.step - 1:  # the first step compiles
                seconds = int((time.perf_counter() - self._first_end) / timed * (self._steps - step))
                left = f"  {seconds // 60}:{seconds % 60:02d} left"
            self._console.print(f"{self._name} {step}/{self._steps}  {facts}{left}", highlight=False)
            sys.stdout.flush()

    def step(self, step: int, metrics: dict[str, float], seconds: float, waited: float) -> None:
        """Record one update, with the first sample of its batch."""
        if not metrics["skipped"]:
            self._skipped_in_a_row = 0
        self._elapsed += seconds
        self._window.append((seconds, waited))
        due = step % self._config.log_every == 0 or step == self._steps
        if self._writer is not None:
            self._writer.metrics(step, {"sample": self._begin.at(step - 1), **metrics}, board=due)
        mean = None if metrics["skipped"] else self._spikes(metrics["loss"])
        if mean is not None and self._writer is not None and self._dumps < MAX_DUMPS:
            self._dumps += 1
            path = named(self._write_documents("spikes", step))
            self.say(
                f"note: the loss of step {step}, {metrics['loss']:.4g}, stands out from a mean of {mean:.4g}; its "
                f"documents are in {path}; python -m jaxllm.inspect {named(self._run_dir)} --step {step} --losses "
                "shows which"
            )
        first = step == self._begin.step + 1
        self._goodput.add(seconds - waited - (self._compile_s if first else 0.0))
        if first:
            self._first_end = time.perf_counter()
        if due:
            self._timing(step, metrics)
        elif first:
            self._progress(step, f"loss {metrics['loss']:.4f}  compiled and done in {seconds:.0f} s")

    def _timing(self, step: int, metrics: dict[str, float]) -> None:
        # The first step of a process compiles; a window with more steps leaves it out of the rates.
        compiled = {} if self._timed else {"compile_s": self._compile_s}
        window = self._window[1:] if len(self._window) > 1 and not self._timed else self._window
        self._timed = True
        step_s, wait_s = (float(np.mean(column)) for column in zip(*window, strict=True))
        self._window = []
        flops, peak = self._flops
        values = {
            "elapsed_s": self._elapsed, "step_s": step_s, "data_wait_s": wait_s,
            "tokens_per_s": self._tokens_per_step / step_s, "model_flops_per_s": flops / step_s, **compiled,
            **self._goodput.values(), **device_memory(),
        }  # fmt: skip
        if peak is not None:
            values["mfu"] = flops / step_s / peak
        if self._writer is not None:
            self._writer.timing(step, values)
        rate = f"{values['tokens_per_s']:,.0f} tok/s" + (f" MFU {values['mfu']:.1%}" if peak is not None else "")
        self._progress(step, f"loss {metrics['loss']:.4f}  {rate}")

    def skipped(self, step: int, batch: Mapping[str, np.ndarray], metrics: dict[str, float]) -> None:
        """Record a refused update and keep its batch, or what this process holds of it, for inspection.

        Raises:
          Diverged: more than `max_skipped` in a row.
        """
        self._skipped_in_a_row += 1
        path = self._run_dir / "skipped" / f"step-{step}-process-{jax.process_index()}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **batch)
        push(path)  # by each process, whose twin the first one does not see
        if jax.process_count() > 1:  # each has its rows and columns
            path = path.with_name(f"step-{step}-process-*.npz")
        facts = f"loss={metrics['loss']:.4g}, grad_norm={metrics['grad_norm']:.4g}"
        if self._writer is not None:
            self._write_documents("skipped", step)
        self.say(f"step {step} skipped: {facts}; its batch is in {named(path)}, its documents beside it")
        if self._skipped_in_a_row > self._config.max_skipped:
            raise Diverged(
                f"{self._skipped_in_a_row} steps in a row were refused: loss, gradient or new parameters not finite, or"
                f" the gradient a spike (step {step}: {facts}); the parameters are those before them. Lower"
                f" optim.lr, look at the batches in {named(path.parent)} (python -m jaxllm.inspect "
                f"{named(self._run_dir)} --step {step}), or raise monitor.max_skipped"
            )

    def _write_documents(self, name: str, step: int) -> Path:
        path = self._run_dir / name / f"step-{step}.jsonl"
        lines = (json.dumps({"step": step, **each}, ensure_ascii=False) + "\n" for each in self._documents(step))
        write_text(path, "".join(lines))
        return path

    def evaluation(self, step: int, values: dict[str, float]) -> None:
        """Record validation values."""
        if self._writer is not None:
            self._writer.metrics(step, values)
            self._writer.timing(step, {"elapsed_s": self._elapsed})
        self.say(f"step {step}  " + "  ".join(f"{key} {value:.4f}" for key, value in values.items()))

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record a text that the model wrote."""
        if self._writer is not None:
            self._writer.sample(step, prompt, text)
        self.say(f"  {prompt} → {text}")
