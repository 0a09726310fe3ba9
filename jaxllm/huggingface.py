"""Whole models from Hugging Face directories and into them: configuration, weights, tokenizer, chat template.

A GGUF file is read as the directory that it was made from.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxllm import encoder_files
from jaxllm.core import files
from jaxllm.core.gguf_file import GgufFile, is_gguf
from jaxllm.data import gguf_tokens
from jaxllm.data import tokenizer as tokenizers
from jaxllm.data.fast_export import to_json
from jaxllm.data.pieces import SentencePieces
from jaxllm.encoder import Encoder
from jaxllm.encoder_decoder import EncoderDecoder
from jaxllm.hf.checkpoint import Checkpoint, Writer
from jaxllm.hf.families import FAMILIES, Family
from jaxllm.hf.gguf_config import describe
from jaxllm.hf.gguf_weights import GgufCheckpoint
from jaxllm.hf.weights import read_params, write_params
from jaxllm.language_model import LanguageModel
from jaxllm.layers.config import Experts, RMSNorm
from jaxllm.models.build import Params
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.training.state import param_shardings


def read_config(model: str | Path) -> tuple[Family, ModelConfig]:
    """Return the family and the architecture of a Hugging Face directory or a GGUF file.

    Raises:
      ValueError: a family that is not known, or a key that changes the model and is not understood; all of them.
    """
    if is_gguf(model):
        return _parse(describe(GgufFile(model)), Path(model))
    path = Path(model) / "config.json"
    return _parse(files.read_json(path), path)


def _parse(raw: dict[str, Any], path: Path) -> tuple[Family, ModelConfig]:
    family = FAMILIES.get(raw.get("model_type"))
    if raw.get("model_type") in encoder_files.FAMILIES:
        raise ValueError(
            f"{path}: {raw['model_type']} has an encoder; jaxllm.load reads it, but this needs a model that writes text"
        )
    if family is None:
        raise ValueError(
            f"{path}: model_type={raw.get('model_type')!r} is not known; known are "
            + ", ".join([*FAMILIES, *encoder_files.FAMILIES])
        )
    return family, family.parse(raw, str(path))


def load(
    model: str | Path, *, compute: ComputeConfig | None = None, mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None,
) -> LanguageModel | Encoder | EncoderDecoder:  # fmt: skip
    """Load a Hugging Face directory or a GGUF file, tensor by tensor straight to the devices.

    The model_type says what it is.

    Args:
      dtype: of the parameters; None: as stored, and float32 for what is quantised, which holds its values exactly.
    Raises:
      ValueError: the model cannot be computed exactly, or its files do not fit together.
    """
    if is_gguf(model):
        file = GgufFile(model)
        raw, tokenizer = describe(file), tokenizers.from_gguf(file)
        family, config = _parse(raw, file.path)
        checkpoint, stop_ids = GgufCheckpoint(file, raw), gguf_tokens.stop_ids(file.metadata)
    else:
        path = Path(model) / "config.json"
        raw = files.read_json(path)
        if raw.get("model_type") in encoder_files.FAMILIES:
            return encoder_files.load(model, compute=compute, mesh=mesh, dtype=dtype)
        family, config = _parse(raw, path)
        tokenizer, checkpoint, stop_ids = tokenizers.load(model), Checkpoint(model), _stop_ids(Path(model))
    shardings = None if mesh is None else param_shardings(config, mesh)
    params = read_params(checkpoint, family.rows(config), config, shardings, dtype)
    checkpoint.close()
    chat = tokenizer.chat is not None
    return LanguageModel(config, params, tokenizer, chat=chat, compute=compute, stop_ids=stop_ids)


def _stop_ids(directory: Path) -> list[int]:
    """Return what ends an answer by generation_config.json, or by config.json."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        found = files.read_json(path).get("eos_token_id") if path.is_file() else None
        if found is not None:
            return found if isinstance(found, list) else [found]
    return []


