"""Encoders and encoder-decoders from Hugging Face directories and into them: configuration, weights, tokenizer."""

from pathlib import Path
from typing import Any

import jax

from jaxllm.core import files
from jaxllm.data import text_pairs
from jaxllm.data.text_pieces import TextPieces
from jaxllm.encoder import Encoder
from jaxllm.encoder_decoder import EncoderDecoder
from jaxllm.hf import encoders, seq2seq
from jaxllm.hf.checkpoint import Checkpoint, Writer
from jaxllm.hf.weights import read_params, write_params
from jaxllm.models.config import ComputeConfig
from jaxllm.training.state import param_shardings

FAMILIES = {**encoders.ENCODERS, **seq2seq.SEQ2SEQ}


def load(
    directory: str | Path, *, compute: ComputeConfig | None = None, mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
) -> Encoder | EncoderDecoder:  # fmt: skip
    """Load a directory, tensor by tensor straight to the devices; arguments as of `huggingface.load`.

    Raises:
      ValueError: the model cannot be computed exactly, or its files do not fit together.
    """
    directory = Path(directory)
    path = directory / "config.json"
    raw = files.read_json(path)
    family, checkpoint = FAMILIES[raw["model_type"]], Checkpoint(directory)
    config = family.parse(raw, str(path), checkpoint)
    two = raw["model_type"] in seq2seq.SEQ2SEQ
    pieces = two and not (directory / "tokenizer.json").is_file()
    tokenizer = TextPieces(directory) if pieces else text_pairs.load(directory)
    shardings = None if mesh is None else param_shardings(config, mesh)
    params = read_params(family.open(checkpoint, config), family.rows(config), config, shardings, dtype)
    checkpoint.close()
    if not two:
        return Encoder(config, params, tokenizer, compute=compute)
    path = directory / "generation_config.json"
    asked = raw | (files.read_json(path) if path.is_file() else {})
    ends, forced = asked.get("eos_token_id"), asked.get("forced_bos_token_id")
    return EncoderDecoder(
        config, params, tokenizer, compute=compute, forced=() if forced is None else (forced,),
        stop_ids=ends if isinstance(ends, list) else [ends] if ends is not None else [],
    )  # fmt: skip


def export(model: Encoder | EncoderDecoder, directory: str | Path) -> Path:
    """Write a model as a directory that transformers loads: the inverse of `load`.

    Raises:
      ValueError: no family computes what this model does, or the directory is not empty.
    """
    config, tokenizer = model.config, model.tokenizer
    family, description = (seq2seq if isinstance(model, EncoderDecoder) else encoders).describe(config)
    ids: dict[str, Any] = {"pad_token_id": tokenizer.pad_id}
    with files.new_directory(directory) as temporary:
        if isinstance(model, EncoderDecoder):
            ends = list(model.stop_ids)
            ids["eos_token_id"] = ends[0] if len(ends) == 1 else ends
            ids |= {"forced_bos_token_id": model.forced[0]} if model.forced else {}
            start = {"decoder_start_token_id": config.start_token}
            files.write_json(temporary / "generation_config.json", ids | start)
        writer = Writer(temporary)
        write_params(model.params, family.rows(config), config, writer)
        writer.close()
        dtype = str(jax.tree.leaves(model.params)[0].dtype)
        # RoBERTa's own word on padding counts.
        files.write_json(temporary / "config.json", {**ids, **description, "dtype": dtype})
        tokenizer.save(temporary)
    return Path(directory)
