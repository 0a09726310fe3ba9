"""python -m jaxllm.plan: compile a recipe's training step for chips that are not here: memory, predicted step time.

usage: python -m jaxllm.plan RECIPE.yaml [key=value ...] --topology v5p:4x4x4

Needs the compiler of the chip: pip install 'jaxllm[plan]' for TPUs (v4, v5e, v5p, v6e), 'jaxllm[plan-cuda]' for one
node of GPUs (h100:8, h200:1), of which memory and collectives are told, and no times. Times are model estimates.
"""

import argparse
import sys
from pathlib import Path

from jaxllm.core import files
from jaxllm.core.command import command, parser


@command
def main(argv: list[str] | None = None) -> int | None:
    """Plan a recipe; the status is 1 if it does not fit."""
    arguments = _parser().parse_intermixed_args(argv)

    from jaxllm.planning import topology as topologies

    topologies.without_hardware()
    topology = topologies.parse(arguments.topology)

    from rich.console import Console

    from jaxllm.planning.aot import Job, abstract, compile_step
    from jaxllm.planning.report import plan_of, show
    from jaxllm.recipe import check, load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    devices = topologies.devices(topology)
    hosts = 1 + max(device.process_index for device in devices)
    check(recipe, vocab_size=recipe.model.vocab_size, n_devices=len(devices), n_processes=hosts)
    job = Job(
        recipe.model, recipe.compute, recipe.optim, recipe.step, recipe.mesh, recipe.data.batch_size,
        recipe.data.packing.seq_len,
    )  # fmt: skip
    plan = plan_of(job, topology, abstract(job, devices), compile_step(job, topology, devices))
    show(plan, Console(highlight=False))
    files.write_json(Path(arguments.out) / "plan.json", plan.model_dump(mode="json"))
    return 0 if plan.fits else 1


def _parser() -> argparse.ArgumentParser:
    result = parser(__doc__)
    add = result.add_argument
    add("recipe", metavar="RECIPE", help="recipe file, or a run directory")
    add("overrides", metavar="key=value", nargs="*", help="keys of the recipe to change")
    add("--topology", required=True, metavar="CHIP:SHAPE", help="such as v5p:4x4x4, 2*v5e:16x16, h200:8")
    add("--out", metavar="DIR", default="plan", help="where plan.json is written (default: plan)")
    return result


if __name__ == "__main__":
    sys.exit(main())
