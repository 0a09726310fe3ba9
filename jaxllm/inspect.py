"""python -m jaxllm.inspect: what exactly is trained on: learned tokens marked, context dim, provenance per segment.

<|user|> is a special token; text that spells one is shown as <\\|user|>.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.core import files
from jaxllm.core.bucket import here
from jaxllm.core.command import command, parser
from jaxllm.core.wording import count

if TYPE_CHECKING:
    import numpy as np

    from jaxllm.data.loader import DataConfig, Loader


@command
def main(argv: list[str] | None = None) -> int | None:
    """Show rows of a dataset, or the batch of one step of a run."""
    arguments = _parser().parse_args(argv)

    from rich.console import Console

    from jaxllm.data import describe
    from jaxllm.data.loader import Loader
    from jaxllm.data.tokenizers import tokenizer

    loader = Loader(_data_config(arguments), arguments.split)
    samples = _samples(arguments, loader)
    tok, console = tokenizer.load(loader.tokenizer_dir), Console(highlight=False)
    losses = _losses(arguments.path, loader, samples) if arguments.losses else dict.fromkeys(samples)
    if not arguments.json:
        describe.show_legend(console, arguments.losses)
    for sample, nats in losses.items():
        source, row = loader.locate(sample)
        plan, batch = loader.plans[source], loader.row(sample)
        if not arguments.json:
            describe.show(plan, row, tok, f"sample {sample}", console, batch, nats)
            continue
        for segment in describe.segments(plan, row, tok, batch, nats):
            record = {"sample": sample, "dataset": str(plan.dataset.directory), **segment.as_json()}
            print(json.dumps(record, ensure_ascii=False))
    return None


def _parser() -> argparse.ArgumentParser:
    result = parser(__doc__)
    add = result.add_argument
    path = "dataset directory, or run directory (its own data, order and row length)"
    add("path", metavar="DATASET_OR_RUN", help=path)
    add("--step", metavar="N", type=int, help="the batch of update N of a run, from 1")
    add("--rows", metavar="K", type=int, help="show at most K rows (default: 4, or the whole batch with --step)")
    add("--split", choices=("train", "validation"), default="train")
    add("--losses", action="store_true", help="nats of each token by the run's newest checkpoint, or RUN/checkpoints/K")
    add("--json", action="store_true", help="one object a line for each document: tokens as [text, learned, nats]")
    add("--seq-len", metavar="T", type=int, help="row length for a dataset (default: 256)")
    return result


def _run_dir(path: str | Path) -> Path | None:
    """Return the run directory that `path` is or names, if it does."""
    path = files.named_run(here(path))[0]
    return path if (path / "recipe.yaml").is_file() else None


def _data_config(arguments: argparse.Namespace) -> "DataConfig":
    """The data section of the run's recipe, or the dataset alone."""
    from jaxllm.data.loader import DataConfig

    path = here(arguments.path)
    if run_dir := _run_dir(path):
        if arguments.seq_len:
            raise ValueError(f"--seq-len is for datasets; the run {run_dir} has its own row length")
        from jaxllm.recipe import load_recipe

        return load_recipe(run_dir).data
    if not path.exists():
        hint = files.misspelt(path) or "; give a dataset, written by prepare, or a run directory"
        raise ValueError(f"{path} does not exist{hint}")
    if not (path / "manifest.json").exists():
        raise ValueError(f"{path} is no dataset (no manifest.json) and no run directory (no recipe.yaml)")
    if arguments.seq_len is not None and arguments.seq_len < 2:
        raise ValueError(f"--seq-len={arguments.seq_len}: a row has at least 2 tokens, one of which is learned")
    if arguments.step is not None:
        raise ValueError(f"--step needs a run directory, and {path} has no recipe.yaml; use --rows for a dataset")
    return DataConfig.of(str(path), arguments.seq_len or 256, batch_size=1)


def _losses(path: str, loader: "Loader", samples: range) -> "dict[int, np.ndarray]":
    """Return the nats [T] of each sample by the parameters of a checkpoint."""
    import functools

    import jax
    import numpy as np

    from jaxllm.core.batch import Batch
    from jaxllm.locate import locate
    from jaxllm.models.config import ModelConfig, is_vae
    from jaxllm.recipe import load_recipe
    from jaxllm.training.checkpoint import load_params
    from jaxllm.training.objectives import token_losses

    if _run_dir(path) is None:
        raise ValueError(f"--losses needs the model of a run, and {path} is a dataset; give RUN or RUN/checkpoints/K")
    run_dir, step = locate(path)
    recipe = load_recipe(run_dir)
    if not isinstance(recipe.model, ModelConfig) or is_vae(recipe.model):
        raise ValueError(f"{run_dir} does not predict the next token from those before alone; leave --losses out")
    compute = recipe.compute.elsewhere().resolve(jax.default_backend(), recipe.model.n_layers)
    params, meta = load_params(run_dir, recipe.model, step=step)
    sys.stderr.write(f"losses by the checkpoint of step {meta['step']}\n")
    nats = jax.jit(functools.partial(token_losses, model=recipe.model, compute=compute))
    one = lambda sample: Batch(*(array[None] for array in loader.row(sample)))
    return {sample: np.asarray(nats(params, one(sample))[0])[0] for sample in samples}


def _samples(arguments: argparse.Namespace, loader: "Loader") -> range:
    if arguments.rows is not None and arguments.rows < 1:
        raise ValueError(f"--rows={arguments.rows}: show at least one row")
    if arguments.step is None:
        return range(min(arguments.rows or 4, loader.samples_per_epoch))  # none twice
    if arguments.step < 1:
        raise ValueError(f"--step={arguments.step}: steps are counted from 1")
    first, size = _batch(_run_dir(arguments.path), arguments.step, loader)
    end = first + (arguments.rows or size)
    return range(first, end if loader.n_samples is None else min(end, loader.n_samples))


def _batch(run_dir: Path, step: int, loader: "Loader") -> tuple[int, int]:
    """Return (first sample, rows) of update `step`: as recorded, for earlier steps may have had another batch size, or
    else as the recipe has it.
    """
    from jaxllm.recipe import load_recipe
    from jaxllm.training.metrics import read
    from jaxllm.wiring import total_steps

    size = loader.config.batch_size
    starts = {record["step"]: record["sample"] for record in read(run_dir / "metrics.jsonl") if "sample" in record}
    if step in starts:
        return starts[step], starts.get(step + 1, starts[step] + size) - starts[step]
    done = max(starts, default=0)
    sample = starts[done] + size if done else 0
    if loader.split == "train" and step > (steps := total_steps(load_recipe(run_dir), loader, done, sample)):
        length = count(steps, "step")
        sys.stderr.write(f"note: step {step} is beyond the end of {run_dir}, which has {length}; this would follow\n")
    return sample + (step - done - 1) * size, size


if __name__ == "__main__":
    sys.exit(main())
