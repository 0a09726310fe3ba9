"""The report of an experiment: one HTML page that needs nothing else, no network, no script, no file beside it.

    stages (records of their run directories), results, conversations -> charts and rows -> report.html.j2 -> page

The page is data for the eye: nothing is computed here that `results.json` and the run directories do not hold.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.core import files, page
from jaxllm.evaluation import scores
from jaxllm.evaluation.charts import SERIES, Line, line_chart, smooth

Records = Sequence[Mapping[str, Any]]
MAX_SAMPLES = 7  # moments of training that are shown per prompt
MAX_WRONG = 3  # answers that are shown


@dataclass(frozen=True)
class Stage:
    """One training run.

    Attributes:
      name: as a reader would call it: "Pretraining".
      metrics, timing, samples: the records of the run directory's files of these names (`training.metrics.read`).
      recipe: text of recipe.yaml.
      note: what a reader of its losses must know.
    """

    name: str
    metrics: Records
    timing: Records = ()
    samples: Records = ()
    recipe: str = ""
    note: str = ""


@dataclass(frozen=True)
class Exchange:
    """A prompt and what the model answered before and after instruction tuning."""

    application: str
    prompt: str
    before: str
    after: str
    expected: str
    correct: bool


@dataclass(frozen=True)
class Report:
    """Everything the page says.

    Attributes:
      title: the headline.
      results: as in results.json. "tasks", "pretrain_only", "novel" and "ablation" hold
        {application: {"base", "tuned", "n"}} with fractions of n examples, base or tuned may be absent; "model",
        "parameters", "tokens", "seconds" and "machine" are optional, and so is "failures", of the "tasks":
        {application: [{"prompt", "expected", "got"}, ...]}.
      raw: (a beginning, its continuation by the pretrained model) as running text, beside `conversations`.
      next_steps: (what it does, command).
    """

    title: str
    stages: tuple[Stage, ...]
    results: Mapping[str, Any]
    conversations: tuple[Exchange, ...] = ()
    raw: tuple[str, str] | None = None
    next_steps: tuple[tuple[str, str], ...] = ()


class Chart(NamedTuple):
    """An SVG element with its title, the unit of its y axis, its legend (CSS colour, look, words), a sentence below."""

    title: str
    unit: str
    svg: str
    legend: list[tuple[str, str, str]]
    caption: str


def write_report(path: str | Path, report: Report) -> None:
    """Write `report` to `path` as one HTML page, atomically.

    Raises:
      ValueError: there is no stage, or a stage has no training loss.
    """
    if not report.stages:
        raise ValueError("the report has no stages; give at least one training run")
    for stage in report.stages:
        if not _values(stage.metrics, "loss")[0]:
            raise ValueError(f"stage {stage.name!r} has no training loss in its metrics; is its run directory right?")
    files.write_bytes(path, render(report).encode("utf-8", "replace"))


def render(report: Report) -> str:
    """Return the page as text."""
    stages = report.stages
    charts = [*map(_loss_chart, stages, cycle(SERIES)), _joined(stages, "metrics", "lr", "Learning rate")]
    if any(stage.timing for stage in stages):
        charts.append(_joined(stages, "timing", "tokens_per_s", "Tokens per second"))
    return page.render(
        __package__, "report.html.j2", report=report, table=scores.table, charts=charts,
        summary=scores.summarise(report.results.get("tasks", {})), wrong=_wrong(report.results),
        diaries=[(stage.name, list(_diaries(stage.samples))) for stage in stages],
    )  # fmt: skip


def _values(records: Records, key: str) -> tuple[list[float], list[float]]:
    """Return (steps, values) of the records that have `key`; NaN and Inf are strings in the files."""
    found = [(record["step"], float(record[key])) for record in records if key in record]
    return [step for step, _ in found], [value for _, value in found]


def _loss_chart(stage: Stage, colour: str) -> Chart:
    steps, loss = _values(stage.metrics, "loss")
    window = 2 * (len(loss) // 80) + 1
    mean = smooth(loss, window)  # a single step says little where texts are mixed
    lines = [Line(steps, loss, colour, "raw"), Line(steps, mean, colour)]
    legend = [(colour, "line", f"training, mean of {window} steps" if window > 1 else "training")]
    caption = f"{steps[-1]:,} steps. Training loss {mean[-1]:.3f} at the end"
    val_steps, val_loss = _values(stage.metrics, "val_loss")
    if val_loss:
        lines.append(Line(val_steps, val_loss, "ink", "points"))
        legend.append(("ink", "points", "validation"))
        caption += f", validation loss {val_loss[-1]:.3f}"
        if bits := _values(stage.metrics, "val_bits_per_byte")[1]:
            caption += f" ({bits[-1]:.3f} bits per byte)"
    svg = line_chart(lines, "loss, nats per token", log=True)
    caption = f"{caption}. {stage.note}".rstrip()
    return Chart(f"{stage.name}: loss", "nats per token, log scale", svg, legend, caption)


def _joined(stages: Sequence[Stage], source: str, key: str, title: str) -> Chart:
    """A chart in which each stage starts where the one before ended."""
    lines, legend, marks, parts, start = [], [], [], [], 0
    for stage, colour in zip(stages, cycle(SERIES), strict=False):
        steps, values = _values(getattr(stage, source), key)
        lines.append(Line([start + step for step in steps], values, colour))
        legend.append((colour, "line", stage.name))
        if values and key == "tokens_per_s":
            parts.append(f"{sorted(values)[len(values) // 2]:,.0f} in {stage.name}")
        start += stage.metrics[-1]["step"]
        marks.append(start)
    caption = "Median: " + ", ".join(parts) + "." if parts else ""
    return Chart(title, "", line_chart(lines, title, marks=marks[:-1]), legend, caption)


def _diaries(samples: Records) -> Iterator[tuple[str, list[Mapping[str, Any]]]]:
    """Yield (prompt, records) for each prompt: first and last, and what is evenly between."""
    for prompt in dict.fromkeys(record["prompt"] for record in samples):
        records = [record for record in samples if record["prompt"] == prompt]
        count = min(len(records), MAX_SAMPLES)
        chosen = [round(i * (len(records) - 1) / max(count - 1, 1)) for i in range(count)]
        yield prompt, [records[index] for index in chosen]


def _wrong(results: Mapping[str, Any]) -> list[tuple[str, Mapping[str, str]]] | None:
    """Return `MAX_WRONG` (application, wrong answer), of different applications if there are; None: it is not known."""
    if "failures" not in results:
        return None
    failed = [[(name, failure) for failure in failures] for name, failures in results["failures"].items()]
    return [each for rank in zip_longest(*failed) for each in rank if each is not None][:MAX_WRONG]
