"""The recipe: everything that decides a run, in one typed tree. The only place that names every config."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag

from jaxllm.core import config as configs
from jaxllm.core.bucket import here, named
from jaxllm.core.config import Config, ConfigError, Duration
from jaxllm.core.files import misspelt, named_run, read_json
from jaxllm.core.schema import describe
from jaxllm.data.loader import DataConfig
from jaxllm.data.objectives import HiddenTokens, Labels, NextToken, Objective, Pairs
from jaxllm.data.shards import read_manifest
from jaxllm.layers.config import Experts, RelativeBias
from jaxllm.locate import look
from jaxllm.models import presets
from jaxllm.models.config import ComputeConfig, ModelConfig, Pipeline, is_vae
from jaxllm.models.encoder_config import Classes, EncoderConfig, MaskedLM
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.sharding.config import ROW_AXES, MeshConfig, axis_sizes, batch_parts
from jaxllm.sharding.distributed import PlatformConfig
from jaxllm.training.config import AdamW, CheckpointConfig, Elbo, MonitorConfig, OptimConfig, StepConfig

FILE_NAME = "recipe.yaml"
KINDS = {ModelConfig: "decoder-only", EncoderConfig: "encoder-only", Seq2SeqConfig: "encoder-decoder"}
HALVES = ("encoder", "decoder")


def _kind(model: Any) -> str:
    """Say what a model is, by its type or its fields: an encoder has a `stack`, an encoder-decoder two halves."""
    if not isinstance(model, Mapping):
        return KINDS.get(type(model), "decoder-only")
    words = {"encoder-only": ("stack", "head"), "encoder-decoder": (*HALVES, "both")}
    return next((kind for kind, own in words.items() if {*own} & {*model}), "decoder-only")


AnyModelConfig = Annotated[
    Annotated[ModelConfig, Tag("decoder-only")] | Annotated[EncoderConfig, Tag("encoder-only")]
    | Annotated[Seq2SeqConfig, Tag("encoder-decoder")],
    Discriminator(_kind),
]  # fmt: skip


class Recipe(Config):
    """A training run: pretraining, or instruction tuning of `start_from`."""

    out: str = Field(description="run directory; an existing run there is resumed")
    start_from: str | None = Field(
        None, description="model to start from (a run or Hugging Face directory); none = random weights"
    )
    seed: int = Field(0, ge=0, description="seed of initial weights and of sampled texts")
    steps: Duration = Field(Duration("1 epoch"), description='length: steps, "2e9 tokens" or "1 epoch"')
    model: AnyModelConfig = Field(
        description="architecture; `model.preset` names a published one, `model.both` is of encoder and decoder"
    )
    data: DataConfig = Field(description="what to train on")
    optim: OptimConfig = Field(AdamW(), description="optimizer and learning rate")
    step: StepConfig = Field(StepConfig(), description="accumulation, z-loss, moving average, spike guard")
    compute: ComputeConfig = Field(ComputeConfig(), description="precision and memory")
    mesh: MeshConfig = Field(MeshConfig(), description="devices")
    platform: PlatformConfig = Field(PlatformConfig(), description="start-up of JAX")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="when to save, what to keep")
    monitor: MonitorConfig = Field(MonitorConfig(), description="logging, validation, samples")


def _expand(raw: dict[str, Any]) -> dict[str, Any]:
    """Replace `model: {preset: NAME, field: value}` by the preset's fields with the given ones on top.

    A model that is not described at all, or by its `head` alone, is the model of `start_from`. Without `vocab_size`,
    the vocabulary is that of the first dataset, or the preset's if there is no dataset yet. `both` is what the two
    halves of an encoder-decoder have in common.
    """
    model, start_from = raw.get("model") or {}, raw.get("start_from")
    if not isinstance(model, dict):
        return raw  # is refused in a moment, as every value of a wrong type
    if not {*model} - {"head"} and isinstance(start_from, str) and start_from not in configs.NONE:
        model = configs.merge(look(start_from, encoders=True)[0].model_dump(mode="json"), model)
    both = model.get("both")
    if isinstance(both, Mapping):
        own = {half: model.get(half) or {} for half in HALVES}
        if all(isinstance(each, Mapping) for each in own.values()):
            halves = {half: configs.merge(both, each) for half, each in own.items()}
            model = {key: value for key, value in model.items() if key != "both"} | halves
    match raw:
        case {"data": {"sources": [{"path": str(path)}, *_]}} if (here(path) / "manifest.json").exists():
            model = _with_vocabulary(model, read_manifest(path).vocab_size)
    if "preset" in model:
        preset = presets.raw(str(model["preset"]))
        if (kind := _kind(model)) != "decoder-only":
            raise ConfigError(
                f"model.preset={model['preset']} is decoder-only, and {', '.join(sorted({*model} - {'preset'}))} of "
                f"`model` in this recipe are {kind}; leave the preset out, or take a recipe of a decoder"
            )
        model = configs.merge(preset, {key: value for key, value in model.items() if key != "preset"})
    return {**raw, "model": model}


def _with_vocabulary(model: dict[str, Any], size: int) -> dict[str, Any]:
    """Return the fields of a model with the vocabulary of its data, where they say none; encoders have a mask more."""
    match _kind(model):
        case "encoder-only":
            sizes = {"stack": {"vocab_size": size + 1}}
        case "encoder-decoder":
            sizes = {half: {"vocab_size": size} for half in HALVES}
        case _:
            sizes = {"vocab_size": size}
    return configs.merge(sizes, model)


def shipped(name: str) -> Path:
    """Return the path of a recipe that comes with jaxllm, such as "quickstart/pretrain.yaml"."""
    package = Path(__file__).parent
    return next(path for path in (package / "configs" / name, package.parent / "configs" / name) if path.exists())


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or the resolved recipe of a run directory, with dotted overrides ("optim.lr=3e-4") on top.

    A run directory is `out` of its own recipe, wherever it was copied or moved to.
    """
    path = None if path is None else here(path)
    given = None if path is None else named(path)
    if path is not None and not path.exists():
        raise ValueError(f"{given} does not exist{misspelt(path) or '; give a RECIPE.yaml or a RUN_DIR'}")
    if path is not None and path.is_dir():
        if (manifest := path / "manifest.json").exists():
            chat = read_json(manifest)["kind"] == "chat"
            usual = "tune configs/own-text/tune.yaml" if chat else "train configs/own-text/pretrain.yaml"
            raise ValueError(
                f"{given} is a dataset, and no recipe or run; learn from it with a recipe, such as: "
                f"python -m jaxllm.{usual} data.sources.0.path={given}"
            )
        if not any(override.partition("=")[0].strip() == "out" for override in overrides):
            overrides = [f"out={json.dumps(given)}", *overrides]
        directory, path = path, path / FILE_NAME
        if not path.exists():
            found = [*directory.glob("*.yaml"), *(recipe.parent for recipe in directory.glob(f"*/{FILE_NAME}"))]
            hint = f"; recipes and runs in it: {', '.join(map(str, sorted(found)))}" if found else ""
            raise ValueError(f"{given} is no run directory (no {FILE_NAME}){hint}")
    ways = {"model": "model.preset=NAME (such as llama-3m)"}
    return configs.load(Recipe, path, overrides, expand=_expand, commands={"inputs": "prepare"}, ways=ways)


