"""What a user calls MODEL: a run directory, one of its checkpoints, a directory whose run.json names the run, a Hugging
Face directory, or a GGUF file.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from jaxllm.core import files
from jaxllm.core.bucket import here, named, origin
from jaxllm.core.gguf_file import is_gguf
from jaxllm.models.config import ModelConfig, is_vae

if TYPE_CHECKING:
    from jaxllm.huggingface import Described
    from jaxllm.models.build import AnyConfig


def locate(model: str | Path) -> tuple[Path, int | None]:
    """Return (run directory, checkpoint step or None = newest) of MODEL.

    Raises:
      ValueError: it is no such thing; the message says what was looked for.
    """
    path = here(model)
    if not origin(path).exists():
        hint = files.misspelt(path) or "; MODEL is a run directory, a Hugging Face directory or a GGUF file"
        raise ValueError(f"{named(path)} does not exist{hint}")
    path, step = files.named_run(path)
    if step is not None:
        return path, step
    if not (path / "recipe.yaml").is_file():
        ggufs = [each.name for each in sorted(path.glob("*.gguf"))]
        hint = f"; of its GGUF files name one: {', '.join(ggufs)}" if ggufs else ""
        raise ValueError(
            f"{named(path)} is no run directory (no recipe.yaml) and no Hugging Face directory (no config.json); "
            "give what train or tune has written, or a directory with config.json and safetensors files, or a GGUF "
            f"file{hint}"
        )
    return path, None


def is_huggingface(model: str | Path) -> bool:
    """Whether MODEL is a Hugging Face directory, or a GGUF file, which is read as one."""
    path = here(model)
    return is_gguf(path) or ((path / "config.json").is_file() and not (path / "recipe.yaml").exists())


def look(model: str | Path, *, encoders: bool = False) -> "tuple[AnyConfig, str | Path | Described]":
    """Return the architecture of MODEL without reading its weights, and what loads it without another look.

    Args:
      encoders: whether a model that has an encoder will do, a VAE too; else it must be one that continues text.
    Raises:
      ValueError: MODEL is nothing that `locate` knows, or has an encoder and must not, or is a Hugging Face model that
        cannot be computed exactly.
    """
    if is_huggingface(model):
        from jaxllm.huggingface import describe

        found = describe(model, encoders=encoders)
        return found.config, found
    from jaxllm.recipe import load_recipe

    config = load_recipe(locate(model)[0]).model
    if encoders or (isinstance(config, ModelConfig) and not is_vae(config)):
        return config, model
    if is_vae(config):
        raise ValueError(
            f"{model} is a VAE and continues no text; jaxllm.load it in Python, and sample or interpolate, or evaluate "
            "it with --tasks perplexity"
        )
    raise ValueError(f"{model} has an encoder; jaxllm.load reads it, but here a model must continue text")