def export(lm: LanguageModel | Encoder | EncoderDecoder, directory: str | Path) -> Path:
    """Write a model as a Hugging Face directory that transformers loads.

    The family is the first one whose config.json, read again, gives this very architecture.

    Raises:
      ValueError: no family computes what this model does, or the directory is not empty.
    """
    if isinstance(lm, Encoder | EncoderDecoder):
        return encoder_files.export(lm, directory)
    tokenizer, (config, params) = lm.tokenizer, _without_scale(lm.config, lm.params)
    family, description = _describe(config)
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
    dtype = str(jax.tree.leaves(lm.params)[0].dtype)
    head = {"architectures": [family.architecture], "model_type": family.model_type, "dtype": dtype}
    ends = list(lm.stop_ids) if len(lm.stop_ids) > 1 else tokenizer.eos_id
    with files.new_directory(directory) as temporary:
        writer = Writer(temporary)
        write_params(params, family.rows(config), config, writer)
        writer.close()
        files.write_json(temporary / "config.json", head | description | ids)
        files.write_json(temporary / "generation_config.json", {**ids, "eos_token_id": ends})
        _write_tokenizer(tokenizer, temporary)
    return Path(directory)


def _without_scale(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Move a factor on embeddings into the table, for families without one; a tied head keeps the table as it was."""
    if config.embed_scale is None or (isinstance(config.norm, RMSNorm) and config.norm.offset):  # Gemma has the factor
        return config, params
    table = params["embed"]["table"]
    head = table if config.tie_embeddings else params["head"]
    scaled = {**params, "embed": {"table": table * jnp.asarray(config.embed_scale, table.dtype)}, "head": head}
    return config.model_copy(update={"embed_scale": None, "tie_embeddings": False}), scaled


def _describe(config: ModelConfig) -> tuple[Family, dict[str, Any]]:
    for family in FAMILIES.values():
        try:
            written = family.write(config)
            again = family.parse(written, family.model_type)
        except (ValueError, AttributeError, KeyError, TypeError):
            continue  # this family has no words for something in it
        if _explicit(again) == _explicit(config):
            return family, written
    raise ValueError(
        f"no family of transformers computes this architecture; known are {', '.join(FAMILIES)}. What differs from "
        f"Llama: {', '.join(_differences(config)) or 'a combination of its parts'}"
    )


def _explicit(config: ModelConfig) -> dict[str, Any]:
    """What a configuration means, defaults written out; without a loss of training that config.json has no word for."""
    if isinstance(config.ffn, Experts):
        config = config.model_copy(update={"ffn": config.ffn.model_copy(update={"router_z": 0.0})})
    return config.explicit().model_dump()


def _differences(config: ModelConfig) -> list[str]:
    plain = ModelConfig(vocab_size=1, d_model=2, n_layers=1, n_heads=1, d_ff=1, max_seq_len=1)
    sizes = {"n_kv_heads", "head_dim", "init_std", *plain.model_dump(exclude_defaults=True)}
    ours, theirs = config.model_dump(exclude=sizes), plain.model_dump()
    return [f"{key}={ours[key]}" for key in ours if ours[key] != theirs[key]]


def _write_tokenizer(tokenizer: tokenizers.Tokenizer, directory: Path) -> None:
    names = {token: name for name, token in tokenizer.special.items()}
    config: dict[str, Any] = {
        "bos_token": names.get(tokenizer.bos_id), "eos_token": names.get(tokenizer.eos_id),
        "pad_token": names.get(tokenizer.pad_id), "clean_up_tokenization_spaces": False,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    if isinstance(tokenizer.pieces, SentencePieces) and not tokenizer.pieces.escape_mark:
        files.write_bytes(directory / "tokenizer.model", tokenizer.pieces.proto)
        config["tokenizer_class"] = "LlamaTokenizer"
    else:
        files.write_text(directory / "tokenizer.json", to_json(tokenizer))
    if tokenizer.chat:
        files.write_text(directory / "chat_template.jinja", tokenizer.chat.source)
    files.write_json(directory / "tokenizer_config.json", config)


def compare_logits(one: LanguageModel, other: LanguageModel) -> float:
    """Return how far the logits of two models for a fixed prompt are apart.

    Raises:
      ValueError: further than rounding can explain, 1e-5 of the largest logit.
    """
    tokens = np.arange(1, 1 + min(16, one.config.max_seq_len, one.config.vocab_size - 1))[None]
    ours, theirs = (np.asarray(lm.logits(tokens)) for lm in (one, other))
    difference = float(np.abs(ours - theirs).max())
    if not difference <= 1e-5 * np.abs(ours).max():
        raise ValueError(
            f"what was written computes something else: logits differ by up to {difference:.2e}; this is a bug, please "
            "report it with the config.json"
        )
    return difference
