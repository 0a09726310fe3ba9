"""Rows that families share: where Llama's heirs keep each parameter of ours."""

from collections.abc import Iterator

from jaxllm.hf.table import Part, Row
from jaxllm.layers.config import Gated, LayerNorm
from jaxllm.models.config import ModelConfig

LAYER = "model.layers.{layer}"
QUERIES, KEYS = "heads head_dim", "kv_heads head_dim"


def llama_rows(
    config: ModelConfig, *, o: str = "o_proj", up: str = "up_proj", down: str = "down_proj", fused: bool = False
) -> list[Row]:
    """Return the rows of a Llama-type checkpoint.

    Args:
      o, up, down: names that differ by family.
      fused: q, k and v are one tensor, gate and up another (Phi-3).
    """
    rows = [Row("embed/table", "model.embed_tokens.weight", "vocab embed -> vocab embed")]
    rows += norm_rows(config, "final_norm", "model.norm")
    if not config.tie_embeddings:
        rows.append(Row("head", "lm_head.weight", "vocab embed -> vocab embed"))
    for ours, theirs in block_norms(config).items():
        rows += norm_rows(config, f"blocks/{ours}", f"{LAYER}.{theirs}")
    if config.qk_norm != "none":
        rows += norm_rows(config, "blocks/attention/q_norm", f"{LAYER}.self_attn.q_norm")
        rows += norm_rows(config, "blocks/attention/k_norm", f"{LAYER}.self_attn.k_norm")
    rows += fused_rows(config) if fused else [*attention_rows(config), *gate_up_rows(config, up)]
    rows += linear(
        "blocks/attention/o", f"{LAYER}.self_attn.{o}", QUERIES, "embed", bias=config.bias in (True, "attention")
    )
    rows += linear("blocks/ffn/down", f"{LAYER}.mlp.{down}", "mlp", "embed", bias=config.bias is True)
    return rows


