"""python -m jaxllm.plan: compile a training step for chips that are not here: memory, predicted time, the best layout.

  python -m jaxllm.plan configs/llama2-7b/v5p-pretrain.yaml --topology v5p:4x4x4 --search

Needs the compiler of the chip: pip install 'jaxllm[plan]' for TPUs (v4, v5e, v5p, v6e), 'jaxllm[plan-cuda]' for one
node of GPUs (h100:8, h200:1), of which memory and collectives are told, and no times. Times are model estimates. The
status is 1 if nothing fits.
"""

import argparse
import os
import re
import sys

from jaxllm.core import files
from jaxllm.core.command import command, parser


@command
def main(argv: list[str] | None = None) -> int | None:
    """Plan a recipe, or look for the best layout of its mesh."""
    arguments = _parser().parse_intermixed_args(argv)

    from jaxllm.planning import topology as topologies

    place = topologies.parse(arguments.topology)
    topologies.without_hardware()

    from rich.console import Console

    from jaxllm.core import config
    from jaxllm.planning import decoding, search
    from jaxllm.planning.aot import Job, check_model
    from jaxllm.planning.report import show, show_ranking
    from jaxllm.recipe import check, load_recipe

    recipe, console = load_recipe(arguments.recipe, arguments.overrides), Console(highlight=False, soft_wrap=True)
    check_model(recipe.model)
    data, out = recipe.data, arguments.out
    parts = recipe.model, recipe.compute, recipe.optim, recipe.step, recipe.mesh
    job, devices = Job(*parts, data.batch_size, data.packing.seq_len), topologies.devices(place)
    if arguments.decode:
        rows, slots = arguments.decode
        plan = decoding.plan_decoding(recipe.model, recipe.compute.elsewhere(), place, rows, slots)
        decoding.show(plan, console)
        files.write_json(f"{out}/plan.json", plan.model_dump(mode="json"))
        return 0 if plan.needed is not None else 1

    def contradictions(job: Job) -> None:
        own = recipe.model_copy(update={"mesh": job.mesh, "compute": job.compute, "step": job.step})
        check(own, vocab_size=recipe.model.vocab_size, n_devices=len(devices))

    if arguments.search:
        found = search.search(job, place, contradictions, arguments.tries, arguments.jobs, console.print)
        show_ranking([plan for _, plan in found], console)
    else:
        contradictions(job)
        console.print("compiling: one to two minutes of two cores for a large model")
        plan = search.make_plan(job, place)
        show(plan, console)
        if not plan.fits:
            console.print("looking for the nearest layout that fits: up to three are compiled")
        found = [(job, plan)] if plan.fits else search.nearest(job, plan, place, contradictions)
    if found and (changed := search.changes(job, found[0][0])):
        console.print(f"{'the best' if arguments.search else 'the nearest that fits'}: {' '.join(changed)}")
        recipe = load_recipe(arguments.recipe, [*arguments.overrides, *changed])
    files.write_json(f"{out}/plan.json", [each.model_dump(mode="json") for _, each in found])
    if not found:
        console.print(f"no other layout was found that fits {place}; {search.least(job, place)}")
    else:
        files.write_text(f"{out}/recipe.yaml", config.dump(recipe))
        console.print(f"written: {out}/recipe.yaml, {out}/plan.json")
    return 0 if found else 1


def _parser() -> argparse.ArgumentParser:
    result = parser(__doc__)
    add = result.add_argument
    add("recipe", metavar="RECIPE", help="recipe file, or a run directory")
    add("overrides", metavar="key=value", nargs="*", help="keys of the recipe to change")
    add("--topology", required=True, metavar="CHIP:SHAPE", help="such as v5p:4x4x4, 2*v5e:16x16, h200:8")
    add(
        "--search",
        action="store_true",
        help="try other meshes (devices that share rows too), rematerialisation and microbatches",
    )
    said = "plan decoding instead: rows at one time, tokens of each, as 8x4096"
    add("--decode", metavar="ROWSxTOKENS", type=_decoded, help=said)
    add("--tries", metavar="N", type=int, default=12, help="of a search, how many are compiled (default: 12)")
    cores = max(1, (os.cpu_count() or 1) // 2)
    add("--jobs", metavar="N", type=int, default=cores, help="compilations at one time (default: half of the cores)")
    add("--out", metavar="DIR", default="plan", help="for plan.json and recipe.yaml (default: plan)")
    return result


def _decoded(text: str) -> tuple[int, int]:
    """Read "8x4096", rows and tokens of each."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r}: write ROWSxTOKENS, rows at one time and tokens of each, as 8x4096")
    return int(match[1]), int(match[2])


if __name__ == "__main__":
    sys.exit(main())
