"""python -m jaxllm.train: pretrain a model, or continue a run.

usage: python -m jaxllm.train RECIPE.yaml [key=value ...]
       python -m jaxllm.train RUN_DIR [key=value ...]      resume a run
       python -m jaxllm.train RECIPE.yaml --check          look for mistakes, train nothing

Trains as RECIPE says and writes the run directory `out`. A run that is already there is resumed from its newest
checkpoint. Ctrl-C saves and stops; a second Ctrl-C leaves at once.

  python -m jaxllm.train configs/pydocs/pretrain.yaml steps=2000 optim.lr=6e-4

keys:
"""

import sys

from jaxllm.core.command import command


@command
def main(argv: list[str] | None = None) -> int | None:
    """Train as a recipe says."""
    from jaxllm.recipe import of_command_line

    argv = sys.argv[1:] if argv is None else argv
    recipe = of_command_line([each for each in argv if each != "--check"], __doc__)
    if recipe is None:
        return 0
    if "--check" in argv:
        from jaxllm.preflight import report

        return report(recipe)
    from jaxllm.wiring import train

    return train(recipe).status


if __name__ == "__main__":
    sys.exit(main())