def block_norms(config: ModelConfig) -> dict[str, str]:
    """Return {our norm: theirs}; the same word means different places in Gemma 2 and in OLMo-2."""
    if config.norm_placement == "pre":
        return {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
    after = {"attention_out_norm": "post_attention_layernorm", "ffn_out_norm": "post_feedforward_layernorm"}
    before = {"attention_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
    return after if config.norm_placement == "out" else before | after


def norm_rows(config: ModelConfig, ours: str, theirs: str) -> Iterator[Row]:
    """Yield the scale, and the bias of a LayerNorm."""
    yield Row(f"{ours}/scale", f"{theirs}.weight", "width -> width")
    if isinstance(config.norm, LayerNorm):
        yield Row(f"{ours}/bias", f"{theirs}.bias", "width -> width")


def linear(ours: str, theirs: str, inputs: str, outputs: str, *, bias: bool) -> Iterator[Row]:
    """Yield the rows of a torch Linear, whose weight is [outputs, inputs]."""
    yield Row(f"{ours}/kernel", f"{theirs}.weight", f"({outputs}) ({inputs}) -> {inputs} {outputs}")
    if bias:
        yield Row(f"{ours}/bias", f"{theirs}.bias", f"({outputs}) -> {outputs}")


def attention_rows(config: ModelConfig) -> Iterator[Row]:
    """Yield q, k and v."""
    for name, outputs in (("q", QUERIES), ("k", KEYS), ("v", KEYS)):
        theirs = f"{LAYER}.self_attn.{name}_proj"
        yield from linear(f"blocks/attention/{name}", theirs, "embed", outputs, bias=bool(config.bias))


def gate_up_rows(config: ModelConfig, up: str) -> Iterator[Row]:
    """Yield the projections into the feed-forward layer."""
    if isinstance(config.ffn, Gated):
        yield from linear("blocks/ffn/gate", f"{LAYER}.mlp.gate_proj", "embed", "mlp", bias=config.bias is True)
    yield from linear("blocks/ffn/up", f"{LAYER}.mlp.{up}", "embed", "mlp", bias=config.bias is True)


def fused_rows(config: ModelConfig) -> Iterator[Row]:
    """Yield q, k, v from one tensor, gate and up from another."""
    queries, keys = config.n_heads * config.head_width, config.kv_heads * config.head_width
    for index, (name, outputs) in enumerate((("q", QUERIES), ("k", KEYS), ("v", KEYS))):
        part = Part(0, index, (queries, keys, keys))
        order = f"({outputs}) embed -> embed {outputs}"
        yield Row(f"blocks/attention/{name}/kernel", f"{LAYER}.self_attn.qkv_proj.weight", order, part)
    for index, name in enumerate(("gate", "up")):
        part = Part(0, index, (config.d_ff, config.d_ff))
        yield Row(f"blocks/ffn/{name}/kernel", f"{LAYER}.mlp.gate_up_proj.weight", "mlp embed -> embed mlp", part)


def gpt2_rows(config: ModelConfig) -> list[Row]:
    """Return the rows of GPT-2, whose weights are [inputs, outputs] and whose q, k and v are one tensor."""
    layer, width = "transformer.h.{layer}", config.n_heads * config.head_width
    rows = [
        Row("embed/table", "transformer.wte.weight", "vocab embed -> vocab embed"),
        Row("position_embed/table", "transformer.wpe.weight", "length embed -> length embed"),
        *norm_rows(config, "final_norm", "transformer.ln_f"),
        *norm_rows(config, "blocks/attention_norm", f"{layer}.ln_1"),
        *norm_rows(config, "blocks/ffn_norm", f"{layer}.ln_2"),
    ]
    for index, name in enumerate("qkv"):
        ours, theirs = f"blocks/attention/{name}", f"{layer}.attn.c_attn"
        part = (index, (width,) * 3)
        rows.append(Row(f"{ours}/kernel", f"{theirs}.weight", f"embed ({QUERIES}) -> embed {QUERIES}", Part(1, *part)))
        rows.append(Row(f"{ours}/bias", f"{theirs}.bias", f"({QUERIES}) -> {QUERIES}", Part(0, *part)))
    for ours, theirs, inputs, outputs in (
        ("attention/o", "attn.c_proj", QUERIES, "embed"), ("ffn/up", "mlp.c_fc", "embed", "mlp"),
        ("ffn/down", "mlp.c_proj", "mlp", "embed"),
    ):  # fmt: skip
        order = f"({inputs}) ({outputs}) -> {inputs} {outputs}"
        rows.append(Row(f"blocks/{ours}/kernel", f"{layer}.{theirs}.weight", order))
        rows.append(Row(f"blocks/{ours}/bias", f"{layer}.{theirs}.bias", f"({outputs}) -> {outputs}"))
    return rows


def neox_rows(config: ModelConfig) -> list[Row]:
    """Return the rows of GPT-NeoX, whose q, k and v are one tensor, interleaved by head."""
    layer, width = "gpt_neox.layers.{layer}", config.n_heads * config.head_width
    rows = [
        Row("embed/table", "gpt_neox.embed_in.weight", "vocab embed -> vocab embed"),
        *norm_rows(config, "final_norm", "gpt_neox.final_layer_norm"),
        *norm_rows(config, "blocks/attention_norm", f"{layer}.input_layernorm"),
        *norm_rows(config, "blocks/ffn_norm", f"{layer}.post_attention_layernorm"),
        *linear("blocks/attention/o", f"{layer}.attention.dense", QUERIES, "embed", bias=True),
        *linear("blocks/ffn/up", f"{layer}.mlp.dense_h_to_4h", "embed", "mlp", bias=True),
        *linear("blocks/ffn/down", f"{layer}.mlp.dense_4h_to_h", "mlp", "embed", bias=True),
    ]
    if not config.tie_embeddings:
        rows.append(Row("head", "embed_out.weight", "vocab embed -> vocab embed"))
    theirs = f"{layer}.attention.query_key_value"
    for index, name in enumerate("qkv"):
        ours, part = f"blocks/attention/{name}", Part(0, index, (width,) * 3)
        whole = "(heads three head_dim) embed -> (three heads head_dim) embed"
        rows.append(Row(f"{ours}/kernel", f"{theirs}.weight", f"({QUERIES}) embed -> embed {QUERIES}", part, whole))
        whole = "(heads three head_dim) -> (three heads head_dim)"
        rows.append(Row(f"{ours}/bias", f"{theirs}.bias", f"({QUERIES}) -> {QUERIES}", part, whole))
    return rows
