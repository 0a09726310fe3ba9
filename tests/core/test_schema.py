"""The help text lists everything, and a misspelt key finds its neighbour."""

from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from jaxllm.core.config import Config, Duration
from jaxllm.core.schema import describe, keys, nearest, words


class Rms(Config):
    """Root mean square. Source: a paper."""

    kind: Literal["rms"] = "rms"
    eps: float = Field(1e-6, gt=0, description="added to the root")


class Plain(Config):
    """No norm."""

    kind: Literal["none"] = "none"


class Source(Config):
    """A dataset."""

    path: str = Field(description="directory")


class Run(Config):
    """A run."""

    norm: Annotated[Rms | Plain, Field(discriminator="kind")] = Field(Rms(eps=1e-5), description="normalisation")
    out: str = Field(description="where to write")
    sources: tuple[Source, ...] = Field((), description="datasets")
    steps: Duration = Field(Duration("1 epoch"), description="length")


def test_describe_lists_every_key_with_meaning_type_and_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert describe(Run).splitlines() == [
        "  out                             where to write (text; required)",
        "  sources                         datasets (a list, each a section (keys and values); default [])",
        '  steps                           length (a number of steps, "2e9 tokens" or "1 epoch"; default 1',
        "                                  epoch)",
        "",
        "norm: normalisation",
        "  norm.kind                       rms: Root mean square; none: No norm (one of rms, none; default",
        "                                  rms)",
        "",
        "norm: with kind=rms",
        "  norm.eps                        added to the root (a number > 0; default 1e-05)",
        "",
        "sources.0: first of the list, the next is 1",
        "  sources.0.path                  directory (text; required)",
    ]


def test_every_key_of_the_schema_is_listed():
    assert {key.name for key in keys(Run) if key.type} == {
        "out", "sources", "steps", "norm.kind", "norm.eps", "sources.0.path",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("annotation", "text"),
    [
        (int, "a whole number"),
        (Annotated[int, Field(ge=1, lt=9)], "a whole number >= 1 and < 9"),
        (float | None, "a number or none"),
        (Path, "a path"),
        (Literal["a"], "a"),
        (Literal["a", "b"] | None, "one of a, b or none"),
        (tuple[int, float], "a list of 2 (a whole number, a number)"),
        (list[bool], "a list, each true or false"),
        (dict[str, int], "names, each with a whole number"),
        (Source, "a section (keys and values)"),
        (Rms | Plain | None, "a section of kind rms or none or none"),
        (Any, "Any"),
    ],
)
def test_types_in_words(annotation, text):
    assert words(annotation) == text


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("ot", "out"),
        ("norm.epps", "norm.eps"),
        ("eps", "norm.eps"),
        ("sources.3.pth", "sources.3.path"),
        ("zzzz", None),
    ],
)
def test_nearest(given, meant):
    assert nearest(Run, given) == meant