def knows_world(model: str | Path) -> bool:
    """Whether MODEL is a run, and the first text of one of its datasets, if it is still here, is of the micro-world."""
    run_dir, _ = named_run(here(model))
    if not (run_dir / FILE_NAME).is_file():
        return False
    for source in load_recipe(run_dir).data.sources:
        with suppress(FileNotFoundError), open(here(source.path) / "train/shard-00000.origins.jsonl", "rb") as file:
            if file.readline().startswith(b'{"source": "world"'):
                return True
    return False


def of_command_line(argv: Sequence[str] | None, usage: str) -> Recipe | None:
    """Return the recipe that RECIPE.yaml or RUN_DIR and key=value ... say; None: `usage` and all keys are printed.

    Raises:
      ValueError: nothing is given, or no such recipe.
    """
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & {*argv}:
        sys.stdout.write(usage + describe(Recipe))
        return None
    if not argv:
        raise ValueError(f"no recipe and no run is given\n{usage.split(chr(10) * 2)[1]}\n--help lists all keys")
    recipe = load_recipe(argv[0], argv[1:])
    if here(argv[0]).is_dir() and not (here(recipe.out) / FILE_NAME).exists():
        sys.stderr.write(f"note: {recipe.out} is a new run from the beginning; of {argv[0]} it has the recipe alone\n")
    return recipe


