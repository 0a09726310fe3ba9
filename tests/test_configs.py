"""Every recipe in configs/ is valid, fits together with its neighbours, and builds without allocating anything."""

import functools
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxllm.core import config as configs
from jaxllm.core import files
from jaxllm.core.batch import Batch, LabelledTexts, TextPairs
from jaxllm.data.prepare_config import ExistingTokenizer, PrepareConfig
from jaxllm.huggingface import words_for
from jaxllm.layers.norms import LayerNorm
from jaxllm.models import presets
from jaxllm.models.build import abstract_params
from jaxllm.recipe import FILE_NAME, Recipe, check, load_recipe
from jaxllm.sharding.config import AXES
from jaxllm.training.optim import optimizer
from jaxllm.training.state import TrainState
from jaxllm.training.step import train_step

DIRECTORY = Path(__file__).parent.parent / "configs"
FILES = sorted(DIRECTORY.rglob("*.yaml"))
PREPARE = [file for file in FILES if "inputs" in configs.read(file)]
TRAINING = [file for file in FILES if file not in PREPARE]


def name(file: Path) -> str:
    return str(file.relative_to(DIRECTORY))


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`load_recipe` in a directory where the run that a recipe starts from has been recorded."""
    monkeypatch.chdir(tmp_path)

    def load(file: Path) -> Recipe:
        start_from = configs.read(file).get("start_from")
        if start_from is not None:
            before = [other for other in TRAINING if configs.read(other)["out"] == start_from]
            if before:
                files.write_text(Path(start_from) / FILE_NAME, configs.dump(load(before[0])))
            else:  # a model of others
                family, raw = words_for(presets.get("llama-15m"))
                files.write_json(Path(start_from) / "config.json", {"model_type": family.model_type, **raw})
        return load_recipe(file)

    return load


def step_shapes(recipe: Recipe) -> tuple[TrainState, TrainState, dict]:
    """States before and after one update, and its metrics, as shapes."""
    params = abstract_params(recipe.model)
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    ema = params if recipe.step.ema_decay is not None else None
    opt_state = jax.eval_shape(optimizer(recipe.optim).init, params)
    state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, opt_state, ema, scalar)
    shape = (recipe.data.batch_size, recipe.data.packing.seq_len)
    integers = jax.ShapeDtypeStruct(shape, jnp.int32)
    weights = jax.ShapeDtypeStruct(shape, jnp.float32)
    batch = Batch(integers, integers, weights, integers, integers)
    if recipe.data.objective.kind == "pairs":
        batch = TextPairs(integers, integers, integers, weights, integers)
    elif recipe.data.objective.kind == "labels":
        of_rows = lambda leaf: jax.ShapeDtypeStruct(leaf.shape[:1], leaf.dtype)
        batch = LabelledTexts(integers, integers, of_rows(integers), of_rows(weights))
    step = functools.partial(
        train_step, model=recipe.model, compute=recipe.compute.resolve("tpu", recipe.model.n_layers),
        optim=recipe.optim, step=recipe.step,
    )  # fmt: skip
    return state, *jax.eval_shape(step, state, batch, scalar)


@pytest.mark.parametrize("file", TRAINING, ids=name)
def test_training_recipe_builds(file, load):
    recipe = load(file)
    sizes = [getattr(recipe.mesh, axis) for axis in AXES]
    n_devices = 8 if -1 in sizes else math.prod(sizes)
    check(recipe, vocab_size=recipe.model.vocab_size, n_devices=n_devices)
    before, after, metrics = step_shapes(recipe)
    describe = functools.partial(jax.tree.map, lambda leaf: (leaf.shape, leaf.dtype))
    assert describe(after) == describe(before)
    assert metrics["loss"].shape == ()


@pytest.mark.parametrize("file", PREPARE, ids=name)
def test_prepare_recipe_is_valid(file):
    config = configs.load(PrepareConfig, file)
    if isinstance(config.tokenizer, ExistingTokenizer):
        made = [other for other in PREPARE if configs.read(other)["out"] == config.tokenizer.path]
        assert len(made) == 1, f"no recipe makes the tokenizer {config.tokenizer.path}"


@pytest.mark.parametrize("file", FILES, ids=name)
def test_the_first_line_says_what_it_is_for(file):
    assert re.match(r"# [A-Z].{20,}", file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", [file for file in TRAINING if file.parent.name != "quickstart"], ids=name)
def test_data_is_made_by_a_recipe_or_a_command_that_is_shown(file):
    shown = "".join(other.read_text(encoding="utf-8") for other in file.parent.glob("*.yaml"))
    made = {configs.read(other)["out"] for other in PREPARE} | set(re.findall(r"--out (\S+)", shown))
    for source in configs.read(file)["data"]["sources"]:
        assert source["path"] in made, f"nothing says how to make {source['path']}"


def test_the_7b_run_may_move_between_machines(load):
    machines = {file.name: load(file) for file in TRAINING if file.match("llama2-7b/*-pretrain.yaml")}
    assert len(machines) == 5
    # A single H200 has no room for float32 moments beside two copies of the gradients: from there it may not.
    alone = machines["1xh200-pretrain.yaml"]
    exact = alone.optim.model_copy(update={"moments": "float32"})
    machines["1xh200-pretrain.yaml"] = alone.model_copy(update={"optim": exact})
    first = machines["v5p-pretrain.yaml"]
    for recipe in machines.values():
        moved = recipe.model_copy(update={key: getattr(first, key) for key in ("mesh", "platform", "compute")})
        step = recipe.step.model_copy(update={"accumulate": first.step.accumulate})
        assert moved.model_copy(update={"step": step}) == first


def test_a_preset_is_changed_key_by_key():
    overrides = ["out=x", "data.sources.0.path=y", "model.preset=gpt2-124m", "model.norm.eps=1e-6"]
    assert load_recipe(None, overrides).model.norm == LayerNorm(eps=1e-6)


@pytest.mark.parametrize("wrong", ["model=tiny", "data=3", "data.sources=3", "data.sources=[a]", "start_from={a: b}"])
def test_a_recipe_of_the_wrong_shape_is_refused(wrong):
    with pytest.raises(configs.ConfigError, match=re.escape(wrong.partition("=")[0])):
        load_recipe(None, ["out=x", wrong])
