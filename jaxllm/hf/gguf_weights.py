"""The tensors of a GGUF file under the names, and in the layout, that a Hugging Face checkpoint of the model has.

llama.cpp's converter renames the tensors, reorders the rows of Llama's q and k, and adds one to Gemma's norms. All of
it is undone here, so that the tables of the families (`hf.families`) know one layout only.

Source: convert_hf_to_gguf.py of llama.cpp.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np
from einops import rearrange

from jaxllm.core.gguf_file import GgufFile, Tensor
from jaxllm.hf.checkpoint import Stored, Tensors

DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
CHUNK_ROWS = 4096  # dequantised at once: gguf works on copies, and this bounds them
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
SANDWICH = BLOCK | {  # Gemma 2 and 3 have a norm on both sides of each part
    "ffn_norm": "pre_feedforward_layernorm", "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
FREQUENCIES = "rope_freqs.weight"  # of Llama 3; `hf.gguf_config` reads it


def open_tensors(file: GgufFile, config: Mapping[str, Any]) -> Tensors:
    """Return the tensors of a file as `hf.checkpoint.Checkpoint` shows those of a directory.

    A name that llama.cpp does not have stays as it is. What was quantised is float32.

    Args:
      config: what `hf.gguf_config.describe` says of the file.
    """
    architecture = file.metadata["general.architecture"]
    heads, offset = {}, architecture.startswith("gemma")
    if architecture == "llama":
        heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    parts = SANDWICH if architecture in ("gemma2", "gemma3") else BLOCK
    ours = dict(WHOLE)
    for layer in range(config["num_hidden_layers"]):
        ours |= {f"blk.{layer}.{part}": f"model.layers.{layer}.{name}" for part, name in parts.items()}
    theirs = {name: stem for stem, name in ours.items()}
    stored = {}
    for name, tensor in file.tensors.items():
        if name == FREQUENCIES and architecture == "llama":
            continue
        part = name.rpartition(".")[0].rpartition(".")[2]
        get = partial(_read, tensor, heads.get(part), offset and part.endswith("norm"))
        stored[_renamed(name, ours)] = Stored(tensor.shape, DTYPES.get(tensor.kind, DTYPES["F32"]).name, get)
    return Tensors(file.path, stored, called=partial(_renamed, names=theirs), described_by="its metadata")


def _renamed(name: str, names: Mapping[str, str]) -> str:
    stem, dot, kind = name.rpartition(".")
    return f"{names.get(stem, stem)}{dot}{kind}"


def _read(tensor: Tensor, heads: int | None, offset: bool) -> np.ndarray:
    """Return a tensor as a Hugging Face checkpoint has it."""
    values = read(tensor)
    if heads:  # pairs to rotate lie side by side there, and half a head apart here
        return rearrange(values, "(heads half two) ... -> (heads two half) ...", heads=heads, two=2)
    return values.astype(np.float32) - np.float32(1) if offset else values


def read(tensor: Tensor) -> np.ndarray:
    """Return the values of a tensor: those stored, or for a quantised type the float32 that its blocks mean.

    Raises:
      ValueError: the type is quantised and `gguf` is not installed.
    """
    if tensor.kind in DTYPES:
        return tensor.data.view(DTYPES[tensor.kind])
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise ValueError(
            f"tensors of type {tensor.kind} are read with the package gguf, which is not installed: "
            "pip install 'jaxllm[gguf]'"
        ) from error
    rows = tensor.data.reshape(-1, tensor.data.shape[-1])
    values = np.empty((len(rows), tensor.shape[-1]), np.float32)
    for start in range(0, len(rows), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        values[part] = dequantize(rows[part], GGMLQuantizationType[tensor.kind])
    return values.reshape(tensor.shape)
