"""python -m jaxllm.quickstart: raw text to an instruction-following model in five minutes on two CPU cores."""

import argparse
import functools
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxllm
from jaxllm.core import files
from jaxllm.core.bucket import here, is_pushed, named
from jaxllm.core.command import command, parser
from jaxllm.core.wording import short
from jaxllm.data.world.tasks import GUIDE

if TYPE_CHECKING:
    from rich.console import Console

    from jaxllm.language_model import LanguageModel

TASKS, LATE, NOVEL = "new_combinations", "pretrain_only", "novel"
DOCUMENTS, CONVERSATIONS, VOCAB_SIZE = 30_000, 13_000, 1280
SMOKE = {"documents": 2_000, "conversations": 800, "steps": "steps=20", "count": 20}
ANSWERS_SHOWN = 5
MIXED = (
    "The two are not of the same texts: validation is on answers alone, training also on the raw text that is mixed "
    "in, which is harder to predict."
)
STAGES = {"pretrain": ("Pretraining", ""), "tune": ("Instruction tuning", MIXED)}
QUESTION = "Translate into Chinese: Tom sees a red ball in the park."
TABLES = {  # key in results.json: (split, title)
    "tasks": (TASKS, "Instructions it has never seen: exactly right answers"),
    "pretrain_only": (LATE, "The same, about words that only the raw text had"),
    "novel": (NOVEL, "The same, about names that occur nowhere"),
}


@command
def main(argv: list[str] | None = None) -> int | None:
    """Run every stage; a stage that is complete already (an earlier run in the same directory) is not done again."""
    line = parser(__doc__)
    line.add_argument("--out", metavar="DIR", help="where everything goes (default: runs/quickstart)")
    line.add_argument("--smoke", action="store_true", help="every stage, but too short to learn anything: a test")
    without = "tune random weights instead: what is pretraining good for?"
    line.add_argument("--skip-pretraining", action="store_true", help=without)
    arguments = line.parse_args(argv)
    from rich.console import Console

    console = Console(highlight=False)
    start = time.perf_counter()
    out = here(arguments.out or ("runs/quickstart-smoke" if arguments.smoke else "runs/quickstart"))
    files.check_no_file(out)
    _heading(console, 1, "Writing a micro-world and its tokenizer")
    _prepare(out, arguments.smoke)
    if not arguments.skip_pretraining:
        _heading(console, 2, "Pretraining on raw text")
        if status := _train(out, "pretrain", arguments):
            return status
    from jaxllm.evaluation.applications import evaluate_applications

    evaluate = functools.partial(evaluate_applications, count=SMOKE["count"] if arguments.smoke else 200)
    base = None if arguments.skip_pretraining else jaxllm.load(out / "pretrain")
    before = evaluate(base, splits=(TASKS,)) if base else None
    _heading(console, 3, "Teaching it to follow instructions")
    if status := _train(out, "tune", arguments):
        return status
    _heading(console, 4, "Asking what it has never been asked")
    files.write_json(out / "run.json", {"model": "tune"})
    tuned = jaxllm.load(out / "tune")
    after = evaluate(tuned, splits=(TASKS, LATE, NOVEL))
    results = _results(out, before, after, tuned)
    # Nothing is done twice, so a second call takes less, and says what the first one took.
    earlier = files.read_json(out / "results.json", {"seconds": 0.0})["seconds"]
    now = round(time.perf_counter() - start, 1)
    results["seconds"] = max(earlier, now)
    files.write_json(out / "results.json", results)
    _show(console, results)
    _heading(console, 5, "Writing the report")
    _report(out, results, _conversations(console, base, tuned))
    console.print(
        f"\n{_took(now, earlier)}, {short(results['tokens'])} trained tokens. "
        f"The report: {named(out / 'report.html')}\n"
        f"Talk to it:  python -m jaxllm.sample {named(out)} --chat\nWhat to ask: {GUIDE}",
        soft_wrap=True, markup=False,
    )  # fmt: skip
    return None


def _took(now: float, earlier: float) -> str:
    """Say how long it took, in seconds; `earlier` is what a run that did more took."""
    return f"The first run took {earlier:.0f} s, and this one {now:.0f} s" if earlier > now else f"{now:.0f} s in all"


def _heading(console: "Console", number: int, text: str) -> None:
    console.print(f"\n[bold cyan]{number}/5[/] [bold]{text}[/]")


def _prepare(out: Path, smoke: bool) -> None:
    """Write the two datasets: raw text with a new tokenizer, and conversations in the same tokens."""
    from jaxllm.data.prepare import prepare
    from jaxllm.data.prepare_config import ExistingTokenizer, PrepareConfig
    from jaxllm.data.reading.sources import World
    from jaxllm.data.tokenizers.pieces_training import TokenizerConfig

    text, chat = out / "data" / "pretrain", out / "data" / "instruct"
    n_documents, n_conversations = (SMOKE["documents"], SMOKE["conversations"]) if smoke else (DOCUMENTS, CONVERSATIONS)
    for dataset, count in ((text, n_documents), (chat, n_conversations)):
        if dataset.exists() and (found := files.read_json(dataset / "report.json")["documents_read"]) != count:
            raise ValueError(
                f"{dataset} was made of {found:,} texts, and now {count:,} are wanted (--smoke makes fewer); choose "
                "another --out"
            )
    if not is_pushed(text / "manifest.json"):
        world, vocabulary = World(count=n_documents, seed=0), TokenizerConfig(vocab_size=VOCAB_SIZE)
        prepare(PrepareConfig(inputs=(world,), out=named(text), tokenizer=vocabulary, seq_len=128))
    if not is_pushed(chat / "manifest.json"):
        world, vocabulary = World(count=n_conversations, seed=1), ExistingTokenizer(path=named(text))
        prepare(PrepareConfig(inputs=(world,), out=named(chat), chat=True, tokenizer=vocabulary, seq_len=192))


