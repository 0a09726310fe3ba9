"""python -m jaxllm.inspect: what exactly is trained on: learned tokens marked, context dim, provenance per segment."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.core import files
from jaxllm.core.command import command, parser
from jaxllm.core.wording import count

if TYPE_CHECKING:
    from jaxllm.data.loader import DataConfig, Loader


@command
def main(argv: list[str] | None = None) -> int | None:
    """Show rows of a dataset, or the batch of one step of a run."""
    arguments = _parser().parse_args(argv)

    from rich.console import Console

    from jaxllm.data import describe, tokenizer
    from jaxllm.data.loader import Loader

    loader = Loader(_data_config(arguments), arguments.split)
    samples = _samples(arguments, loader)
    tok = tokenizer.load(loader.tokenizer_dir)
    console = Console(highlight=False)
    describe.show_legend(console)
    for sample in samples:
        source, row = loader.locate(sample)
        describe.show(loader.plans[source], row, tok, f"sample {sample}", console, loader.row(sample))
    return None


def _parser() -> argparse.ArgumentParser:
    result = parser(__doc__)
    add = result.add_argument
    path = "dataset directory, or run directory (its own data, order and row length)"
    add("path", metavar="DATASET_OR_RUN", help=path)
    add("--step", metavar="N", type=int, help="the batch of update N of a run, from 1")
    add("--rows", metavar="K", type=int, help="show at most K rows (default: 4, or the whole batch with --step)")
    add("--split", choices=("train", "validation"), default="train")
    add("--seq-len", metavar="T", type=int, help="row length for a dataset (default: 256)")
    return result


def _run_dir(path: Path) -> Path | None:
    """Return the run directory that `path` is or names, if it does."""
    path = files.named_run(path)[0]
    return path if (path / "recipe.yaml").is_file() else None


def _data_config(arguments: argparse.Namespace) -> "DataConfig":
    """The data section of the run's recipe, or the dataset alone."""
    from jaxllm.data.loader import DataConfig

    path = Path(arguments.path)
    if run_dir := _run_dir(path):
        if arguments.seq_len:
            raise ValueError(f"--seq-len is for datasets; the run {run_dir} has its own row length")
        from jaxllm.recipe import load_recipe

        return load_recipe(run_dir).data
    if arguments.step is not None:
        raise ValueError(f"--step needs a run directory, and {path} has no recipe.yaml; use --rows for a dataset")
    return DataConfig.of(str(path), arguments.seq_len or 256, batch_size=1)


def _samples(arguments: argparse.Namespace, loader: "Loader") -> range:
    if arguments.rows is not None and arguments.rows < 1:
        raise ValueError(f"--rows={arguments.rows}: show at least one row")
    if arguments.step is None:
        first, size = 0, 4
    elif arguments.step < 1:
        raise ValueError(f"--step={arguments.step}: steps are counted from 1")
    else:
        first, size = _batch(_run_dir(Path(arguments.path)), arguments.step, loader)
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
