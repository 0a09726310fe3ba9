"""What a run writes down: metrics.jsonl (what was computed, bitwise repeatable), timing.jsonl (when), TensorBoard.

The two files are apart on purpose: a resumed run's metrics.jsonl equals the uninterrupted run's, byte for byte.
"""

import contextlib
import hashlib
import json
import math
from pathlib import Path
from typing import Any

from jaxllm.core.extras import extra
from jaxllm.core.files import write_text


class MetricsWriter:
    """Appends to the files of one run directory; `resume_from` drops what a killed run wrote after its checkpoint.

    Args:
      wandb: project of Weights & Biases that gets what TensorBoard gets.
    Raises:
      ValueError: there is a project, and the package is not installed.
    """

    def __init__(self, run_dir: Path, *, resume_from: int = 0, wandb: str | None = None):
        from tensorboardX import SummaryWriter

        self._files = {}
        for name in ("metrics", "timing", "samples"):
            path = Path(run_dir) / f"{name}.jsonl"
            if path.exists():
                kept = [record for record in read(path) if record["step"] <= resume_from]
                write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))
            # Line by line, so that a kill loses none and others may follow; open as long as the writer.
            self._files[name] = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        # TensorBoard hides what earlier processes wrote from this step on: the lines that were dropped above.
        self._wandb = None if wandb is None else _wandb_run(wandb, Path(run_dir), resume_from)
        self._board = SummaryWriter(str(Path(run_dir) / "tensorboard"), purge_step=resume_from + 1)

    def close(self) -> None:
        """Flush and close all files."""
        for file in self._files.values():
            file.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def metrics(self, step: int, values: dict[str, float | int], *, board: bool = True) -> None:
        """Record deterministic values; NaN and Inf are written as strings, because JSON has no such numbers."""
        self._write("metrics", step, values)
        if board:
            self._scalars(step, values)

    def timing(self, step: int, values: dict[str, float]) -> None:
        """Record wall-clock values."""
        self._write("timing", step, values)
        self._scalars(step, values)

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Record a text the model wrote."""
        self._write("samples", step, {"prompt": prompt, "text": text})
        self._board.add_text("samples", f"**{prompt}** {text}", step)

    def _write(self, name: str, step: int, values: dict[str, Any]) -> None:
        def plain(value: Any) -> Any:
            if isinstance(value, list):
                return [plain(each) for each in value]
            return value if isinstance(value, str) or math.isfinite(value) else str(value)

        record = {"step": step, **{key: plain(value) for key, value in values.items()}}
        self._files[name].write(json.dumps(record, ensure_ascii=False) + "\n")

    def _scalars(self, step: int, values: dict[str, float]) -> None:
        each = {
            f"{key}/{i:03d}": x for key, value in values.items() if isinstance(value, list) for i, x in enumerate(value)
        }
        values = {key: value for key, value in values.items() if not isinstance(value, list)} | each
        for key, value in values.items():
            self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log({**values, "step": step})


def _wandb_run(project: str, run_dir: Path, resume_from: int) -> Any:
    """Return the run there of this directory, begun or gone on with; WANDB_MODE=offline keeps it on this machine."""
    with extra("wandb"):
        import wandb
    name = run_dir.resolve()
    ident = hashlib.sha256(str(name).encode()).hexdigest()[:16]  # the same for each process of a run
    run = wandb.init(project=project, id=ident, name=name.name, dir=str(run_dir), resume="allow")
    run.define_metric("*", step_metric="step")
    run.summary["resumed_from"] = resume_from
    return run


def read(path: str | Path) -> list[dict[str, Any]]:
    """Return the records of a .jsonl file of a run; a last line cut by a kill is dropped.

    Raises:
      ValueError: another line is damaged; the message has its number.
    """
    if not Path(path).exists():
        return []
    with open(path, "rb") as file:  # as bytes, so that one that is no UTF-8 is an error of its line
        return [_record(line, f"{path}, line {number}") for number, line in enumerate(file, 1) if line.endswith(b"\n")]


def _record(line: bytes, place: str) -> dict[str, Any]:
    with contextlib.suppress(ValueError):
        match json.loads(line.decode("utf-8")):
            case {"step": int()} as record:
                return record
    raise ValueError(f"{place} is damaged: {line[:60]!r}; delete this line, which only says what was, and go on")


class Spikes:
    """Which losses stand out: more than `deviations` standard deviations above the moving mean of about 50 steps.

    A loss counts in the mean as at most what would have been no spike, so a jump that lasts is reported and then known.
    """

    DECAY, FIRST = 0.98, 50

    def __init__(self, deviations: float | None):
        self._deviations = deviations
        self._seen, self._mean, self._variance = 0, 0.0, 0.0

    def __call__(self, loss: float) -> float | None:
        """Take the next loss in; return the mean before it if it stands out, else None."""
        if self._deviations is None or not math.isfinite(loss):
            return None
        mean, self._seen = self._mean, self._seen + 1
        bound = mean + self._deviations * max(math.sqrt(self._variance), 0.01 * abs(mean))
        spike = self._seen > self.FIRST and loss > bound
        decay = min(self.DECAY, 1 - 1 / self._seen)
        change = (bound if spike else loss) - mean
        self._mean += (1 - decay) * change
        self._variance = decay * (self._variance + (1 - decay) * change**2)
        return mean if spike else None
