"""Published model shapes by name, as plain data."""

import difflib
from typing import Any

from jaxllm.models.config import ModelConfig

_LLAMA = {"norm": {"kind": "rms", "eps": 1e-5}}
_GPT = {
    "norm": {"kind": "layer"}, "positions": {"kind": "learned"}, "ffn": {"kind": "plain"}, "bias": True,
    "tie_embeddings": True, "vocab_size": 50257,
}  # fmt: skip


def _llama(d_model: int, n_layers: int, n_heads: int, d_ff: int, **rest: Any) -> dict[str, Any]:
    shape = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_ff": d_ff}
    return {**_LLAMA, "vocab_size": 32000, "max_seq_len": 4096, **shape, **rest}


def _llama3(d_model: int, n_layers: int, n_heads: int, d_ff: int) -> dict[str, Any]:
    rope = {"kind": "rope", "theta": 500_000.0}
    return _llama(d_model, n_layers, n_heads, d_ff, n_kv_heads=8, vocab_size=128256, max_seq_len=8192, positions=rope)


def _gpt(d_model: int, n_layers: int, n_heads: int, max_seq_len: int, head_dim: int | None = None) -> dict[str, Any]:
    shape = {"d_model": d_model, "n_layers": n_layers, "n_heads": n_heads, "d_ff": 4 * d_model, "head_dim": head_dim}
    return {**_GPT, "max_seq_len": max_seq_len, **shape}


# Shapes: Touvron et al. 2023 (Llama 2, table 1), Dubey et al. 2024 (Llama 3, table 3), Radford et al. 2019 (GPT-2,
# table 2), Brown et al. 2020 (GPT-3, table 2.1; dense attention in every layer here), Jiang et al. 2024 (Mixtral, table
# 1), Yang et al. 2025 (Qwen3, table 2; sizes from its config.json). The tiny ones are ours.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": _llama(64, 2, 4, 176, max_seq_len=128, vocab_size=512, tie_embeddings=True),
    "quickstart": _llama(
        128, 4, 4, 256, max_seq_len=256, vocab_size=1280, tie_embeddings=True, qk_norm="head", embed_scale=128**0.5
    ),
    "llama-3m": _llama(256, 4, 4, 688, max_seq_len=512, vocab_size=4096, tie_embeddings=True),
    "llama-15m": _llama(384, 8, 6, 1024, max_seq_len=1024, vocab_size=8192, tie_embeddings=True),
    "llama-110m": _llama(768, 12, 12, 2048, max_seq_len=1024),
    "llama2-7b": _llama(4096, 32, 32, 11008),
    "llama2-13b": _llama(5120, 40, 40, 13824),
    "llama2-70b": _llama(8192, 80, 64, 28672, n_kv_heads=8),
    "llama3-8b": _llama3(4096, 32, 32, 14336),
    "llama3-70b": _llama3(8192, 80, 64, 28672),
    "mixtral-8x7b": _llama(
        4096,
        32,
        32,
        14336,
        n_kv_heads=8,
        max_seq_len=32768,
        positions={"kind": "rope", "theta": 1e6},
        ffn={"kind": "experts", "number": 8, "top_k": 2, "balance": 0.02},
    ),
    "qwen3-30b-a3b": _llama(
        2048,
        48,
        32,
        768,
        n_kv_heads=4,
        head_dim=128,
        vocab_size=151936,
        max_seq_len=40960,
        qk_norm="head",
        norm={"kind": "rms", "eps": 1e-6},
        positions={"kind": "rope", "theta": 1e6},
        ffn={"kind": "experts", "number": 128, "top_k": 8, "balance": 0.001},
    ),
    "gpt2-124m": _gpt(768, 12, 12, 1024),
    "gpt2-355m": _gpt(1024, 24, 16, 1024),
    "gpt2-774m": _gpt(1280, 36, 20, 1024),
    "gpt2-1.5b": _gpt(1600, 48, 25, 1024),
    "gpt3-125m": _gpt(768, 12, 12, 2048),
    "gpt3-350m": _gpt(1024, 24, 16, 2048),
    "gpt3-760m": _gpt(1536, 24, 16, 2048),
    "gpt3-1.3b": _gpt(2048, 24, 16, 2048),  # published as 24 heads of 128, which is neither d_model nor 1.3B
    "gpt3-2.7b": _gpt(2560, 32, 32, 2048),
    "gpt3-6.7b": _gpt(4096, 32, 32, 2048),
    "gpt3-13b": _gpt(5120, 40, 40, 2048),  # published as d_model 5140, which is not 40 heads of 128
    "gpt3-175b": _gpt(12288, 96, 96, 2048),
}


def raw(name: str) -> dict[str, Any]:
    """Return the fields of preset `name`, for overriding.

    Raises:
      ValueError: unknown name; the message has the nearest ones.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=3, cutoff=0.3)
        raise ValueError(
            f"unknown model preset {name!r}; did you mean {' or '.join(near) or 'one of ' + ', '.join(PRESETS)}?"
        )
    return dict(PRESETS[name])


def get(name: str, **overrides: Any) -> ModelConfig:
    """Return preset `name` with some fields replaced: get("llama2-7b", n_layers=2)."""
    return ModelConfig.model_validate({**raw(name), **overrides})
