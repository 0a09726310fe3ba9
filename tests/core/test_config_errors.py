"""Every mistake is named with its key, its value and the rule, all of them at once."""

import re
from pathlib import Path
from typing import Annotated, Literal, Self

import pytest
from pydantic import Field, model_validator

from jaxllm.core.config import Config, ConfigError, Duration, load


class Constant(Config):
    kind: Literal["none"] = "none"


class Cosine(Config):
    kind: Literal["cosine"] = "cosine"
    warmup: int = Field(100, ge=0)


class AdamW(Config):
    kind: Literal["adamw"] = "adamw"
    lr: float = Field(3e-4, gt=0)
    clip: float | None = Field(1.0, gt=0)
    schedule: Annotated[Constant | Cosine, Field(discriminator="kind")] = Cosine()


class Muon(Config):
    kind: Literal["muon"] = "muon"
    lr: float = Field(3e-3, gt=0)
    momentum: float = 0.95


class Source(Config):
    path: str
    weight: float = Field(1.0, gt=0)


class Model(Config):
    width: int = 64
    heads: int = 4

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.width % self.heads:
            raise ValueError(f"width={self.width} is not divisible by heads={self.heads}")
        return self


class Run(Config):
    out: str = "run"
    steps: Duration = Duration("1 epoch")
    remat: Literal["none", "full"] = "full"
    verify: bool = True
    profile: tuple[int, int] | None = None
    sizes: dict[str, int] = Field({})
    model: Model = Model()
    step: Constant = Constant()
    optim: Annotated[AdamW | Muon, Field(discriminator="kind")] = AdamW()
    sources: tuple[Source, ...] = ()


class Strict(Config):
    out: str
    sources: tuple[Source, ...] = Field(min_length=1)
    optim: Annotated[AdamW | Muon, Field(discriminator="kind")]


