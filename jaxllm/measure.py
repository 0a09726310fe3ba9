"""What `evaluate` asks and measures: the usual tasks of a model, which data, the loss and what else there is beside it.

`arguments` are those of its command line.
"""

import functools
import sys
from argparse import Namespace
from collections.abc import Sequence
from typing import Any

import jax

from jaxllm.core.bucket import here
from jaxllm.data.loader import DataConfig, Loader
from jaxllm.data.tokenizers import tokenizer as tokenizers
from jaxllm.data.world.tasks import APPLICATIONS
from jaxllm.evaluation.applications import exercises
from jaxllm.evaluation.likelihood import evaluate_loss
from jaxllm.evaluation.pairs import evaluate_targets
from jaxllm.language_model import LanguageModel
from jaxllm.locate import is_huggingface, locate
from jaxllm.models.build import AnyConfig
from jaxllm.models.config import ModelConfig, is_vae
from jaxllm.models.encoder_config import Classes, EncoderConfig
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.recipe import knows_world, load_recipe, usual_objective
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.trained import Trained
from jaxllm.training.feed import place
from jaxllm.training.objectives import eval_metrics, eval_step
from jaxllm.training.state import param_shardings

LONGEST = 512  # tokens of a row of encoders, where nobody says: T5 would take 32,768


def usual_tasks(model: str, config: AnyConfig, known: Sequence[str]) -> list[str]:
    """Return what is asked if nobody says: all tasks that are known only of a model that was trained on their world."""
    if not isinstance(config, ModelConfig):
        return [known[0]]
    if knows_world(model) and not is_vae(config):
        return list(known)
    sys.stderr.write(
        "note: perplexity alone, because this model was not trained on the micro-world whose exercises the other tasks "
        f"are; --tasks {','.join(known)} asks them all\n"
    )
    return [known[0]]


def check_lengths(arguments: Namespace, model: LanguageModel, tasks: list[str], splits: list[str]) -> None:
    """Raise ValueError with the tasks whose prompts the model cannot take, and with those that remain."""
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


def data_config(arguments: Namespace, model: Trained) -> DataConfig:
    """The validation data: of --data, or of the run's own recipe."""
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


def perplexity(model: Trained, data: DataConfig, arguments: Namespace) -> dict[str, Any]:
    """Return a `Likelihood`, and what else is measured of models that do not continue text.

    That is `objectives.eval_metrics`, and of an encoder-decoder `pairs.evaluate_targets`; the loss of a VAE is a bound.
    """
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
