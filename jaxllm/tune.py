"""python -m jaxllm.tune: teach a pretrained model to follow instructions.

usage: python -m jaxllm.tune RECIPE.yaml [key=value ...]
       python -m jaxllm.tune RUN_DIR [key=value ...]       resume a run
       python -m jaxllm.tune RECIPE.yaml --check           look for mistakes, train nothing

Trains the model `start_from` on conversations (a dataset prepared with --chat): the loss is on the assistant's words
and on the token that ends them. The same recipe keys and the same loop as `train`.

  python -m jaxllm.tune configs/pydocs/tune.yaml start_from=runs/pydocs/pretrain

keys:
"""

import sys

from jaxllm.core.command import command


@command
def main(argv: list[str] | None = None) -> int | None:
    """Tune as a recipe says."""
    from jaxllm.recipe import of_command_line

    argv = sys.argv[1:] if argv is None else argv
    recipe = of_command_line([each for each in argv if each != "--check"], __doc__)
    if recipe is None:
        return 0
    from jaxllm.data.shards import read_manifest
    from jaxllm.wiring import train

    if recipe.start_from is None:
        raise ValueError(
            "start_from is not set; name the model to tune (start_from=runs/...), or use python -m jaxllm.train"
        )
    paths = [source.path for source in recipe.data.sources]
    if not any(read_manifest(path).kind == "chat" for path in paths):
        raise ValueError(
            f"no conversations in {' and '.join(paths)}: prepared as text; prepare conversations (--chat) for "
            "data.sources, or learn from text with python -m jaxllm.train"
        )
    if "--check" in argv:
        from jaxllm.preflight import report

        return report(recipe)
    return train(recipe, name="tune").status


if __name__ == "__main__":
    sys.exit(main())