def message(cls: type[Config], *overrides: str, path: Path | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load(cls, path, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("optim.lrr=1", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("optm.lr=1", "unknown key 'optm'; did you mean 'optim'?"),
        ("warmup=1", "unknown key 'warmup'; did you mean 'optim.schedule.warmup'?"),
        ("stesp=5", "unknown key 'stesp'; did you mean 'steps'?"),  # and not the section step
        ("stesp.x=5", "unknown key 'stesp'; did you mean 'step'?"),
        ("modle=x", "unknown key 'modle'; did you mean 'model'?"),
        ("model.wid-th=5", "unknown key 'model.wid-th'; did you mean 'model.width'?"),
        ("qqqqqqq=1", "unknown key 'qqqqqqq'; --help lists all keys"),
        ("optim.momentum=1", "unknown key 'optim.momentum' for optim.kind=adamw; it belongs to optim.kind=muon"),
        ("optim.kind=sgd", "optim.kind=sgd: should be one of 'adamw', 'muon'"),
        ("optim.lr=fast", "optim.lr=fast: should be a valid number, unable to parse string as a number"),
        ("optim.lr=true", "optim.lr=true: should be a valid number, unable to parse string as a number"),
        ("optim.lr=inf", "optim.lr=inf: should be a finite number"),
        ("optim.clip=-1", "optim.clip=-1: should be greater than 0"),
        ("optim.clip.x=1", "optim.clip={'x': '1'}: should be a valid number"),
        ("optim.schedule.warmup=1.5", "optim.schedule.warmup=1.5: should be a valid integer, unable to parse "),
        ("remat=half", "remat=half: should be 'none' or 'full'"),
        ("verify=7", "verify=7: should be a valid boolean, unable to interpret input"),
        ("out=[1]", "out=['1']: should be a valid string"),
        ("profile=[1, 2, 3]", "profile=['1', '2', '3']: list should have at most 2 items after validation, not 3"),
        ("sizes={a: b}", "sizes.a=b: should be a valid integer, unable to parse string as an integer"),
        ("sources=3", "sources=3: should be a valid list"),
        ("sources=[a]", "sources.0=a: should be a section (keys and values)"),
        ("optim={schedule: 3, kind: adamw}", "optim.schedule=3: should be a section (keys and values)"),
        ("model=tiny", "model=tiny: should be a section (keys and values)"),
        ("model.width=6", "model: width=6 is not divisible by heads=4"),
        ("steps=5 parsecs", 'steps=5 parsecs: expected a number of steps, "2e9 tokens" or "1 epoch", more than 0'),
        ("steps=1.5", "steps=1.5: expected a whole number of steps"),
        ("--out=x", "'--out=x' is not an override; write key=value, such as optim.lr=3e-4"),
        ("recipe.yaml", "'recipe.yaml' is not an override; write key=value, such as optim.lr=3e-4"),
        ("sources.2.path=x", "sources.2.path: sources is a list of 0; the next item is sources.0"),
    ],
)
def test_error_names_key_value_and_rule(override, expected):
    assert message(Run, override).startswith(expected)


def test_all_problems_are_reported_at_once_wherever_they_stand(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optim: {lr: fast, lrr: 1}\nsources: [{path: a}, {path: b, weigth: 1}]\nremat: half\n")
    assert message(Run, "verify=7", "remat=none", path=path).splitlines() == [
        "4 problems:",
        "  verify=7: should be a valid boolean, unable to interpret input",
        "  optim.lr=fast: should be a valid number, unable to parse string as a number",
        "  unknown key 'optim.lrr'; did you mean 'optim.lr'?",
        "  unknown key 'sources.1.weigth'; did you mean 'sources.1.weight'?",
    ]


def test_missing_keys():
    rest = "=... on the command line, or write it into the recipe"
    assert message(Strict).splitlines() == [
        "3 problems:", f"  missing key 'out'; give out{rest}", f"  missing key 'sources'; give sources.0.path{rest}",
        f"  missing key 'optim'; give optim.kind{rest}",
    ]  # fmt: skip
    assert message(Strict, "out=x", "sources.0.weight=1", "optim.lr=1").splitlines() == [
        "2 problems:",
        f"  missing key 'sources.0.path'; give sources.0.path{rest}",
        "  missing key 'optim.kind', which says what 'optim' is",
    ]  # fmt: skip


def test_several_missing_keys_of_a_section_are_given_at_once():
    class Shape(Config):
        width: int
        depth: int

    class Holder(Config):
        out: str
        shape: Shape

    def said(*overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(Holder, None, overrides, ways={"shape": "shape.preset=NAME", "out": "--out DIR"})
        return str(caught.value)

    assert said("shape.prest=tiny").splitlines() == [
        "3 problems:",
        "  missing key 'out'; give --out DIR on the command line, or write it into the recipe",
        "  missing keys 'shape.width', 'shape.depth'; give shape.preset=NAME, which has them all",
        "  unknown key 'shape.prest'; did you mean 'shape.preset'?",
    ]
    assert said("out=x", "shape.width=1").startswith("missing key 'shape.depth'; give shape.depth=... on the command")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"a: 1\nb: [1\nc: 2\n", r"not valid YAML: .*line 3"),
        (b"a: 1\n\tb: 2\n", r"not valid YAML: .*line 2"),
        (b"a: \0", r"not valid YAML: .*unacceptable character"),
        (b"out: caf\xe9\n", r"not valid YAML: 'utf-8' codec"),
        (b"out: a\nmodel: {width: 4}\nout: b\n", r"not valid YAML: key 'out' is given twice .*line 3"),
        (b"- 1\n- 2\n", r"has no keys and values, but \"\['1', '2'\]\""),
        (b"just text\n", r"has no keys and values, but 'just text'"),
    ],
)
def test_broken_file_is_named_with_the_line(tmp_path, content, expected):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    assert re.match(f"{path} (is )?{expected}", message(Run, path=path))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.yaml"):
        load(Run, tmp_path / "none.yaml")
