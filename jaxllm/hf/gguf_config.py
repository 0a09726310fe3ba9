"""The metadata of a GGUF file, translated to the config.json that the model has on Hugging Face.

The families (`hf.families`) read it from there; here and in gguf.yaml is only what llama.cpp writes otherwise. A key
that is not translated is an error, as it is in a config.json.

Source: convert_hf_to_gguf.py of llama.cpp, and what its models take absent keys for.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jaxllm.core.gguf_file import READ, GgufFile
from jaxllm.hf.families import FULL, SLIDING
from jaxllm.hf.fields import Fields, Vocabulary, entries
from jaxllm.hf.gguf_weights import FREQUENCIES, read

Config = dict[str, Any]
GEMMA2_LARGE, GEMMA3_LARGE = 46, 62  # layers of the 27B models


def describe(file: GgufFile) -> Config:
    """Return the config.json of the model in a GGUF file, with its model_type.

    Raises:
      ValueError: an architecture that is not known, a tensor type that is not read, a key that is not understood; the
        message lists everything.
    """
    architecture = file.metadata.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{file.path}: general.architecture={architecture!r} is not known; known are {', '.join(ARCHITECTURES)}"
        )
    prefix = f"{architecture}."
    keys = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    fields = Fields(keys, f"the metadata {prefix}*")
    fields.problems += _problems(file)
    config = ARCHITECTURES[architecture].read(fields) | _common(fields, file)
    if architecture in OWN:
        config |= OWN[architecture](fields, file)
    fields.finish(str(file.path))
    return config


def _problems(file: GgufFile) -> list[str]:
    """Return what makes a file unreadable whatever its architecture."""
    problems, unread = [], {}
    for name, tensor in file.tensors.items():
        if tensor.data is None:
            unread.setdefault(tensor.kind, []).append(name)
    known = ", ".join(name for name, _, _ in READ.values())
    for kind, names in unread.items():
        problems.append(
            f"{len(names)} tensors of type {kind}, as {names[0]}: read are {known}; take a file that has only these"
        )
    if (kind := file.metadata.get("general.type", "model")) != "model":
        problems.append(f"general.type={kind!r}: only 'model' is one by itself")
    if (count := file.metadata.get("split.count", 0)) > 1:
        problems.append(f"split.count={count}: a part of a model; join the parts with llama-gguf-split --merge")
    return problems


def _common(fields: Fields, file: GgufFile) -> Config:
    """What all architectures say alike, and no table can."""
    width, heads = fields.need("embedding_length"), _uniform(fields, "attention.head_count")
    head_dim = fields.take("attention.key_length", width // heads)
    fields.expect("attention.value_length", head_dim)
    fields.expect("rope.dimension_count", head_dim)
    table = file.tensors.get("token_embd.weight")
    return {
        "vocab_size": fields.take("vocab_size") or (table.shape[0] if table else fields.need("vocab_size")),
        "num_attention_heads": heads, "num_key_value_heads": _uniform(fields, "attention.head_count_kv", heads),
        "head_dim": head_dim, "intermediate_size": _uniform(fields, "feed_forward_length"),
        "rope_scaling": _scaling(fields), "tie_word_embeddings": "output.weight" not in file.tensors,
    }  # fmt: skip


def _uniform(fields: Fields, key: str, absent: int | None = None) -> int:
    """Return a number that some files have for each layer, and that must be the same in all."""
    value = fields.take(key)
    if not isinstance(value, list):
        return fields.need(key) if absent is None else fields.take(key, absent)
    if len(set(value)) > 1:
        fields.problems.append(f"{key}={value}: layers that differ are not computed here")
    return value[0]


def _scaling(fields: Fields) -> Config | None:
    """Return rope_scaling, or None."""
    factor = fields.take("rope.scaling.factor", fields.take("rope.scale_linear", 0.0))
    kind = fields.take("rope.scaling.type", "linear")
    original = fields.take("rope.scaling.original_context_length", fields.take("context_length"))
    if kind == "yarn":
        for key, value in (
            ("yarn_ext_factor", 1.0), ("yarn_attn_factor", 1.0), ("attn_factor", 1.0), ("yarn_log_multiplier", 0.0)
        ):  # fmt: skip
            fields.expect(f"rope.scaling.{key}", value)
        return {
            "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original,
            "beta_fast": fields.take("rope.scaling.yarn_beta_fast"),
            "beta_slow": fields.take("rope.scaling.yarn_beta_slow"),
        }  # fmt: skip
    if kind not in ("linear", "none"):
        fields.problems.append(f"rope.scaling.type={kind!r}: known are none, linear, yarn")
    return None if kind != "linear" or factor in (0.0, 1.0) else {"rope_type": "linear", "factor": factor}


def _llama(fields: Fields, file: GgufFile) -> Config:
    """Llama, and Mistral, which differs by its window."""
    found: Config = {}
    if window := fields.take("attention.sliding_window", 0):
        found = {"model_type": "mistral", "sliding_window": window}
    elif "blk.0.attn_q.bias" in file.tensors:
        found = {"attention_bias": True, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}
    tensor = file.tensors.get(FREQUENCIES)
    if tensor is not None and tensor.data is not None:
        if fields.take("rope.scaling.factor", 0.0) not in (0.0, 1.0):
            fields.problems.append(f"{FREQUENCIES} beside rope.scaling.factor: only one of them is computed here")
        found["rope_scaling"] = _frequencies(fields, read(tensor).astype(np.float64))
    return found


def _frequencies(fields: Fields, factors: np.ndarray) -> Config:
    """Return rope_scaling from the divisor of each frequency.

    All published Llamas from 3.1 on have these numbers with one rule, which only the divisors are left of; others are
    passed on as they are, which "longrope" with a single list means.
    """
    theta, longest = fields.take("rope.freq_base", 10_000.0), fields.need("context_length")
    rule = {
        "rope_type": "llama3", "factor": float(f"{factors.max():.6g}"), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    turns = rule["original_max_position_embeddings"] * theta ** (-np.arange(len(factors)) / len(factors)) / math.tau
    smooth = np.clip((turns - 1) / (4 - 1), 0, 1)
    if np.allclose(1 / ((1 - smooth) / rule["factor"] + smooth), factors, rtol=1e-5, atol=0):  # written as float32
        return rule
    listed = factors.tolist()
    return {
        "rope_type": "longrope", "short_factor": listed, "long_factor": listed, "attention_factor": 1.0,
        "original_max_position_embeddings": longest,
    }  # fmt: skip


def _gemma3(fields: Fields, file: GgufFile) -> Config:
    window, every = fields.take("attention.sliding_window", 0), fields.take("attention.sliding_window_pattern") or 6
    n_layers = fields.need("block_count")
    sliding = every if isinstance(every, list) else [bool((i + 1) % every) for i in range(n_layers)]
    return {
        "sliding_window": window or None, "layer_types": [SLIDING if each and window else FULL for each in sliding],
        "query_pre_attn_scalar": _query_scalar(fields, GEMMA3_LARGE),
    }  # fmt: skip


def _query_scalar(fields: Fields, large: int) -> int:
    """Return query_pre_attn_scalar, which no key has: llama.cpp, too, tells the 27B models by their depth."""
    width, heads = fields.need("embedding_length"), _uniform(fields, "attention.head_count")
    is_large = fields.need("block_count") == large
    return width // heads if is_large else fields.take("attention.key_length", width // heads)


OWN: Mapping[str, Callable[[Fields, GgufFile], Config]] = {
    "llama": _llama, "gemma3": _gemma3,
    "gemma2": lambda fields, file: {"query_pre_attn_scalar": _query_scalar(fields, GEMMA2_LARGE)},
}  # fmt: skip
ARCHITECTURES = {name: Vocabulary.of(entry) for name, entry in entries("gguf.yaml").items()}
