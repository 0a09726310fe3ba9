"""Whole models from Hugging Face directories and into them: configuration, weights, tokenizer, chat template.

A GGUF file is read as the directory that it was made from.
"""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxllm.core import files
from jaxllm.core.bucket import here
from jaxllm.core.gguf_file import GgufFile, is_gguf
from jaxllm.data.chat import PAIR_TEMPLATE
from jaxllm.data.tokenizers import gguf_tokens, text_pairs
from jaxllm.data.tokenizers import tokenizer as tokenizers
from jaxllm.data.tokenizers.fast_export import to_json
from jaxllm.data.tokenizers.no_tokenizer import NoTokenizer
from jaxllm.data.tokenizers.pieces import SentencePieces
from jaxllm.encoder import Encoder
from jaxllm.encoder_decoder import EncoderDecoder
from jaxllm.hf import gguf_config
from jaxllm.hf.checkpoint import Checkpoint, Writer
from jaxllm.hf.encoders import ENCODERS, EncoderFamily
from jaxllm.hf.families import FAMILIES, Family
from jaxllm.hf.gguf_weights import open_tensors
from jaxllm.hf.seq2seq import SEQ2SEQ, Seq2SeqFamily
from jaxllm.hf.weights import read_params, write_params
from jaxllm.inference.search import WORDS
from jaxllm.language_model import LanguageModel
from jaxllm.layers.config import RMSNorm
from jaxllm.models.build import AnyConfig, Params
from jaxllm.models.config import ComputeConfig, ModelConfig, is_vae
from jaxllm.models.encoder_config import EncoderConfig
from jaxllm.training.state import param_shardings

AnyFamily = Family | EncoderFamily | Seq2SeqFamily
AnyLanguageModel = LanguageModel | Encoder | EncoderDecoder
READERS: dict[str, EncoderFamily | Seq2SeqFamily] = {**ENCODERS, **SEQ2SEQ}  # of models with an encoder


class Described(NamedTuple):
    """A model whose config.json, or metadata, was read and understood, and whose weights were not.

    Attributes:
      path: as it was given. raw: the config.json. file: of a GGUF file.
    """

    path: Path
    raw: dict[str, Any]
    family: AnyFamily
    config: AnyConfig
    file: GgufFile | None


def describe(model: str | Path, *, encoders: bool = False) -> Described:
    """Read what a Hugging Face directory or a GGUF file is; `load` takes the result in place of the path.

    Args:
      encoders: whether a model that has an encoder will do.
    Raises:
      ValueError: a family that is not known, or a key that changes the model and is not understood; all of them.
    """
    path = here(model)
    file = GgufFile(path) if is_gguf(path) else None
    origin = file.path if file else path / "config.json"
    raw = gguf_config.describe(file) if file else files.read_json(origin)
    kind = raw.get("model_type")
    if kind is None:
        raise ValueError(f"{origin} has no model_type, so it does not say which model this is; add it")
    if kind in READERS and not encoders:
        raise ValueError(f"{origin}: {kind} has an encoder; jaxllm.load reads it, but here a model must continue text")
    known: dict[str, AnyFamily] = {**FAMILIES, **READERS}
    if kind not in known:
        raise ValueError(f"{origin}: model_type={kind!r} is not known; known are {', '.join(known)}")
    config = known[kind].parse(raw, str(origin), *([Checkpoint(path)] if kind in READERS else []))
    return Described(path, raw, known[kind], config, file)


def load(
    model: str | Path | Described, *, compute: ComputeConfig | None = None, mesh: jax.sharding.Mesh | None = None,
    dtype: str | None = None, text: bool = False,
) -> AnyLanguageModel:  # fmt: skip
    """Load a Hugging Face directory or a GGUF file, tensor by tensor straight to the devices.

    The model_type says what it is. A directory without a tokenizer is one for ids (`NoTokenizer`).

    Args:
      model: a path, or what `describe` has found there.
      dtype: of the parameters; None: as stored, and for what is quantised one that holds its values exactly: float32
        for a GGUF file, bfloat16 for MXFP4.
      text: whether a tokenizer must be there, which is known before the weights are read.
    Raises:
      ValueError: the model cannot be computed exactly, or its files do not fit together.
    """
    path, raw, family, config, file = model if isinstance(model, Described) else describe(model, encoders=True)
    tensors = open_tensors(file, raw) if file else Checkpoint(path)
    said = _asked(path, raw)
    ends = gguf_tokens.stop_ids(file.metadata) if file else _several(said.get("eos_token_id", raw.get("eos_token_id")))
    readers = {Seq2SeqFamily: text_pairs.load_for_pairs, EncoderFamily: text_pairs.load}
    try:
        tokenizer = tokenizers.from_gguf(file) if file else readers.get(type(family), tokenizers.load)(path)
    except FileNotFoundError as error:
        ids = (raw.get("pad_token_id"), raw.get("bos_token_id"), ends[0] if ends else None)
        tokenizer = NoTokenizer(str(error), config.vocab_size, ids)
        if text:
            tokenizer.decode(())  # an error that says why
    shardings = None if mesh is None else param_shardings(config, mesh)
    params = read_params(family.open(tensors, config), family.rows(config), config, shardings, dtype)
    if isinstance(family, EncoderFamily):
        return Encoder(config, params, tokenizer, compute=compute)
    if isinstance(family, Seq2SeqFamily):
        config = config.model_copy(update={"start_token": said.get("decoder_start_token_id", config.start_token)})
        forced = _several(said.get("forced_bos_token_id"))
        return EncoderDecoder(config, params, tokenizer, stop_ids=ends, forced=forced, asked=said, compute=compute)
    chat = tokenizer.chat is not None and tokenizer.chat.source != PAIR_TEMPLATE
    return LanguageModel(config, params, tokenizer, chat=chat, compute=compute, stop_ids=ends, imported=True)


