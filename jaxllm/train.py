"""python -m jaxllm.train: pretrain a model, or continue a run."""

import sys

from jaxllm.core.command import command

USAGE = """usage: python -m jaxllm.train RECIPE.yaml [key=value ...]
       python -m jaxllm.train RUN_DIR [key=value ...]      resume a run

Trains as RECIPE says and writes the run directory `out`. A run that is already there is resumed from its newest
checkpoint. Ctrl-C saves and stops; a second Ctrl-C leaves at once.

  python -m jaxllm.train configs/pydocs/pretrain.yaml steps=2000 optim.lr=6e-4

keys:
"""


@command
def main(argv: list[str] | None = None) -> int | None:
    """Train as a recipe says."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & {*argv}:
        from jaxllm.core.schema import describe
        from jaxllm.recipe import Recipe

        sys.stdout.write(USAGE + describe(Recipe))
        return 0
    from jaxllm.recipe import load_recipe
    from jaxllm.wiring import train

    return train(load_recipe(argv[0], argv[1:])).status


if __name__ == "__main__":
    sys.exit(main())
