"""The help text lists everything."""

import io
import re
import subprocess
import sys
from typing import Annotated, Literal

import pytest
from pydantic import Field

from jaxllm.core.config import Config, Duration
from jaxllm.core.schema import describe, keys
from jaxllm.recipe import Recipe


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
    limit: int | None = Field(None, description="most")
    steps: Duration = Field(Duration("1 epoch"), description='length; "2e9 tokens"')


def test_describe_lists_every_key_and_kind_with_meaning_type_and_default(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = describe(Run)
    assert not re.search("--(?!help)|None", text)
    words = " ".join(re.sub(r"[^\w\s.:;()\"{},|-]", "", text).split())
    for line in [
        "out STR where to write (required)",
        'steps STR length; "2e9 tokens" (default: 1 epoch)',
        "limit {none}|INT most (default: none)",
        "norm options normalisation; Root mean square. Source: a paper.",
        "norm.kind {rms,none} which kind it is (default: rms) norm.eps FLOAT added to the root (default: 1e-05)",
        "norm options normalisation; No norm.",
        "norm.kind {none} which kind it is (required)",
        "sources.0 options datasets",
        "sources.0.path STR directory (required)",
    ]:
        assert line in words


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_describe_draws_what_the_terminal_can_show(monkeypatch, encoding):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    text = describe(Run)
    assert ("╭" in text) == (encoding == "utf-8")
    assert text.count("--help") == text.count(" out ") == 1 and "usage" not in text


def test_keys():
    assert keys(Run) == {
        "norm": [], "out": [], "limit": [], "sources": [], "steps": [], "norm.kind": ["rms", "none"],
        "norm.eps": ["rms"], "sources.0.path": [],
    }  # fmt: skip


def test_help_of_train_is_light_and_complete():
    code = (
        "import sys, jaxllm.train; jaxllm.train.main(['r.yaml', '--help']); "
        "assert not {'jax', 'flax', 'optax', 'orbax'} & {*sys.modules}"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    listed = set(re.findall(r"^. +([\w.]+) ", text, re.MULTILINE))
    halves = ("model.stack", "model.encoder", "model.decoder")
    for half in halves:
        assert re.search(rf"(?m)^{half}: .*; its keys are those of model$", text)
    own = {key for key in keys(Recipe) if not key.startswith(halves)}
    assert not {key for key in own if not any(each.startswith(key) for each in listed)}
