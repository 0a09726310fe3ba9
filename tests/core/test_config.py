"""What is typed arrives with the schema's type, and what is written is read back."""

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, ValidationError

from jaxllm.core.config import NONE, Config, Duration, dump, load, merge


class Constant(Config):
    """No change."""

    kind: Literal["none"] = "none"


class Cosine(Config):
    """Half a cosine."""

    kind: Literal["cosine"] = "cosine"
    warmup: int = Field(100, ge=0, description="steps of warm-up")


Schedule = Annotated[Constant | Cosine, Field(discriminator="kind")]


class AdamW(Config):
    """Adam with decay. Source: a paper."""

    kind: Literal["adamw"] = "adamw"
    lr: float = Field(3e-4, gt=0, description="peak learning rate")
    clip: float | None = Field(1.0, gt=0, description="largest norm")
    schedule: Schedule = Field(Cosine(warmup=7), description="learning rate over the steps")


class Muon(Config):
    """Muon."""

    kind: Literal["muon"] = "muon"
    lr: float = Field(3e-3, gt=0, description="peak learning rate")
    momentum: float = Field(0.95, ge=0, lt=1, description="decay of the momentum")


class Source(Config):
    """One dataset."""

    path: str = Field(description="directory")
    weight: float = Field(1.0, gt=0, description="share")


class Model(Config):
    """A model."""

    width: int = Field(64, ge=1, description="model width")
    heads: int = Field(4, ge=1, description="number of heads")


class Run(Config):
    """A run."""

    out: str = Field("run", description="directory")
    parent: str | None = Field(None, description="run to start from")
    steps: Duration = Field(Duration("1 epoch"), description="length")
    remat: Literal["none", "full"] = Field("full", description="what to recompute")
    verify: bool = Field(True, description="compare checksums")
    profile: tuple[int, int] | None = Field(None, description="first and last step")
    prompts: tuple[str, ...] = Field((), description="texts")
    sizes: dict[str, int] = Field({}, description="sizes by name")
    model: Model = Field(Model(), description="architecture")
    optim: Annotated[AdamW | Muon, Field(discriminator="kind")] = Field(AdamW(lr=1e-3), description="optimizer")
    sources: tuple[Source, ...] = Field((), description="datasets")


def file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optim.lr=3e-4", "optim.lr", 3e-4),
        ("optim.clip=none", "optim.clip", None),
        ("optim.clip=null", "optim.clip", None),
        ("optim.schedule.kind=none", "optim.schedule", Constant()),
        ("verify=false", "verify", False),
        ("verify=False", "verify", False),
        ("remat=none", "remat", "none"),
        ("parent=none", "parent", None),
        ("out=2024", "out", "2024"),
        ("out=1e-3", "out", "1e-3"),
        ("out=true", "out", "true"),
        ("out=2024-01-02", "out", "2024-01-02"),
        ("out=a: b #c", "out", "a: b #c"),
        ("out='quoted'", "out", "quoted"),
        ("out=[x", "out", "[x"),
        ("out==", "out", "="),
        ("out=", "out", ""),
        ("profile=[10, 20]", "profile", (10, 20)),
        ("prompts=['1', 'b: c', none, 2]", "prompts", ("1", "b: c", "none", "2")),
        ("prompts.0=x", "prompts", ("x",)),
        ("sizes={a: 1}", "sizes", {"a": 1}),
        ("sizes.a=1", "sizes", {"a": 1}),
        ("sources.0.path=7", "sources", (Source(path="7"),)),
        ("model={width: 8}", "model", Model(width=8)),
        ("optim={kind: muon, lr: 1}", "optim", Muon(lr=1.0)),
        ("steps=2e9 tokens", "steps", Duration("2e9 tokens")),
    ],
)
def test_override_has_the_type_of_the_schema(override, key, value):
    found = load(Run, overrides=[override])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_file_and_overrides_are_merged(tmp_path):
    path = file(tmp_path, "optim: {lr: 3e-4}\nsources:\n- {path: a}\nmodel:\n")
    config = load(Run, path, ["sources.0.weight=2", "sources.1.path=b", "optim.schedule.warmup=9"])
    assert config.optim == AdamW(lr=3e-4, schedule=Cosine(warmup=9))
    assert config.sources == (Source(path="a", weight=2.0), Source(path="b"))
    assert config.model == Model()


def test_part_of_a_section_keeps_the_rest_of_its_default():
    assert load(Run, overrides=["optim.clip=2"]).optim == AdamW(lr=1e-3, clip=2.0)