def changes(before: Recipe, now: Recipe) -> list[str]:
    """Return "key=value (was value)" of what differs; the run directory is no part of a run."""
    old, new = (_leaves(each.model_dump(mode="json", exclude={"out"})) for each in (before, now))
    keys = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return [f"{key}={_said(new.get(key))} (was {_said(old.get(key))})" for key in keys]


def _leaves(tree: Any, key: str = "") -> dict[str, Any]:
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    below = [_leaves(value, f"{key}.{name}".lstrip(".")) for name, value in items]
    return {name: value for each in below for name, value in each.items()} or {key: tree}


_said = lambda value: "none" if value is None else value


def usual_objective(model: AnyModelConfig) -> Objective:
    """Return what a kind of model learns, where nobody says more."""
    match model:
        case Seq2SeqConfig():
            return Pairs()
        case EncoderConfig(head=Classes(labels=labels)) if len(labels) > 1:
            return Labels(labels=labels)
        case EncoderConfig(head=MaskedLM()):
            return HiddenTokens()
        case EncoderConfig():
            raise ValueError("this encoder has no masked language model and no labels, so there is nothing to measure")
    return NextToken()


def _objective_problems(recipe: Recipe) -> Iterator[tuple[bool, str]]:
    """Yield what `data.objective` and the kind of the model have to say against each other, and whether they do."""
    model, given = recipe.model, recipe.data.objective
    needed = {"encoder-decoder": "pairs", "decoder-only": "next_token"}.get(_kind(model))
    if isinstance(model, EncoderConfig):
        needed = {"masked_lm": "masked", "classes": "labels"}.get(model.head.kind)
        yield needed is None, "model.head.kind=embeddings learns nothing here; take masked_lm or classes"
    yield (
        needed not in (None, given.kind),
        f"data.objective.kind={given.kind} is not for this model, which is {_kind(model)}; set it to {needed}",
    )
    if needed == given.kind == "labels":
        head = model.head
        yield (
            given.labels != head.labels,
            f"data.objective.labels={list(given.labels)} are not model.head.labels={list(head.labels)}",
        )
        yield head.problem != "single_label_classification", f"model.head.problem={head.problem} has no loss here"
        yield recipe.step.z_loss > 0, "step.z_loss is for tokens, and not for labels; set it to 0"


def _context_problems(recipe: Recipe, context: int) -> Iterator[tuple[bool, str]]:
    """Yield what speaks against rows that `context` devices share, and whether it does."""
    model, length = recipe.model, recipe.data.packing.seq_len
    if context == 1:
        return
    plain = isinstance(model, ModelConfig) and not is_vae(model) and not isinstance(model.positions, RelativeBias)
    kinds = "decoder-only models without a bias on scores (positions.kind=relative) and without `latent`"
    yield not plain, f"mesh.context={context} is for {kinds}; set it to 1"
    multiples = f"a multiple of {2 * context}, or of {256 * context} for the kernel of TPUs"
    yield length % (2 * context), f"data.packing.seq_len={length} for mesh.context={context} must be {multiples}"


