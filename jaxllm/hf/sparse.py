"""Families with experts: a dense family whose feed-forward layers are a router and many small ones."""

from typing import Any

from jaxllm.hf.fields import Fields
from jaxllm.hf.rows import LAYER, llama_rows
from jaxllm.hf.table import Row
from jaxllm.layers.config import Experts, SlidingWindow
from jaxllm.models.config import ModelConfig


def read_mixtral(fields: Fields, dense: ModelConfig) -> ModelConfig:
    """Return `dense` with the experts of Mixtral, whose weights always sum to one."""
    fields.expect("router_jitter_noise", 0.0)
    return _sparse(fields, dense, fields.take("num_local_experts", 8), top_k=fields.take("num_experts_per_tok", 2))


def write_mixtral(config: ModelConfig) -> dict[str, Any]:
    """Return what config.json says of the experts of Mixtral.

    Raises:
      ValueError: Mixtral has no words for something in it.
    """
    if not config.ffn.renormalise:
        raise ValueError("ffn.renormalise=False: weights of Mixtral's experts sum to one; write qwen3_moe")
    return {**_write(config.ffn), "num_local_experts": config.ffn.number, "router_jitter_noise": 0.0}


def read_qwen3_moe(fields: Fields, dense: ModelConfig) -> ModelConfig:
    """Return `dense` with the experts of Qwen3 in every layer, each of another width than a dense layer's."""
    fields.expect("decoder_sparse_step", 1)
    fields.expect("mlp_only_layers", [])
    # transformers 5 writes the second name, the published files have the first.
    names = ("num_experts", "num_local_experts")
    number, same = (fields.take(name, fields.take(other, 128)) for name, other in (names, names[::-1]))
    if number != same:
        fields.problems.append(f"num_experts={number} and num_local_experts={same}: they are the same number")
    top_k, renormalise = fields.take("num_experts_per_tok", 8), fields.take("norm_topk_prob", False)
    size = fields.get("sliding_window", 4096) if fields.take("use_sliding_window", False) else None
    fields.take("sliding_window")
    window = None if size is None else SlidingWindow(size=size)
    dense = dense.model_copy(update={"d_ff": fields.take("moe_intermediate_size", 768), "window": window})
    return _sparse(fields, dense, number, top_k=top_k, renormalise=renormalise)


def write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    """Return what config.json says of the experts of Qwen3, and of its window."""
    window = config.window
    return {
        **_write(config.ffn), "num_experts": config.ffn.number, "num_local_experts": config.ffn.number,
        "moe_intermediate_size": config.d_ff, "norm_topk_prob": config.ffn.renormalise, "decoder_sparse_step": 1,
        "mlp_only_layers": [], "use_sliding_window": window is not None,
        "sliding_window": window.size if window else None, "attention_bias": False,
    }  # fmt: skip


def _sparse(fields: Fields, dense: ModelConfig, number: int, **rest: Any) -> ModelConfig:
    fields.take("output_router_logits")  # what a forward pass returns beside the logits
    balance = fields.take("router_aux_loss_coef", 0.001)
    ffn = Experts(number=number, activation=dense.ffn.activation, balance=balance, **rest)
    return dense.model_copy(update={"ffn": ffn})


def _write(ffn: Experts) -> dict[str, Any]:
    return {
        "num_experts_per_tok": ffn.top_k, "router_aux_loss_coef": ffn.balance, "output_router_logits": False,
    }  # fmt: skip


def mixtral_rows(config: ModelConfig) -> list[Row]:
    """Return the rows of Mixtral."""
    return _rows(config, "block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"})


def qwen3_moe_rows(config: ModelConfig) -> list[Row]:
    """Return the rows of a Qwen3 with experts."""
    return _rows(config, "mlp", {name: f"{name}_proj" for name in ("gate", "up", "down")})


def _rows(config: ModelConfig, theirs: str, names: dict[str, str]) -> list[Row]:
    """Return Llama's rows with a router, and with a tensor for each kernel of each expert."""
    rows = [row for row in llama_rows(config) if not row.ours.startswith("blocks/ffn/")]
    rows.append(Row("blocks/ffn/router", f"{LAYER}.{theirs}.gate.weight", "experts embed -> embed experts"))
    for ours, name in names.items():
        order = "embed mlp -> mlp embed" if ours == "down" else "mlp embed -> embed mlp"
        rows.append(Row(f"blocks/ffn/experts/{ours}", f"{LAYER}.{theirs}.experts.{{expert}}.{name}.weight", order))
    return rows
