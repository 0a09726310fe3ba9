"""python -m jaxllm.evaluate: perplexity of held-out text, and right answers in five applications.

Of an encoder: the loss of held-out tokens that are hidden, or of labels, and how many are guessed right (of labels also
F1). Of an encoder-decoder: the loss of held-out targets, and BLEU of what it writes.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jaxllm.core import files
from jaxllm.core.command import command, parser
from jaxllm.data.world.tasks import APPLICATIONS

if TYPE_CHECKING:
    from rich.console import Console

TASKS = ("perplexity", *APPLICATIONS)
SPLITS = ("new_combinations", "pretrain_only", "novel")


@command
def main(argv: list[str] | None = None) -> int | None:
    """Evaluate a model, print a table, write results.json."""
    arguments = _parser().parse_args(argv)
    tasks = _choices("--tasks", arguments.tasks, TASKS) if arguments.tasks else []
    splits = _choices("--splits", arguments.splits, SPLITS)
    for flag, number in (("--n", arguments.n), ("--batch-size", arguments.batch_size)):
        if number < 1:
            raise ValueError(f"{flag} {number} must be at least 1")

    from rich.console import Console

    import jaxllm
    from jaxllm.evaluation.applications import evaluate_applications
    from jaxllm.locate import look
    from jaxllm.sharding import distributed

    distributed.start(distributed.PlatformConfig())
    config, found = look(arguments.model, encoders=tasks in ([], ["perplexity"]))  # refuses what continues no text
    from jaxllm import measure

    tasks = tasks or measure.usual_tasks(arguments.model, config, TASKS)
    model = jaxllm.load(found, text=True)
    measure.check_lengths(arguments, model, tasks, splits)
    results: dict[str, Any] = {"model": arguments.model}
    if "perplexity" in tasks:
        data = measure.data_config(arguments, model)
        found = measure.perplexity(model, data, arguments)
        results["perplexity"] = {"data": [source.path for source in data.sources], **found}
    if applications := [task for task in tasks if task != "perplexity"]:
        model.decoder.max_rows = arguments.batch_size
        results["applications"] = evaluate_applications(model, arguments.n, arguments.seed, splits, applications)
    show(results, Console())
    if arguments.out:
        files.write_json(arguments.out, results)
    return None


def _parser() -> argparse.ArgumentParser:
    result = parser(__doc__)
    add = result.add_argument
    add("model", metavar="MODEL", help="run directory, or one of its checkpoints")
    usual = "all for a model of the micro-world, else the first"
    add("--tasks", metavar="T,...", help=f"of {', '.join(TASKS)} (default: {usual})")
    add("--data", metavar="DATASET", help="dataset directory for perplexity (default: what the model was trained on)")
    add("--seq-len", metavar="T", type=int, help="row length with --data (default: the longest the model takes)")
    add(
        "--n", metavar="N", type=int, default=200, help="exercises per application and split, or targets (default: 200)"
    )
    add("--splits", metavar="S,...", default=SPLITS[0], help=f"of {', '.join(SPLITS)} (default: {SPLITS[0]})")
    add("--batch-size", metavar="B", type=int, default=64, help="rows that are computed together (default: 64)")
    add("--seed", metavar="N", type=int, default=0, help="which exercises are drawn")
    add("--out", metavar="FILE", help="write the results as JSON")
    return result


def _choices(flag: str, text: str, known: tuple[str, ...]) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in known]:
        raise ValueError(f"{flag} has {unknown[0]!r}, which does not exist; use any of {','.join(known)}")
    return chosen


def show(results: dict[str, Any], console: "Console") -> None:
    """Print the results as tables."""
    from rich.table import Table

    if "perplexity" in results:
        for line in _lines(results["perplexity"]):
            console.print(line, highlight=False, soft_wrap=True, markup=False)
    if "applications" not in results:
        return
    found = {split: results["applications"][split] for split in SPLITS if split in results["applications"]}
    table = Table("application", "task", *(split.replace("_", " ") for split in found))
    for application in dict.fromkeys(name for each in found.values() for name in each):
        entries = [each.get(application) for each in found.values()]
        cells = ["" if e is None else f"{e['fraction']:.1%} ({e['correct']}/{e['n']})" for e in entries]
        table.add_row(application, "", *cells, style="bold")
        for task in dict.fromkeys(task for e in entries if e for task in e["by_task"]):
            shares = [e["by_task"].get(task) if e else None for e in entries]
            table.add_row("", task, *("" if share is None else f"{share:.1%}" for share in shares))
    console.print(table)
    console.print(f"answered in {results['applications']['seconds']:.1f} s", highlight=False)


def _lines(values: dict[str, Any]) -> Iterator[str]:
    """Say what `measure.perplexity` has found."""
    nats, n = f"{values['nats_per_token']:.4f} nats", f"{values['tokens']:,.0f}"
    if "macro_f1" in values:
        yield f"{values['accuracy']:.1%} of {n} held-out texts right, macro-F1 {values['macro_f1']:.3f}, {nats}/text"
        yield "; ".join(f"{name} {value:.3f}" for name, value in values.items() if name.startswith("f1 "))
        return
    perplexity = f"{nats}/token, perplexity {values['perplexity']:,.2f}"
    if "bits_per_byte" not in values:
        yield f"{perplexity}, over {n} hidden tokens of validation text, {values['accuracy']:.1%} of them guessed right"
        return
    yield f"{perplexity}, {values['bits_per_byte']:.4f} bits/byte, over {n} tokens of validation text"
    if "kl" in values:
        yield (
            f"of which {values['reconstruction']:.4f} nats/token given the latent, and {values['kl']:.2f} nats of "
            f"latent per text; {values['active_units']:.0f} active units, {values['accuracy']:.1%} of tokens right"
        )
    if "bleu" in values:
        yield (
            f"BLEU {values['bleu']:.1f} of {values['pairs']} targets, {values['correct']} right to the letter "
            f"(sacrebleu {values['bleu_signature']})"
        )
        for source, right, written in values["examples"]:
            yield f"\n  {source}\n  {written}\n  (right: {right})"


if __name__ == "__main__":
    sys.exit(main())