def test_kind_starts_a_section_afresh_wherever_it_stands(tmp_path):
    path = file(tmp_path, "optim: {kind: adamw, lr: 1, clip: 3}\n")
    assert load(Run, path, ["optim.momentum=0.5", "optim.kind=muon"]).optim == Muon(momentum=0.5)
    assert load(Run, path, ["optim.kind=adamw"]).optim == AdamW(lr=1.0, clip=3.0)


def test_none_means_null_where_that_is_allowed(tmp_path):
    config = load(Run, file(tmp_path, "profile: none\nremat: none\nparent: null\noptim: {schedule: {kind: none}}\n"))
    assert (config.profile, config.remat, config.parent) == (None, "none", None)
    assert config.optim.schedule == Constant()


def test_a_value_in_a_file_has_the_type_of_the_schema(tmp_path):
    base = "shared: &base {weight: 3e-4}\n"
    config = load(
        Run,
        file(tmp_path, base + "out: 2024\nverify: no\nsteps: 1e4\noptim:\nsources: [{path: 010, <<: *base}]\n"),
        expand=lambda raw: {key: value for key, value in raw.items() if key != "shared"},
    )
    assert config == Run(out="2024", verify=False, steps=Duration(10000), sources=(Source(path="010", weight=3e-4),))


def test_expand_sees_file_and_overrides_and_may_use_presets(tmp_path):
    presets = {"wide": {"width": 512, "heads": 8}}

    def expand(raw):
        model = dict(raw.get("model") or {})
        return {**raw, "model": merge(presets[model.pop("preset")], model)} if "preset" in model else raw

    path = file(tmp_path, "model: {preset: wide, heads: 4}\n")
    assert load(Run, path, expand=expand).model == Model(width=512, heads=4)
    assert load(Run, None, ["model.preset=wide", "model.width=16"], expand).model == Model(width=16, heads=8)
    assert presets == {"wide": {"width": 512, "heads": 8}}


def test_merge_is_deep_and_another_kind_replaces():
    base = {"norm": {"kind": "layer", "eps": 1}, "x": {"a": 1, "b": 2}}
    assert merge(base, {"norm": {"eps": 2}, "x": {"b": 3}}) == {
        "norm": {"kind": "layer", "eps": 2},
        "x": {"a": 1, "b": 3},
    }
    assert merge(base, {"norm": {"kind": "rms"}})["norm"] == {"kind": "rms"}
    assert base["norm"] == {"kind": "layer", "eps": 1}


def test_empty_file_is_all_defaults(tmp_path):
    assert load(Run, file(tmp_path, "# nothing\n")) == Run()


def test_configs_are_frozen_and_closed():
    with pytest.raises(ValidationError, match="frozen"):
        Run().out = "x"
    with pytest.raises(ValidationError, match="Extra inputs"):
        Run(outt="x")


# ---- dump

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12) | st.sampled_from(["none", "1e3", "~", "yes"])
NUMBER = st.floats(min_value=1e-12, exclude_min=True, allow_nan=False, allow_infinity=False)


@settings(max_examples=40, deadline=None)
@given(
    st.builds(
        Run, out=TEXT, prompts=st.lists(TEXT, max_size=3).map(tuple),
        parent=st.none() | TEXT.filter(lambda text: text not in NONE),
        sizes=st.dictionaries(TEXT, st.integers(), max_size=2),
        model=st.sampled_from([Model(), Model(width=8, heads=2)]),
        steps=st.sampled_from([Duration(5), Duration("2e9 tokens"), Duration("1.5 epochs")]),
        optim=st.builds(Muon, lr=NUMBER) | st.builds(
            AdamW, lr=NUMBER, clip=st.none() | NUMBER, schedule=st.sampled_from([Constant(), Cosine(warmup=3)])
        ),
        sources=st.lists(st.builds(Source, path=TEXT, weight=NUMBER), max_size=2).map(tuple),
    )
)  # fmt: skip
def test_load_of_dump_is_the_same(tmp_path_factory, config):
    path = tmp_path_factory.getbasetemp() / "dumped.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(Run, path) == config


def test_dump_keeps_other_scripts_readable():
    assert "out: 语言模型\n" in dump(Run(out="语言模型"))


def test_dump_keeps_the_order_of_the_schema():
    keys = [line.partition(":")[0] for line in dump(Run()).splitlines() if not line.startswith((" ", "-"))]
    assert keys == list(Run.model_fields)


def test_import_is_light():
    heavy = ("jax", "numpy", "rich", "tyro")
    code = f"import sys, jaxllm.core.config; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
