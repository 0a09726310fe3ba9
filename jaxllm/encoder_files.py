"""Encoders from Hugging Face directories and into them: configuration, weights, tokenizer."""

from pathlib import Path

import jax

from jaxllm.core import files
from jaxllm.data import text_pairs
from jaxllm.encoder import Encoder
from jaxllm.hf.checkpoint import Checkpoint, Writer
from jaxllm.hf.encoders import ENCODERS, describe
from jaxllm.hf.weights import read_params, write_params
from jaxllm.models.config import ComputeConfig
from jaxllm.models.encoder import abstract_params, logical_axes
from jaxllm.training.state import tree_shardings


def load(
    directory: str | Path, *, compute: ComputeConfig | None = None, mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
) -> Encoder:  # fmt: skip
    """Load an encoder's directory, tensor by tensor straight to the devices; arguments as of `huggingface.load`.

    Raises:
      ValueError: the model cannot be computed exactly, or its files do not fit together.
    """
    directory = Path(directory)
    path = directory / "config.json"
    raw = files.read_json(path)
    family, checkpoint = ENCODERS[raw["model_type"]], Checkpoint(directory)
    config = family.parse(raw, str(path), checkpoint)
    tokenizer = text_pairs.load(directory)
    shardings = None if mesh is None else tree_shardings(logical_axes(config), abstract_params(config), mesh)
    params = read_params(family.open(checkpoint, config), family.rows(config), config, shardings, dtype)
    checkpoint.close()
    return Encoder(config, params, tokenizer, compute=compute)


def export(encoder: Encoder, directory: str | Path) -> Path:
    """Write an encoder as a directory that transformers loads: the inverse of `load`.

    Raises:
      ValueError: no family computes what this encoder does, or the directory is not empty.
    """
    family, description = describe(encoder.config)
    with files.new_directory(directory) as temporary:
        writer = Writer(temporary)
        write_params(encoder.params, family.rows(encoder.config), encoder.config, writer)
        writer.close()
        dtype = str(jax.tree.leaves(encoder.params)[0].dtype)
        ids = {"pad_token_id": encoder.tokenizer.pad_id} | description  # RoBERTa's own word on it counts
        files.write_json(temporary / "config.json", {**ids, "dtype": dtype})
        encoder.tokenizer.save(temporary)
    return Path(directory)
