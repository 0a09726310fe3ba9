"""python -m jaxllm.evaluate: perplexity of held-out text, and right answers in five applications.

Of an encoder: the loss of held-out tokens that are hidden, or of labels, and how many are guessed right (of labels also
F1). Of an encoder-decoder: the loss of held-out targets, and BLEU of what it writes.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jaxllm.core import files
from jaxllm.core.bucket import here
from jaxllm.core.command import command, parser
from jaxllm.data.world_tasks import APPLICATIONS

if TYPE_CHECKING:
    from rich.console import Console

    from jaxllm.data.loader import DataConfig
    from jaxllm.huggingface import AnyLanguageModel
    from jaxllm.language_model import LanguageModel
    from jaxllm.models.build import AnyConfig
    from jaxllm.vae import VAE

TASKS = ("perplexity", *APPLICATIONS)
LONGEST = 512  # tokens of a row of encoders, where nobody says: T5 would take 32,768
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
    tasks = tasks or _usual(arguments.model, config)
    model = jaxllm.load(found)
    _check_lengths(arguments, model, tasks, splits)
    results: dict[str, Any] = {"model": arguments.model}
    if "perplexity" in tasks:
        data = _data_config(arguments, model)
        found = _perplexity(model, data, arguments)
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


def _usual(model: str, config: "AnyConfig") -> list[str]:
    """Return what is asked of a model if nobody says: the exercises only if it was trained on their world."""
    from jaxllm.models.config import ModelConfig, is_vae
    from jaxllm.recipe import knows_world

    if not isinstance(config, ModelConfig):
        return [TASKS[0]]
    if knows_world(model) and not is_vae(config):
        return list(TASKS)
    sys.stderr.write(
        "note: perplexity alone, because this model was not trained on the micro-world whose exercises the other tasks "
        f"are; --tasks {','.join(TASKS)} asks them all\n"
    )
    return [TASKS[0]]


def _check_lengths(arguments: argparse.Namespace, model: "LanguageModel", tasks: list[str], splits: list[str]) -> None:
    """Raise ValueError with the tasks whose prompts the model cannot take, and with those that remain."""
    from jaxllm.evaluation.applications import exercises

    longest: dict[str, int] = {}
    asked = exercises(arguments.n, arguments.seed, splits, [task for task in tasks if task in APPLICATIONS])
    for (_, task), examples in asked.items():
        lengths = [len(model.encode([{"role": "user", "content": example.prompt}])) for example in examples]
        longest[task] = max(longest.get(task, 0), *lengths)
    room = model.config.max_seq_len - 1
    if long := [task for task, length in longest.items() if length > room]:
        rest = ",".join(task for task in tasks if task not in long)
        raise ValueError(
            f"prompts of {', '.join(f'{task} (up to {longest[task]} tokens)' for task in long)} are longer than the "
            f"{room} tokens that {arguments.model} takes; {f'use --tasks {rest}' if rest else 'no task remains'}"
        )


def _data_config(arguments: argparse.Namespace, model: "AnyLanguageModel | VAE") -> "DataConfig":
    """The validation data: of --data, or of the run's own recipe."""
    import jax

    from jaxllm.data.loader import DataConfig
    from jaxllm.locate import is_huggingface, locate
    from jaxllm.models.config import is_vae
    from jaxllm.recipe import load_recipe, usual_objective

    if arguments.batch_size % jax.device_count():
        raise ValueError(
            f"--batch-size {arguments.batch_size} does not divide by {jax.device_count()} devices; use a multiple of it"
        )
    own = None if is_huggingface(arguments.model) else load_recipe(locate(arguments.model)[0]).data
    if arguments.data is None:
        if own is None:
            raise ValueError(
                f"{arguments.model} does not say what it was trained on; name a dataset with --data, prepared with "
                f"--tokenizer {arguments.model}"
            )
        data = own
        if not all((here(source.path) / "manifest.json").is_file() for source in data.sources):
            raise ValueError(
                f"the data that {arguments.model} was trained on is not here "
                f"({', '.join(source.path for source in data.sources)}); name a dataset with --data"
            )
        return data.model_copy(update={"batch_size": arguments.batch_size})
    longest = model.config.max_seq_len
    objective = usual_objective(model.config)
    if objective.kind != "next_token":
        longest = min(longest, LONGEST)
    if own is not None and own.objective.kind == objective.kind:
        objective = own.objective
    data = DataConfig.of(arguments.data, arguments.seq_len or longest, arguments.batch_size)
    packing = data.packing.model_copy(update={"whole": is_vae(model.config)})
    return data.model_copy(update={"packing": packing, "objective": objective})


def _perplexity(model: "AnyLanguageModel | VAE", data: "DataConfig", arguments: argparse.Namespace) -> dict[str, Any]:
    """Return a `Likelihood`, and what else is measured of models that do not continue text.

    That is `objectives.eval_metrics`, and of an encoder-decoder `pairs.evaluate_targets`; the loss of a VAE is a bound.
    """
    import functools

    import jax

    from jaxllm.data import tokenizer as tokenizers
    from jaxllm.data.loader import Loader
    from jaxllm.evaluation.likelihood import evaluate_loss
    from jaxllm.evaluation.pairs import evaluate_targets
    from jaxllm.models.encoder_config import Classes, EncoderConfig
    from jaxllm.models.seq2seq_config import Seq2SeqConfig
    from jaxllm.sharding.mesh import MeshConfig, make_mesh
    from jaxllm.training.feed import place
    from jaxllm.training.objectives import eval_metrics, eval_step
    from jaxllm.training.state import param_shardings

    loader = Loader(data, "validation")
    sys.stderr.writelines(f"{note}\n" for note in loader.notes())
    tokenizer = tokenizers.load(arguments.model)
    if loader.tokenizer_fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{data.sources[0].path} was tokenised with {loader.tokenizer_fingerprint}, the model has the tokenizer "
            f"{tokenizer.fingerprint}; prepare the data with --tokenizer MODEL"
        )
    mesh = make_mesh(MeshConfig(data=1, fsdp=-1))  # every device holds a part of the model and takes a part of the rows
    params = jax.device_put(model.params, param_shardings(model.config, mesh))
    how = {"model": model.config, "compute": model.compute, "texts_per_row": loader.texts_per_row}
    step = jax.jit(functools.partial(eval_step, **how))
    with jax.set_mesh(mesh):
        found, sums = evaluate_loss(loader, lambda batch: step(params, place(batch, mesh)), loader.bytes_per_token)
    found = found._asdict() | eval_metrics(sums, model.config)
    match model.config:
        case EncoderConfig(head=head):  # it tells a few tokens, or labels, and not the text
            left_out = ("bits_per_byte", *["perplexity"] * isinstance(head, Classes))
            return {name: value for name, value in found.items() if name not in left_out}
        case Seq2SeqConfig():
            model.decoder.max_rows = arguments.batch_size
            return found | evaluate_targets(model, [plan.sides for plan in loader.plans], tokenizer, arguments.n)
    return found


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
    """Say what `_perplexity` has found."""
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
        yield f"BLEU {values['bleu']:.1f} of {values['pairs']} targets, {values['correct']} right to the letter"
        for source, right, written in values["examples"]:
            yield f"\n  {source}\n  {written}\n  (right: {right})"


if __name__ == "__main__":
    sys.exit(main())
