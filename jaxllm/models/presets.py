"""Published model shapes by name; the data is in presets.yaml."""

import difflib
import functools
from pathlib import Path
from typing import Any

from jaxllm.core.config import read
from jaxllm.models.config import ModelConfig


@functools.cache
def _presets() -> dict[str, dict[str, Any]]:
    shapes = read(Path(__file__).with_suffix(".yaml"))
    return {name: fields for name, fields in shapes.items() if not name.startswith(".")}


def raw(name: str) -> dict[str, Any]:
    """Return the fields of preset `name`, for overriding.

    Raises:
      ValueError: unknown name; the message has the nearest ones.
    """
    presets = _presets()
    if name not in presets:
        near = difflib.get_close_matches(name, presets, n=3, cutoff=0.3)
        raise ValueError(
            f"unknown model preset {name!r}; did you mean {' or '.join(near) or 'one of ' + ', '.join(presets)}?"
        )
    return dict(presets[name])


def get(name: str, **overrides: Any) -> ModelConfig:
    """Return preset `name` with some fields replaced: get("llama2-7b", n_layers=2)."""
    return ModelConfig.model_validate({**raw(name), **overrides})
