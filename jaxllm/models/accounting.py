"""What a model costs, from its config alone: parameters, floating-point operations, bytes. Nothing is allocated."""

import math
from collections.abc import Mapping

from jaxllm.core.tree import named_leaves
from jaxllm.layers.config import Experts, Plain, RelativeBias
from jaxllm.layers.kernels import LONG, query_blocks
from jaxllm.models.build import AnyConfig, abstract_params
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.models.encoder_config import EncoderConfig
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.models.views import layer_traits

# Dense bfloat16 peak of one device, FLOP/s, by the start of JAX's device_kind; from the makers' data sheets.
PEAK_FLOPS = {
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5p": 459e12, "TPU v5": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12, "TPU7x": 2307e12,
    "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12, "NVIDIA B200": 2250e12,
}  # fmt: skip


def peak_flops(device_kind: str) -> float | None:
    """Return the dense bfloat16 peak of a device, FLOP/s; None where it is not known (CPU)."""
    return next((peak for name, peak in PEAK_FLOPS.items() if device_kind.startswith(name)), None)


def _halves(config: AnyConfig) -> list[tuple[ModelConfig, int]]:
    """Return the stacks of blocks, and how many halves of a square the attention of a layer is: causal 1, full 2."""
    match config:
        case EncoderConfig(stack=stack):
            return [(stack, 2)]
        case Seq2SeqConfig(encoder=encoder, decoder=decoder):
            return [(encoder, 2), (decoder, 3)]
    return [(config, 1)]


def param_count(config: AnyConfig) -> int:
    """Return the number of parameters; a tied matrix counts once."""
    return sum(math.prod(leaf.shape) for leaf in named_leaves(abstract_params(config)).values())


def active_param_count(config: AnyConfig) -> int:
    """Return the number of parameters that one token uses: of the experts, those it is sent to."""
    return sum(_active(config).values())


def _active(config: AnyConfig) -> dict[str, int]:
    """Return the parameters that one token uses, by name."""
    sizes = {name: math.prod(leaf.shape) for name, leaf in named_leaves(abstract_params(config)).items()}
    if isinstance(config, ModelConfig) and isinstance(config.ffn, Experts):
        used = lambda size: size // config.ffn.number * config.ffn.top_k
        sizes = {name: used(size) if "/experts/" in name else size for name, size in sizes.items()}
    return sizes


def flops_per_token(config: AnyConfig, seq_len: int) -> float:
    """Return the model FLOPs of training on one token (forward and backward, no recomputation).

    6 N + 3 L T N_heads (H + U), with N the active parameters in matrix products (all but token and position tables), U
    the width of values (H, for most), and causal attention counted half (twice that is the full square, as encoders and
    cross-attention have it), of which a window of W tokens leaves 1 - (1 - W / T)^2. Of an encoder-decoder, a token is
    one of the source and one of the target.
    Source: Chowdhery et al. 2022 (PaLM), appendix B.
    """
    lookups = ("position_embed/table", "type_embed/table", *["embed/table"] * (not config.tie_embeddings))
    multiplied = sum(size for name, size in _active(config).items() if not name.endswith(lookups))
    attention = sum(
        3 * squares * half.depth * seq_len * half.n_heads * (half.head_width + half.value_width) * _seen(half, seq_len)
        for half, squares in _halves(config)
    )
    return 6.0 * multiplied + attention


def _seen(config: ModelConfig, seq_len: int) -> float:
    """Return the share of what a token sees that windows leave of it, the mean over layers."""
    hidden = max(0.0, 1.0 - config.window.size / seq_len) ** 2 if config.window else 0.0
    return 1.0 - hidden * sum(layer.windowed for layer in layer_traits(config)) / config.n_layers


