"""What a model costs, from its config alone: parameters, floating-point operations, bytes. Nothing is allocated."""

import math

from jaxllm.core.tree import named_leaves
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.models.decoder import abstract_params

# Dense bfloat16 peak of one device, FLOP/s, by the start of JAX's device_kind; from the makers' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12, "TPU7x": 2307e12,
    "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12,
}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
    """Return the dense bfloat16 peak of a device, FLOP/s; None where it is not known (CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if device_kind.startswith(name)), None)


def param_count(config: ModelConfig) -> int:
    """Return the number of parameters; a tied matrix counts once."""
    return sum(math.prod(leaf.shape) for leaf in named_leaves(abstract_params(config)).values())


def matmul_param_count(config: ModelConfig) -> int:
    """Return the parameters that each token is multiplied with: all but lookups (token and position tables)."""
    lookups = ("position_embed/table",) if config.tie_embeddings else ("position_embed/table", "embed/table")
    return sum(
        math.prod(leaf.shape) for name, leaf in named_leaves(abstract_params(config)).items() if name not in lookups
    )


def flops_per_token(config: ModelConfig, seq_len: int) -> float:
    """Return the model FLOPs of training on one token (forward and backward, no recomputation).

    6 N + 6 L T N_heads H, with N the parameters in matrix products, and causal attention counted half
    (12 L T N_heads H would be the full square). Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    attention = 6 * config.n_layers * seq_len * config.n_heads * config.head_width
    return 6.0 * matmul_param_count(config) + attention


def training_bytes(config: ModelConfig, compute: ComputeConfig, tokens: int, moments: int = 2) -> dict[str, int]:
    """Estimate the bytes of training on `tokens` tokens per device, before any sharding, by category.

    Args:
      moments: float32 optimizer arrays per parameter (AdamW 2, Muon 1 for matrices).
    Returns:
      parameters, gradients, optimizer, activations (kept for the backward pass), logits (of one loss chunk).
    """
    count = param_count(config)
    width = 2 if compute.dtype == "bfloat16" else 4
    heads = (config.n_heads + 2 * config.kv_heads) * config.head_width
    saved = {
        "none": 6 * config.d_model + 2 * heads + 4 * config.d_ff,
        "dots": 3 * config.d_model + heads + 2 * config.d_ff,
        "full": config.d_model,
    }[compute.remat]
    return {
        "parameters": 4 * count,
        "gradients": 4 * count,
        "optimizer": 4 * count * moments,
        "activations": width * tokens * saved * config.n_layers,
        "logits": 3 * 4 * min(tokens, compute.loss_chunk) * config.vocab_size,
    }