def _asked(directory: Path, raw: dict[str, Any]) -> dict[str, Any]:
    """Return generation_config.json; where there is none, and only there, its words that config.json has."""
    if (path := directory / "generation_config.json").is_file():
        found = files.read_json(path)
    else:
        begin = {"forced_bos_token_id": raw.get("bos_token_id")} if raw.get("force_bos_token_to_be_generated") else {}
        found = {word: raw[word] for word in WORDS if word in raw} | begin  # which transformers sets over another one
    return {word: value for word, value in found.items() if value is not None}


def _several(ids: int | list[int] | None) -> list[int]:
    return ids if isinstance(ids, list) else [ids] if ids is not None else []


def export(lm: AnyLanguageModel, directory: str | Path) -> Path:
    """Write a model as a Hugging Face directory that transformers loads.

    The family is the first one whose config.json, read again, gives this very architecture.

    Raises:
      ValueError: no family computes what this model does, or the directory is not empty.
    """
    config, params, tokenizer = lm.config, lm.params, lm.tokenizer
    if is_vae(config):
        raise ValueError("a VAE, which no other program reads; save it, or copy its directory")
    if isinstance(lm, LanguageModel):
        if not lm.imported:
            config, params = _without_padding(config, params, tokenizer.vocab_size)
        config, params = _without_scale(config, params)
    family, raw = words_for(config)
    with files.new_directory(directory) as temporary:
        writer = Writer(temporary)
        write_params(params, family.rows(config), config, writer)
        writer.close()
        raw["dtype"] = str(jax.tree.leaves(lm.params)[0].dtype)
        if not isinstance(lm, LanguageModel):
            ids = {"pad_token_id": tokenizer.pad_id}
            if isinstance(lm, EncoderDecoder):
                ids["eos_token_id"] = lm.stop_ids[0] if len(lm.stop_ids) == 1 else list(lm.stop_ids)
                ids |= {"forced_bos_token_id": lm.forced[0]} if lm.forced else {}
                start = {"decoder_start_token_id": config.start_token}
                files.write_json(temporary / "generation_config.json", lm.asked | ids | start)
            raw = ids | raw  # RoBERTa's own word on padding counts
        else:
            ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id, "pad_token_id": tokenizer.pad_id}
            raw = {"architectures": [family.architecture], "model_type": family.model_type} | raw | ids
            ends = list(lm.stop_ids) if len(lm.stop_ids) > 1 else tokenizer.eos_id
            files.write_json(temporary / "generation_config.json", {**ids, "eos_token_id": ends})
        if not isinstance(tokenizer, NoTokenizer):
            write = _write_tokenizer if isinstance(lm, LanguageModel) else type(tokenizer).save
            write(tokenizer, temporary)
        files.write_json(temporary / "config.json", raw)
    return here(directory)


def _without_scale(config: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Move a factor on embeddings into the table, for families without one; a tied head keeps the table as it was."""
    if config.embed_scale is None or (isinstance(config.norm, RMSNorm) and config.norm.offset):  # Gemma has the factor
        return config, params
    table = params["embed"]["table"]
    head = table if config.tie_embeddings else params["head"]
    scaled = {**params, "embed": {"table": table * jnp.asarray(config.embed_scale, table.dtype)}, "head": head}
    return config.model_copy(update={"embed_scale": None, "tie_embeddings": False}), scaled


def _without_padding(config: ModelConfig, params: Params, size: int) -> tuple[ModelConfig, Params]:
    """Leave out the rows of both tables that are of no token."""
    tables = {name: params[name][:size] for name in ("head",) if name in params}
    tables["embed"] = {"table": params["embed"]["table"][:size]}
    return config.model_copy(update={"vocab_size": size}), {**params, **tables}


def words_for(config: AnyConfig) -> tuple[AnyFamily, dict[str, Any]]:
    """Return the family that computes an architecture and its config.json.

    Raises:
      ValueError: there is none.
    """
    decoder = isinstance(config, ModelConfig)
    families = FAMILIES if decoder else ENCODERS if isinstance(config, EncoderConfig) else SEQ2SEQ
    for family in families.values():
        try:
            written = family.write(config)
            tensors = [] if decoder else [{row.theirs for row in family.rows(config)}]
            again = family.parse(written, family.model_type, *tensors)
        except (ValueError, AttributeError, KeyError, TypeError):
            continue  # this family has no words for something in it
        if again.explicit() == config.explicit():
            return family, written
    what = "architecture" if decoder else "encoder" if isinstance(config, EncoderConfig) else "encoder-decoder"
    raise ValueError(
        f"no family of transformers computes this {what}; known are {', '.join(families)}"
        + (f". What differs from Llama: {_differences(config)}" if decoder else f": {config}")
    )


def _differences(config: ModelConfig) -> str:
    plain = ModelConfig(vocab_size=1, d_model=2, n_layers=1, n_heads=1, d_ff=1, max_seq_len=1)
    sizes = {"n_kv_heads", "head_dim", "init_std", *plain.model_dump(exclude_defaults=True)}
    ours, theirs = config.model_dump(exclude=sizes), plain.model_dump()
    found = ", ".join(f"{key}={ours[key]}" for key in ours if ours[key] != theirs[key])
    return found or "a combination of its parts"


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