def activation_bytes(
    config: AnyConfig, compute: ComputeConfig, rows: int, seq_len: int, square: bool = True
) -> dict[str, int]:  # fmt: skip
    """Estimate the bytes that training holds at its peak beside parameters and the like, before any sharding.

    Args:
      compute: resolved for the platform, as `dtype` decides the width of activations.
      rows: of one microbatch on one device; seq_len: tokens of a row.
      square: attention keeps its weights, as XLA's does of rows that are not too long; kernels keep none.
    Returns:
      activations (kept for the backward pass, and its working set), logits (of one loss chunk, with their gradient).
      With the gradients it is within a factor of 1.5 of XLA's own account on a CPU; of experts only where groups have a
      kernel, because on a CPU `ragged_dot` makes a copy of the rows for each expert.
    """
    width = 2 if compute.dtype == "bfloat16" else 4
    kept = working = 0.0
    for half, _ in _halves(config):
        stacks, shape = half.stacks(), (width, rows, seq_len, square)
        of_half = sum(len(stack.layers) * _kept_bytes(stack.config, compute.remat, *shape) for stack in stacks)
        kept += of_half * half.depth / half.n_layers
        working = max(working, *(layer_bytes(stack.config, *shape) for stack in stacks))
    return {
        # The backward pass works on one whole layer.
        "activations": int(kept + working),
        "logits": rows * min(seq_len, compute.loss_chunk) * config.vocab_size * (4 + width),
    }


def _kept_bytes(config: ModelConfig, remat: str, width: int, rows: int, seq_len: int, square: bool) -> int:
    """Return the bytes that a layer keeps for its backward pass."""
    if remat == "none":
        return layer_bytes(config, width, rows, seq_len, square)
    kept = config.d_model
    if remat == "dots":
        products = config.d_ff * (1 if isinstance(config.ffn, Plain) else 2)
        if isinstance(config.ffn, Experts):
            products = config.ffn.top_k * (products + config.d_model) + config.ffn.shared * products
        keys = config.kv_heads * (config.head_width + config.value_width)
        kept = 2 * config.d_model + config.n_heads * config.head_width + keys + _latent_widths(config) + products
    return width * rows * seq_len * kept


def _latent_widths(config: ModelConfig) -> int:
    latent = config.mla
    return latent.rank + latent.rotated + (latent.query_rank or 0) if latent else 0


def layer_bytes(config: ModelConfig, width: int, rows: int, seq_len: int, square: bool = True) -> int:
    """Return the bytes that the backward pass of one layer reads, where nothing is recomputed.

    Per token: two norms (float32) and their outputs, queries, the attention's output by head and by token, latents
    before and after their norm, six arrays of the feed-forward layer, a float32 sum per head; of each of its experts
    their six arrays, input and output. Per block of queries: the keys and values it sees, the weights; without
    a square, or of rows that are too long for one, keys and values once.
    """
    keys = config.kv_heads * (config.head_width + config.value_width)
    heads = config.n_heads * (config.head_width + 2 * config.value_width) + 2 * _latent_widths(config)
    ffn = 6 * config.d_ff
    if isinstance(config.ffn, Experts):
        ffn = config.ffn.top_k * (ffn + 2 * config.d_model) + config.ffn.shared * ffn
    per_token = 2 * (4 + width) * config.d_model + width * (heads + ffn) + 4 * config.n_heads
    short = (square and seq_len <= LONG) or isinstance(config.positions, RelativeBias)
    blocks = query_blocks(seq_len) if short else []
    seen = sum(stop for _, stop in blocks) or seq_len
    weights = config.n_heads * sum((stop - start) * stop for start, stop in blocks)
    return rows * (seq_len * per_token + width * (keys * seen + weights))


def memory_line(sizes: Mapping[str, float]) -> str:
    """Return bytes by category as text: "4.1 GB: parameters 1.0 GB, optimizer 2.0 GB, logits 66.1 MB, ..."."""
    units = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0, "B"))
    amount = lambda size: next(f"{size / (unit or 1):.1f} {name}" for unit, name in units if size >= unit)
    return f"{amount(sum(sizes.values()))}: " + ", ".join(f"{key} {amount(size)}" for key, size in sizes.items())
