"""python -m jaxllm.inspect: what exactly is trained on: learned tokens green, context dim, provenance per segment."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.core.command import command

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
    for sample, row in zip(samples, describe.describe_samples(loader, samples, tok), strict=True):
        describe.show(row, f"sample {sample}", console)
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m jaxllm.inspect", description="Show what is trained on.", allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "path",
        metavar="DATASET_OR_RUN",
        help="dataset directory, or run directory (its own data, order and row length)",
    )
    add("--step", metavar="N", type=int, help="the batch of update N of a run, from 1")
    add("--rows", metavar="K", type=int, help="show at most K rows (default: 4, or the whole batch with --step)")
    add("--split", choices=("train", "validation"), default="train")
    add("--seq-len", metavar="T", type=int, help="row length for a dataset (default: 256)")
    return parser


def _data_config(arguments: argparse.Namespace) -> "DataConfig":
    """The data section of the run's recipe, or the dataset alone."""
    from jaxllm.data.loader import DataConfig, Source
    from jaxllm.data.packing import PackingConfig

    path = Path(arguments.path)
    if (path / "run.json").is_file():
        path = path / json.loads((path / "run.json").read_text(encoding="utf-8"))["model"]
    if (path / "recipe.yaml").is_file():
        if arguments.seq_len:
            raise ValueError(f"--seq-len is for datasets; the run {path} has its own row length")
        from jaxllm.recipe import load_recipe

        return load_recipe(path).data
    if arguments.step is not None:
        raise ValueError(f"--step needs a run directory, and {path} has no recipe.yaml; use --rows for a dataset")
    packing = PackingConfig(seq_len=arguments.seq_len or 256, long="drop")
    return DataConfig(sources=(Source(path=str(path)),), packing=packing, batch_size=1)


def _samples(arguments: argparse.Namespace, loader: "Loader") -> range:
    size = loader.config.batch_size
    first = 0 if arguments.step is None else (arguments.step - 1) * size
    if first < 0:
        raise ValueError(f"--step={arguments.step}: steps are counted from 1")
    count = arguments.rows or (size if arguments.step is not None else 4)
    return range(first, min(first + count, loader.n_samples) if loader.n_samples is not None else first + count)


if __name__ == "__main__":
    sys.exit(main())
