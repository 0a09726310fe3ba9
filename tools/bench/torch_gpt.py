"""The peer: a plain PyTorch Llama-type model in the manner of nanoGPT, of exactly the shape of jaxllm's decoder.

It is what a good PyTorch user would write for a CPU, not a straw man: one product for q, k and v, fused causal
attention, fused AdamW, no logits copy. Eager, float32.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


@dataclass(frozen=True)
class GptConfig:
    """Shape, with the field names of jaxllm's ModelConfig."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    max_seq_len: int
    n_kv_heads: int | None = None
    tie_embeddings: bool = True
    ffn: str = "gated"  # "gated" (SwiGLU) or "plain" (GELU)
    theta: float = 10_000.0
    eps: float = 1e-6


def rope_table(config: GptConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (cos, sin), [T, H/2], for halves rotated as in GPT-NeoX."""
    width = config.d_model // config.n_heads
    frequencies = config.theta ** (-torch.arange(0, width, 2, dtype=torch.float32) / width)
    angles = torch.arange(config.max_seq_len, dtype=torch.float32)[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x[i], x[i + H/2]) of [B, N, T, H]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Block(nn.Module):
    """x += attention(norm(x)); x += ffn(norm(x))."""

    def __init__(self, config: GptConfig):
        super().__init__()
        d_model, self.n_heads = config.d_model, config.n_heads
        self.n_kv_heads = config.n_kv_heads or config.n_heads
        self.width = d_model // config.n_heads
        self.attention_norm = nn.RMSNorm(d_model, eps=config.eps)
        self.qkv = nn.Linear(d_model, (self.n_heads + 2 * self.n_kv_heads) * self.width, bias=False)
        self.o = nn.Linear(d_model, d_model, bias=False)
        self.ffn_norm = nn.RMSNorm(d_model, eps=config.eps)
        self.gated = config.ffn == "gated"
        self.gate = nn.Linear(d_model, config.d_ff, bias=False) if self.gated else None
        self.up = nn.Linear(d_model, config.d_ff, bias=False)
        self.down = nn.Linear(config.d_ff, d_model, bias=False)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """[B, T, D] -> [B, T, D]."""
        batch, length, d_model = x.shape
        heads = self.qkv(self.attention_norm(x)).view(batch, length, -1, self.width).transpose(1, 2)
        q, k, v = heads.split((self.n_heads, self.n_kv_heads, self.n_kv_heads), dim=1)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.n_kv_heads != self.n_heads)
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, d_model))
        h = self.ffn_norm(x)
        h = F.silu(self.gate(h)) * self.up(h) if self.gated else F.gelu(self.up(h), approximate="tanh")
        return x + self.down(h)


class Gpt(nn.Module):
    """Decoder-only Transformer with the training loss built in."""

    def __init__(self, config: GptConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.final_norm = nn.RMSNorm(config.d_model, eps=config.eps)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        cos, sin = rope_table(config)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        out_std = 0.02 * (2 * config.n_layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.dim() >= 2:
                nn.init.normal_(weight, std=out_std if name.endswith(("o.weight", "down.weight")) else 0.02)
        if config.tie_embeddings:
            self.head.weight = self.embed.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy in nats; a target of -1 is not counted."""
        x = self.embed(tokens)
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, cos, sin)
        logits = self.head(self.final_norm(x))
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.reshape(-1), ignore_index=-1)


def load_jaxllm(model: Gpt, path: str) -> None:
    """Copy the parameters that jaxllm wrote to an npz file of {path name: array}, blocks stacked on a leading axis."""
    arrays = np.load(path)
    width = model.config.d_model
    used = set()

    def put(parameter: nn.Parameter, *names: str, layer: int | None = None) -> None:
        parts = [arrays[name] if layer is None else arrays[name][layer] for name in names]
        used.update(names)
        if parameter.dim() == 2 and not names[0].startswith(("embed", "head")):
            fan_in = parameter.shape[1]
            parts = [part.reshape(fan_in, -1).T for part in parts]
        value = torch.from_numpy(np.ascontiguousarray(np.concatenate(parts)))
        if value.shape != parameter.shape:
            raise ValueError(f"{names} has shape {tuple(value.shape)}, the model's parameter {tuple(parameter.shape)}")
        parameter.data.copy_(value)

    put(model.embed.weight, "embed/table")
    put(model.final_norm.weight, "final_norm/scale")
    if not model.config.tie_embeddings:
        put(model.head.weight, "head")
    for i, block in enumerate(model.blocks):
        put(block.attention_norm.weight, "blocks/attention_norm/scale", layer=i)
        put(block.ffn_norm.weight, "blocks/ffn_norm/scale", layer=i)
        put(block.qkv.weight, *(f"blocks/attention/{n}/kernel" for n in "qkv"), layer=i)
        for linear, name in (
            (block.o, "attention/o"),
            (block.gate, "ffn/gate"),
            (block.up, "ffn/up"),
            (block.down, "ffn/down"),
        ):
            if linear is not None:
                put(linear.weight, f"blocks/{name}/kernel", layer=i)
    if set(arrays.files) != used:
        raise ValueError(f"{path} holds parameters that a model of width {width} lacks: {set(arrays.files) - used}")


def make_optimizer(model: Gpt, optim: dict[str, float]) -> torch.optim.AdamW:
    """Fused AdamW whose weight decay is for matrices."""
    weights = list(model.parameters())
    groups = [
        {"params": [w for w in weights if w.dim() >= 2], "weight_decay": optim["weight_decay"]},
        {"params": [w for w in weights if w.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim["lr"], betas=(optim["b1"], optim["b2"]), eps=optim["eps"], fused=True)


def learning_rate(step: int, steps: int, peak: float, schedule: dict[str, float]) -> float:
    """Linear warm-up, then half a cosine: jaxllm's `Cosine`."""
    warmup = min(schedule["warmup"], steps)
    progress = min(max((step - warmup) / max(1, steps - warmup), 0.0), 1.0)
    fall = schedule["final"] + (1 - schedule["final"]) * 0.5 * (1 + math.cos(math.pi * progress))
    return peak * min(1.0, (step + 1) / warmup if warmup else 1.0) * fall


def train_step(
    model: nn.Module, optimizer: torch.optim.AdamW, tokens: torch.Tensor, targets: torch.Tensor, lr: float, clip: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """One update; returns (loss, gradient norm), not synchronised further than a CPU is anyway."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = model(tokens, targets)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach(), norm
