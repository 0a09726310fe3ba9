"""The recipe: everything that decides a run, in one typed tree. The only place that names every config."""

import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import Field

from jaxllm.core import config as configs
from jaxllm.core.config import Config, ConfigError, Duration
from jaxllm.core.files import misspelt, named_run, read_json
from jaxllm.core.schema import describe
from jaxllm.data.loader import DataConfig
from jaxllm.data.shards import read_manifest
from jaxllm.locate import look
from jaxllm.models import presets
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.sharding.config import BATCH_AXES, MeshConfig, axis_sizes, batch_parts
from jaxllm.sharding.distributed import PlatformConfig
from jaxllm.training.config import AdamW, CheckpointConfig, MonitorConfig, OptimConfig, StepConfig

FILE_NAME = "recipe.yaml"


class Recipe(Config):
    """A training run: pretraining, or instruction tuning of `start_from`."""

    out: str = Field(description="run directory; an existing run there is resumed")
    start_from: str | None = Field(
        None, description="model to start from (a run or Hugging Face directory); none = random weights"
    )
    seed: int = Field(0, ge=0, description="seed of initial weights and of sampled texts")
    steps: Duration = Field(Duration("1 epoch"), description='length: steps, "2e9 tokens" or "1 epoch"')
    model: ModelConfig = Field(description="architecture; `model.preset` names a published one")
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

    A model that is not described at all is the model of `start_from`. Without `vocab_size`, the vocabulary is that of
    the first dataset, or the preset's if there is no dataset yet.
    """
    model, start_from = raw.get("model") or {}, raw.get("start_from")
    if not isinstance(model, dict):
        return raw  # is refused in a moment, as every value of a wrong type
    if not model and isinstance(start_from, str) and start_from not in configs.NONE:
        model = look(start_from)[0].model_dump(mode="json")
    match raw:
        case {"data": {"sources": [{"path": str(path)}, *_]}} if "vocab_size" not in model:
            manifest = Path(path) / "manifest.json"
            vocabulary = {"vocab_size": read_manifest(path).vocab_size} if manifest.exists() else {}
            model = {**model, **vocabulary}
    if "preset" in model:
        preset = presets.raw(str(model["preset"]))
        model = configs.merge(preset, {key: value for key, value in model.items() if key != "preset"})
    return {**raw, "model": model}


def shipped(name: str) -> Path:
    """Return the path of a recipe that comes with jaxllm, such as "quickstart/pretrain.yaml"."""
    package = Path(__file__).parent
    return next(path for path in (package / "configs" / name, package.parent / "configs" / name) if path.exists())


def load_recipe(path: str | Path | None, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe file, or the resolved recipe of a run directory, with dotted overrides ("optim.lr=3e-4") on top.

    A run directory is `out` of its own recipe, wherever it was copied or moved to.
    """
    if path is not None and not Path(path).exists():
        raise ValueError(f"{path} does not exist{misspelt(Path(path)) or '; give a RECIPE.yaml or a RUN_DIR'}")
    if path is not None and Path(path).is_dir():
        if (manifest := Path(path) / "manifest.json").exists():
            chat = read_json(manifest)["kind"] == "chat"
            usual = "tune configs/own-text/tune.yaml" if chat else "train configs/own-text/pretrain.yaml"
            raise ValueError(
                f"{path} is a dataset, and no recipe or run; learn from it with a recipe, such as: "
                f"python -m jaxllm.{usual} data.sources.0.path={path}"
            )
        if not any(override.partition("=")[0].strip() == "out" for override in overrides):
            overrides = [f"out={json.dumps(str(path))}", *overrides]
        directory, path = Path(path), Path(path) / FILE_NAME
        if not path.exists():
            found = [*directory.glob("*.yaml"), *(recipe.parent for recipe in directory.glob(f"*/{FILE_NAME}"))]
            hint = f"; recipes and runs in it: {', '.join(map(str, sorted(found)))}" if found else ""
            raise ValueError(f"{directory} is no run directory (no {FILE_NAME}){hint}")
    return configs.load(Recipe, path, overrides, expand=_expand, commands={"inputs": "prepare"})


def knows_world(model: str | Path) -> bool:
    """Whether MODEL is a run, and the first text of one of its datasets, if it is still here, is of the micro-world."""
    run_dir, _ = named_run(Path(model))
    if not (run_dir / FILE_NAME).is_file():
        return False
    for source in load_recipe(run_dir).data.sources:
        with suppress(FileNotFoundError), open(Path(source.path) / "train/shard-00000.origins.jsonl", "rb") as file:
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
    if Path(argv[0]).is_dir() and not (Path(recipe.out) / FILE_NAME).exists():
        sys.stderr.write(f"note: {recipe.out} is a new run from the beginning; of {argv[0]} it has the recipe alone\n")
    return recipe


def check(recipe: Recipe, *, vocab_size: int, n_devices: int, n_processes: int = 1) -> None:
    """Raise one error with every contradiction between the parts of `recipe`, before anything is compiled.

    Args:
      vocab_size: ids of the datasets' tokenizer.
    """
    model, data, monitor = recipe.model, recipe.data, recipe.monitor
    rows, rest = divmod(data.batch_size, recipe.step.accumulate)
    sizes = axis_sizes(recipe.mesh, n_devices)
    parts, devices = batch_parts(sizes), n_devices // n_processes
    remedy = (
        f"set it to {vocab_size} or more" if recipe.start_from is None
        else f"prepare the data in the tokens of the model: --tokenizer {recipe.start_from}"
    )  # fmt: skip
    problems = [
        (model.vocab_size < vocab_size,
         f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {vocab_size}; {remedy}"),
        (data.packing.seq_len > model.max_seq_len,
         (f"data.packing.seq_len={data.packing.seq_len} is longer than model.max_seq_len={model.max_seq_len}; lower "
         "the first or raise the second")),
        (model.latent is not None and not data.packing.whole,
         "model.latent learns whole texts; set data.packing.whole=true"),
        (rest, f"data.batch_size={data.batch_size} is not divisible by step.accumulate={recipe.step.accumulate}"),
        (rows % parts and not rest,
         (f"data.batch_size / step.accumulate = {rows} rows is not divisible by {' x '.join(BATCH_AXES)} = {parts} "
         f"devices; use data.batch_size={-(-rows // parts) * parts * recipe.step.accumulate}, or another mesh")),
        (n_processes > 1 and devices % sizes["tensor"],
         (f"mesh.tensor={recipe.mesh.tensor} spans processes of {devices} devices each, and the rows of a batch cannot "
         "be shared by processes; set mesh.tensor to a divisor of that, and mesh.fsdp higher")),
        (monitor.prompts and monitor.sample_tokens >= model.max_seq_len,
         f"monitor.sample_tokens={monitor.sample_tokens} leaves no room for a prompt in {model.max_seq_len}"),
    ]  # fmt: skip
    if found := [text for wrong, text in problems if wrong]:
        raise ConfigError("the recipe contradicts itself:\n  " + "\n  ".join(found))