def _pipeline_problem(recipe: Recipe, sizes: Mapping[str, int], rows: int) -> str | None:
    """Say why the layers or the rows of a microbatch cannot be dealt out to the stages of the mesh."""
    model, stages = recipe.model, sizes["stage"]
    if stages == 1:
        unused = recipe.compute.pipeline != Pipeline()
        return "compute.pipeline is for mesh.stage, which is 1; leave one out or set the other" if unused else None
    stacks = {"model": model.stack if isinstance(model, EncoderConfig) else model}
    if isinstance(model, Seq2SeqConfig):
        stacks = {"model.encoder": model.encoder, "model.decoder": model.decoder}
    depths = {name: len(stack.stacks()[-1].layers) for name, stack in stacks.items()}
    depths |= {"model.latent": model.latent.encoder_layers} if is_vae(model) else {}
    for name, layers in depths.items():
        try:
            recipe.compute.pipeline.check(stages, layers, rows, batch_parts(sizes) // stages)
        except ValueError as error:
            return f"{name}: {error}"
    return None


def check(recipe: Recipe, *, vocab_size: int, n_devices: int) -> None:
    """Raise one error with every contradiction between the parts of `recipe`, before anything is compiled.

    Args:
      vocab_size: ids of the datasets' tokenizer.
    """
    model, data, monitor, elbo = recipe.model, recipe.data, recipe.monitor, recipe.step.elbo
    experts = ffn if isinstance(ffn := getattr(model, "ffn", None), Experts) else None
    rows, rest = divmod(data.batch_size, recipe.step.accumulate)
    sizes = axis_sizes(recipe.mesh, n_devices)
    parts = batch_parts(sizes)
    fewer = [number for number in range(1, recipe.step.accumulate) if data.batch_size % (number * parts) == 0]
    halves = [model.encoder, model.decoder] if isinstance(model, Seq2SeqConfig) else [model]
    longest = min(half.max_seq_len for half in halves)
    remedy = (
        f"set it to {vocab_size} or more" if recipe.start_from is None
        else f"prepare the data in the tokens of the model: --tokenizer {recipe.start_from}"
    )  # fmt: skip
    problems = [
        (model.vocab_size < vocab_size,
         f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {vocab_size}; {remedy}"),
        (data.packing.seq_len > longest,
         (f"data.packing.seq_len={data.packing.seq_len} is longer than model.max_seq_len={longest}; lower "
         "the first or raise the second")),
        (is_vae(model) and not data.packing.whole, "model.latent learns whole texts; set data.packing.whole=true"),
        (is_vae(model) and recipe.step.label_smoothing > 0,
         "step.label_smoothing: the loss of a VAE is a bound, which has no room for it; set it to 0"),
        *_objective_problems(recipe),
        (not is_vae(model) and elbo != Elbo(),
         "step.elbo is for a VAE, and model.latent is not set; leave one out or set the other"),
        (elbo.period and elbo.period < elbo.warmup,
         (f"step.elbo.period={elbo.period} ends before step.elbo.warmup={elbo.warmup}, so that the KL term never has "
          "its whole weight; lower the second")),
        (experts and experts.top_k == 1 and experts.renormalise,
         ("model.ffn.top_k=1 with renormalise makes every weight 1, so that the loss teaches the router nothing; set "
          "model.ffn.renormalise=false")),
        (not (experts and experts.biased) and recipe.step.router_bias_step != StepConfig().router_bias_step,
         "step.router_bias_step is for model.ffn.biased, which is not set; leave one out or set the other"),
        (rest, f"data.batch_size={data.batch_size} is not divisible by step.accumulate={recipe.step.accumulate}"),
        (rows % parts and not rest,
         (f"data.batch_size / step.accumulate = {rows} rows is not divisible by {' x '.join(ROW_AXES)} = {parts} "
         f"devices; use {f'step.accumulate={fewer[-1]}, ' if fewer else ''}data.batch_size="
          f"{-(-rows // parts) * parts * recipe.step.accumulate}, or another mesh")),
        (pipeline := _pipeline_problem(recipe, sizes, rows), pipeline),
        *_context_problems(recipe, sizes["context"]),
        (monitor.prompts and monitor.sample_tokens >= model.max_seq_len and not isinstance(model, EncoderConfig),
         f"monitor.sample_tokens={monitor.sample_tokens} leaves no room for a prompt in {model.max_seq_len}"),
    ]  # fmt: skip
    if found := [text for wrong, text in problems if wrong]:
        raise ConfigError("the recipe contradicts itself:\n  " + "\n  ".join(found))