def _train(out: Path, stage: str, arguments: argparse.Namespace) -> int:
    """Run the recipe of `stage` with its paths inside `out`; return the exit status, 0 if it was not stopped."""
    from jaxllm.recipe import load_recipe, shipped
    from jaxllm.wiring import train

    sources = ["pretrain"] if stage == "pretrain" else ["instruct", "pretrain"]
    overrides = [f"data.sources.{i}.path={named(out / 'data' / source)}" for i, source in enumerate(sources)]
    overrides.append(f"out={named(out / stage)}")
    if stage == "tune":
        random = ["start_from=none", "model.preset=quickstart"]
        overrides += random if arguments.skip_pretraining else [f"start_from={named(out / 'pretrain')}"]
    if arguments.smoke:
        overrides.append(str(SMOKE["steps"]))
    return train(load_recipe(shipped(f"quickstart/{stage}.yaml"), overrides), name=stage, goes_on=False).status


def _results(out: Path, before: dict[str, Any] | None, after: dict[str, Any], tuned: "LanguageModel") -> dict[str, Any]:
    """Put together what results.json says."""
    import platform

    import jax

    from jaxllm.evaluation.applications import compare
    from jaxllm.models.accounting import param_count
    from jaxllm.training.metrics import read

    records = [record for stage in STAGES for record in read(out / stage / "metrics.jsonl")]
    return {
        **{key: compare(before if key == "tasks" else None, after, split) for key, (split, _) in TABLES.items()},
        "tokens": int(sum(record.get("tokens", 0) for record in records)),
        "parameters": param_count(tuned.config),
        "machine": f"{platform.machine()}, {jax.device_count()} x {jax.devices()[0].device_kind}",
        "failures": {application: entry["failures"] for application, entry in after[TASKS].items()},
    }


def _show(console: "Console", results: dict[str, Any]) -> None:
    from rich.table import Table

    for key, (_, title) in TABLES.items():
        table = Table("application", "pretrained", "tuned", "n", title=title, title_justify="left")
        for application, entry in results[key].items():
            base = f"{entry['base']:.1%}" if "base" in entry else "-"
            table.add_row(application, base, f"{entry['tuned']:.1%}", str(entry["n"]))
        console.print(table)


def _conversations(console: "Console", base: "LanguageModel | None", tuned: "LanguageModel") -> tuple:
    """Ask both models one held-out question per application."""
    from jaxllm.evaluation.report import Exchange
    from jaxllm.evaluation.tasks import APPLICATIONS, held_out, is_correct
    from jaxllm.inference.sampling import Sampler

    examples = [held_out(application, TASKS, ANSWERS_SHOWN, seed=7)[i] for i, application in enumerate(APPLICATIONS)]
    prompts = [[{"role": "user", "content": example.prompt}] for example in examples]
    greedy = Sampler(temperature=0.0)
    answers = [
        [answer.text for answer in model.generate(prompts, max_new_tokens=90, sampler=greedy)] if model else None
        for model in (base, tuned)
    ]
    exchanges = []
    for index, example in enumerate(examples):
        before, after = (texts[index] if texts else "" for texts in answers)
        correct = is_correct(example, after)
        exchanges.append(Exchange(example.application, example.prompt, before, after, example.answer, correct))
        console.print(f"\n[dim]{example.application}[/]\n  [bold]{example.prompt}[/]")
        console.print(f"  {after} [{'green' if correct else 'red'}]{'✓' if correct else '✗'}[/]")
    return tuple(exchanges)


def _report(out: Path, results: dict[str, Any], exchanges: tuple) -> None:
    from jaxllm.evaluation.report import Report, Stage, write_report
    from jaxllm.training.metrics import read

    stages = tuple(
        Stage(
            name, *(read(out / stage / f"{kind}.jsonl") for kind in ("metrics", "timing", "samples")),
            (out / stage / "recipe.yaml").read_text(encoding="utf-8"), note,
        )
        for stage, (name, note) in STAGES.items() if (out / stage / "recipe.yaml").exists()
    )  # fmt: skip
    steps = (
        ("Hold a conversation", f"python -m jaxllm.sample {named(out)} --chat"),
        ("Ask one thing", f'python -m jaxllm.sample {named(out)} --prompt "{QUESTION}"'),
        ("See what it was trained on", f"python -m jaxllm.inspect {named(out)} --step 1"),
        ("Use real text: the manual of Python itself", "python -m jaxllm.prepare configs/pydocs/text.yaml"),
        ("Use your own", "python -m jaxllm.prepare --text 'my/**/*.txt' --out data/mine"),
    )
    title = "From raw text to a model that follows instructions"
    said = stages[0].samples
    raw = next(((each["prompt"], each["text"]) for each in reversed(said) if each["prompt"] == said[0]["prompt"]), None)
    write_report(out / "report.html", Report(title, stages, results, exchanges, raw, steps))


if __name__ == "__main__":
    sys.exit(main())
