"""The tensors of a GGUF file under the names, and in the layout, that a Hugging Face checkpoint of the model has.

llama.cpp's converter renames the tensors, reorders the rows of Llama's q and k, and adds one to Gemma's norms. All of
it is undone here, so that the tables of the families (`hf.families`) know one layout only.

Source: convert_hf_to_gguf.py of llama.cpp.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from einops import rearrange

from jaxllm.core.gguf_file import GgufFile, Tensor
from jaxllm.hf.checkpoint import Stored

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


class GgufCheckpoint(Mapping[str, np.ndarray]):
    """A GGUF file as `hf.checkpoint.Checkpoint` shows a directory; reading one tensor makes no other.

    Args:
      config: what `hf.gguf_config.describe` says of the file.
    """

    config_name = "its metadata"

    def __init__(self, file: GgufFile, config: Mapping[str, Any]):
        self.directory, self._file = file.path, file
        architecture = file.metadata["general.architecture"]
        self._heads = {}
        if architecture == "llama":
            self._heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
        self._offset_norms = architecture.startswith("gemma")
        self._parts = SANDWICH if architecture in ("gemma2", "gemma3") else BLOCK
        skipped = {FREQUENCIES} if architecture == "llama" else set()
        self._names = {self._translate(name): name for name in file.tensors if name not in skipped}

    def _translate(self, name: str) -> str:
        """Return Hugging Face's name of a tensor; one that llama.cpp does not have stays as it is."""
        stem, _, kind = name.rpartition(".")
        if stem in WHOLE:
            return f"{WHOLE[stem]}.{kind}"
        words = stem.split(".")
        if len(words) != 3 or words[0] != "blk" or words[2] not in self._parts:
            return name
        return f"model.layers.{words[1]}.{self._parts[words[2]]}.{kind}"

    def called(self, name: str) -> str:
        """Return what the file calls, or would call, a tensor of Hugging Face's name."""
        stem, _, kind = name.rpartition(".")
        whole = {theirs: ours for ours, theirs in WHOLE.items()}
        if stem in whole:
            return f"{whole[stem]}.{kind}"
        if not stem.startswith("model.layers."):
            return name
        layer, part = stem.removeprefix("model.layers.").split(".", 1)
        parts = {theirs: ours for ours, theirs in self._parts.items()}
        return f"blk.{layer}.{parts.get(part, part)}.{kind}"

    def __getitem__(self, name: str) -> np.ndarray:
        stored = self._names[name]
        tensor, part = read(self._file.tensors[stored]), stored.split(".")[-2]
        if part in self._heads:  # pairs to rotate lie side by side there, and half a head apart here
            order = "(heads half two) ... -> (heads two half) ..."
            return rearrange(tensor, order, heads=self._heads[part], two=2)
        if self._offset_norms and part.endswith("norm"):
            return tensor.astype(np.float32) - np.float32(1)
        return tensor

    def stored(self, name: str) -> Stored:
        """Return shape and dtype of a tensor without reading it; what was quantised is float32."""
        tensor = self._file.tensors[self._names[name]]
        return Stored(tensor.shape, DTYPES.get(tensor.kind, DTYPES["F32"]).name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def close(self) -> None:
        """Do nothing: the file is unmapped with its last view."""


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
