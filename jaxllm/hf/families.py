"""The families: how a config.json is read and written, and where the parameters are. One entry per model_type."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxllm.hf import sparse
from jaxllm.hf.fields import Fields
from jaxllm.hf.ropes import read_rope, read_scaling, write_rope
from jaxllm.hf.rows import gpt2_rows, llama_rows, neox_rows
from jaxllm.hf.table import Row
from jaxllm.layers.config import Gated, LayerNorm, Learned, Plain, RMSNorm, Rope, SlidingWindow
from jaxllm.models.config import ModelConfig

ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh", "relu": "relu",
}  # fmt: skip
NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}
SLIDING, FULL = "sliding_attention", "full_attention"


class Family(NamedTuple):
    """A model_type of transformers.

    Attributes:
      architecture: its class with a language-model head.
      read: config.json to ModelConfig; write: back, beside what `write_common` writes; rows: the table of its weights.
    """

    model_type: str
    architecture: str
    read: Callable[[Fields], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    rows: Callable[[ModelConfig], list[Row]]

    def parse(self, raw: Mapping[str, Any], name: str) -> ModelConfig:
        """Return the architecture that a config.json describes.

        Args:
          name: what errors call it.
        Raises:
          ValueError: something in it is not understood; the message lists everything.
        """
        fields = Fields(raw)
        config = self.read(fields)
        fields.finish(name)
        return config


def _common(
    fields: Fields, *, tie: bool = False, theta: float = 10_000.0, groups: int | None = None, **rest: Any
) -> dict[str, Any]:
    """What Llama and its heirs call the same; `rest` has what a family adds.

    Args:
      tie, theta, groups: what it means by silence about tie_word_embeddings, rope_theta and num_key_value_heads.
    """
    n_heads, width = fields.need("num_attention_heads"), fields.need("hidden_size")
    read = {
        "vocab_size": fields.need("vocab_size"), "d_model": width, "n_layers": fields.need("num_hidden_layers"),
        "n_heads": n_heads, "n_kv_heads": fields.get("num_key_value_heads", groups) or n_heads,
        "head_dim": fields.take("head_dim", width // n_heads), "d_ff": fields.need("intermediate_size"),
        "max_seq_len": fields.need("max_position_embeddings"),
        "tie_embeddings": fields.take("tie_word_embeddings", tie),
        "init_std": fields.take("initializer_range", 0.02),
    }  # fmt: skip
    if "positions" not in rest:
        read["positions"] = read_rope(fields, theta)
    if "norm" not in rest:
        read["norm"] = RMSNorm(eps=fields.take("rms_norm_eps", 1e-6))
    if "ffn" not in rest:
        read["ffn"] = Gated(activation=fields.among("hidden_act", ACTIVATIONS, "silu"))
    return read | rest


def _write_common(config: ModelConfig) -> dict[str, Any]:
    written = {
        "vocab_size": config.vocab_size, "hidden_size": config.d_model, "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads, "num_key_value_heads": config.kv_heads, "head_dim": config.head_width,
        "intermediate_size": config.d_ff, "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": config.tie_embeddings, "initializer_range": config.init_std,
        "hidden_act": NAMES[config.ffn.activation], "attention_dropout": 0.0,
    }  # fmt: skip
    if isinstance(config.positions, Rope):
        rope = write_rope(config.positions)
        written |= {"rope_parameters": rope, "rope_theta": config.positions.theta}
        if config.positions.scaling is not None:
            written["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if isinstance(config.norm, RMSNorm):
        written["rms_norm_eps"] = config.norm.eps
    return written


def _window(
    fields: Fields, n_layers: int, default: Callable[[int], bool], size: int | None = None
) -> SlidingWindow | None:
    """Return the window of some layers, by layer_types or by the family's rule."""
    size = fields.get("sliding_window", size)
    kinds = fields.take("layer_types", [SLIDING if default(i) else FULL for i in range(n_layers)])
    if unknown := set(kinds) - {SLIDING, FULL}:
        fields.problems.append(f"layer_types has {', '.join(sorted(unknown))}: known are {SLIDING}, {FULL}")
    layers = tuple(kind == SLIDING for kind in kinds)
    return SlidingWindow(size=size, layers=_shortest(layers)) if size is not None and any(layers) else None


def _window_everywhere(fields: Fields, size: int | None = None) -> SlidingWindow | None:
    """Return the window of all layers; `size` is what absence means."""
    size = fields.get("sliding_window", size)
    return None if size is None else SlidingWindow(size=size)


def _shortest(pattern: tuple[bool, ...]) -> tuple[bool, ...]:
    """Return the shortest pattern whose repetition is this one."""
    n = len(pattern)
    return next(pattern[:k] for k in range(1, n + 1) if all(pattern[i] == pattern[i % k] for i in range(n)))


def _layer_types(config: ModelConfig) -> list[str]:
    layers = config.window.layers if config.window else (False,)
    return [SLIDING if layers[i % len(layers)] else FULL for i in range(config.n_layers)]


def _read_llama(fields: Fields) -> ModelConfig:
    attention, mlp = fields.take("attention_bias", False), fields.take("mlp_bias", False)
    _check_width(fields)
    if mlp and not attention:
        fields.problems.append(
            "mlp_bias=True without attention_bias: only all biases or those of attention are computed"
        )
    return ModelConfig(**_common(fields, bias="attention" if attention and not mlp else bool(attention)))


def _check_width(fields: Fields) -> None:
    """Refuse what transformers refuses for this family, so that nothing is exported which it cannot load."""
    if fields.need("hidden_size") % fields.need("num_attention_heads"):
        fields.problems.append("hidden_size is no multiple of num_attention_heads")


def _write_llama(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.bias in (True, "attention"), "mlp_bias": config.bias is True}


def _read_mistral(fields: Fields) -> ModelConfig:
    return ModelConfig(**_common(fields, groups=8, window=_window_everywhere(fields, 4096)))


def _write_mistral(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.window.size if config.window else None}


def _read_mixtral(fields: Fields) -> ModelConfig:
    norm = RMSNorm(eps=fields.take("rms_norm_eps", 1e-5))
    dense = ModelConfig(**_common(fields, groups=8, norm=norm, window=_window_everywhere(fields)))
    return sparse.read_mixtral(fields, dense)


def _read_qwen(fields: Fields, **variant: Any) -> ModelConfig:
    sliding, first = fields.take("use_sliding_window", False), fields.take("max_window_layers", 28)
    n_layers = fields.take("num_hidden_layers")
    window = _window(fields, n_layers, lambda i: sliding and i >= first, 4096)
    return ModelConfig(**_common(fields, window=window if sliding else None, **variant))


def _read_qwen3(fields: Fields) -> ModelConfig:
    fields.expect("attention_bias", False)
    return _read_qwen(fields, qk_norm="head", **({} if "head_dim" in fields else {"head_dim": 128}))


def _read_qwen3_moe(fields: Fields) -> ModelConfig:
    fields.expect("attention_bias", False)
    return sparse.read_qwen3_moe(fields, ModelConfig(**_common(fields, groups=4, qk_norm="head")))


def _write_qwen(config: ModelConfig) -> dict[str, Any]:
    window = config.window
    return {
        "use_sliding_window": window is not None, "sliding_window": window.size if window else None,
        "layer_types": _layer_types(config), "max_window_layers": config.n_layers,
    }  # fmt: skip


def _gemma_common(fields: Fields, groups: int | None = None, **rest: Any) -> ModelConfig:
    _check_width(fields)
    fields.expect("attention_bias", False)
    fields.expect("use_bidirectional_attention", False)
    key = "hidden_activation" if "hidden_activation" in fields else "hidden_act"
    # In the first Gemma's hidden_act, "gelu" is a legacy value of the official releases that means the approximation.
    table = ACTIVATIONS | ({"gelu": "gelu_tanh"} if key == "hidden_act" else {})
    activation = fields.among(key, table, "gelu_pytorch_tanh")
    fields.take("hidden_act")
    norm = RMSNorm(eps=fields.take("rms_norm_eps", 1e-6), offset=1.0)
    head_dim = fields.take("head_dim", 256)
    return ModelConfig(
        **_common(
            fields, tie=True, groups=groups, norm=norm, ffn=Gated(activation=activation), head_dim=head_dim,
            embed_scale=fields.take("hidden_size") ** 0.5, **rest,
        )
    )  # fmt: skip


def _read_gemma2(fields: Fields) -> ModelConfig:
    window = _window(fields, fields.take("num_hidden_layers"), lambda i: i % 2 == 0, 4096)
    return _gemma_common(
        fields, groups=4, norm_placement="sandwich", window=window,
        score_scale=fields.take("query_pre_attn_scalar", 256) ** -0.5,
        score_softcap=fields.get("attn_logit_softcapping", 50.0),
        logit_softcap=fields.get("final_logit_softcapping", 30.0),
    )  # fmt: skip


def _read_gemma3(fields: Fields) -> ModelConfig:
    every = fields.take("sliding_window_pattern", fields.take("_sliding_window_pattern", 6))
    window = _window(fields, fields.take("num_hidden_layers"), lambda i: bool((i + 1) % every), 4096)
    nested, local_theta = fields.take("rope_parameters"), fields.take("rope_local_base_freq", 10_000.0)
    if nested is not None and FULL in nested:
        fields.take("rope_theta")
        fields.take("rope_scaling")
        whole, local = dict(nested[FULL]), dict(nested.get(SLIDING, {}))
        theta, local_theta = whole.pop("rope_theta", 1e6), local.pop("rope_theta", 10_000.0)
        if (kind := local.pop("rope_type", "default")) != "default":
            fields.problems.append(f"rope_parameters.{SLIDING}.rope_type={kind!r}: only 'default' is computed here")
        scaling = read_scaling(whole, fields, fields.take("max_position_embeddings"))
        rope = Rope(theta=theta, scaling=scaling)
    else:
        rope = read_rope(fields, 1e6)
    rope = rope.model_copy(update={"local_theta": local_theta if window else None})
    return _gemma_common(
        fields, groups=4, norm_placement="sandwich", window=window,
        score_scale=fields.take("query_pre_attn_scalar", 256) ** -0.5,
        score_softcap=fields.take("attn_logit_softcapping"), logit_softcap=fields.take("final_logit_softcapping"),
        qk_norm="head", positions=rope,
    )  # fmt: skip


def _write_gemma(config: ModelConfig) -> dict[str, Any]:
    written = {"hidden_activation": NAMES[config.ffn.activation], "attention_bias": False}
    if config.norm_placement == "sandwich":
        written |= {
            "layer_types": _layer_types(config), "sliding_window": config.window.size if config.window else None,
            "query_pre_attn_scalar": _whole(config.scale**-2), "attn_logit_softcapping": config.score_softcap,
            "final_logit_softcapping": config.logit_softcap,
        }  # fmt: skip
    return written


def _write_gemma3(config: ModelConfig) -> dict[str, Any]:
    rope, local = write_rope(config.positions), config.positions.local_theta
    both = {FULL: rope, SLIDING: {"rope_type": "default", "rope_theta": local or 10_000.0}}
    return _write_gemma(config) | {"rope_parameters": both, "rope_local_base_freq": local}


def _whole(x: float) -> float | int:
    return round(x) if abs(x - round(x)) < 1e-6 * x else x


def _read_phi3(fields: Fields) -> ModelConfig:
    window = _window_everywhere(fields)
    norm, rope = RMSNorm(eps=fields.take("rms_norm_eps", 1e-5)), read_rope(fields, 10_000.0, 1.0)
    return ModelConfig(**_common(fields, norm=norm, positions=rope, window=window))


def _write_phi3(config: ModelConfig) -> dict[str, Any]:
    scaling = getattr(config.positions, "scaling", None)
    original = {} if scaling is None else {"original_max_position_embeddings": scaling.original_len}
    return {"partial_rotary_factor": config.positions.fraction} | original | _write_mistral(config)


def _read_olmo2(fields: Fields) -> ModelConfig:
    fields.expect("attention_bias", False)
    norm = RMSNorm(eps=fields.take("rms_norm_eps", 1e-5))
    return ModelConfig(**_common(fields, norm=norm, norm_placement="out", qk_norm="width"))


def _read_smollm3(fields: Fields) -> ModelConfig:
    fields.expect("attention_bias", False)
    fields.expect("mlp_bias", False)
    n_layers, every = fields.take("num_hidden_layers"), fields.take("no_rope_layer_interval", 4)
    rotated = fields.take("no_rope_layers", [int((i + 1) % every != 0) for i in range(n_layers)])
    skipped = _shortest(tuple(not each for each in rotated))
    sliding = fields.take("use_sliding_window", False)
    window = _window(fields, n_layers, lambda i: sliding and not rotated[i])
    rope = read_rope(fields, 2e6, skipped=skipped)
    return ModelConfig(**_common(fields, tie=True, groups=4, positions=rope, window=window))


def _write_smollm3(config: ModelConfig) -> dict[str, Any]:
    skipped = config.positions.skipped
    rotated = [int(not skipped[i % len(skipped)]) for i in range(config.n_layers)]
    return {"no_rope_layers": rotated, "attention_bias": False, "mlp_bias": False} | {
        key: value for key, value in _write_qwen(config).items() if key != "max_window_layers"
    }


def _read_starcoder2(fields: Fields) -> ModelConfig:
    norm = LayerNorm(eps=fields.take("norm_epsilon", 1e-5))
    ffn = Plain(activation=fields.among("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"))
    window = _window_everywhere(fields)
    bias = fields.take("use_bias", True)
    std = fields.take("initializer_range", 0.018042)
    return ModelConfig(
        **_common(fields, tie=True, groups=2, norm=norm, ffn=ffn, window=window, bias=bias, init_std=std)
    )


def _write_starcoder2(config: ModelConfig) -> dict[str, Any]:
    return {"norm_epsilon": config.norm.eps, "use_bias": config.bias is True} | _write_mistral(config)


def _read_neox(fields: Fields) -> ModelConfig:
    fields.expect("attention_bias", True)
    _check_width(fields)
    norm = LayerNorm(eps=fields.take("layer_norm_eps", 1e-5))
    ffn = Plain(activation=fields.among("hidden_act", ACTIVATIONS, "gelu"))
    rope = read_rope(fields, 10_000.0, 0.25)
    parallel = fields.take("use_parallel_residual", True)
    return ModelConfig(**_common(fields, norm=norm, ffn=ffn, positions=rope, bias=True, parallel=parallel))


def _write_neox(config: ModelConfig) -> dict[str, Any]:
    return {
        "layer_norm_eps": config.norm.eps, "use_parallel_residual": config.parallel, "attention_bias": True,
        "rotary_pct": config.positions.fraction, "rotary_emb_base": config.positions.theta,
    }  # fmt: skip


def _read_gpt2(fields: Fields) -> ModelConfig:
    fields.expect("scale_attn_weights", True)
    fields.expect("scale_attn_by_inverse_layer_idx", False)
    fields.expect("add_cross_attention", False)
    fields.expect("tie_word_embeddings", True)
    d_model, n_heads = fields.take("n_embd", 768), fields.take("n_head", 12)
    fields.take("n_ctx")
    return ModelConfig(
        vocab_size=fields.take("vocab_size", 50257), d_model=d_model, n_layers=fields.take("n_layer", 12),
        n_heads=n_heads, n_kv_heads=n_heads, head_dim=d_model // n_heads, d_ff=fields.take("n_inner", 4 * d_model),
        max_seq_len=fields.take("n_positions", 1024), norm=LayerNorm(eps=fields.take("layer_norm_epsilon", 1e-5)),
        positions=Learned(), bias=True, tie_embeddings=True,
        ffn=Plain(activation=fields.among("activation_function", ACTIVATIONS, "gelu_new")),
        init_std=fields.take("initializer_range", 0.02),
    )  # fmt: skip


def _write_gpt2(config: ModelConfig) -> dict[str, Any]:
    activation = {"gelu_tanh": "gelu_new"}.get(config.ffn.activation, config.ffn.activation)
    return {
        "vocab_size": config.vocab_size, "n_embd": config.d_model, "n_layer": config.n_layers,
        "n_head": config.n_heads, "n_inner": config.d_ff, "n_positions": config.max_seq_len,
        "layer_norm_epsilon": config.norm.eps, "activation_function": activation, "tie_word_embeddings": True,
        "initializer_range": config.init_std,
    }  # fmt: skip


def _llama_like(write: Callable[[ModelConfig], dict[str, Any]]) -> Callable[[ModelConfig], dict[str, Any]]:
    return lambda config: _write_common(config) | write(config)


FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "LlamaForCausalLM", _read_llama, _llama_like(_write_llama), llama_rows),
        Family("mistral", "MistralForCausalLM", _read_mistral, _llama_like(_write_mistral), llama_rows),
        Family("qwen2", "Qwen2ForCausalLM", lambda f: _read_qwen(f, bias="qkv"), _llama_like(_write_qwen), llama_rows),
        Family("qwen3", "Qwen3ForCausalLM", _read_qwen3, _llama_like(_write_qwen), llama_rows),
        Family(
            "mixtral", "MixtralForCausalLM", _read_mixtral,
            _llama_like(lambda c: sparse.write_mixtral(c) | _write_mistral(c)), sparse.mixtral_rows,
        ),
        Family(
            "qwen3_moe", "Qwen3MoeForCausalLM", _read_qwen3_moe, _llama_like(sparse.write_qwen3_moe),
            sparse.qwen3_moe_rows,
        ),
        Family("gemma", "GemmaForCausalLM", _gemma_common, _llama_like(_write_gemma), llama_rows),
        Family("gemma2", "Gemma2ForCausalLM", _read_gemma2, _llama_like(_write_gemma), llama_rows),
        Family("gemma3_text", "Gemma3ForCausalLM", _read_gemma3, _llama_like(_write_gemma3), llama_rows),
        Family(
            "phi3", "Phi3ForCausalLM", _read_phi3, _llama_like(_write_phi3), lambda c: llama_rows(c, fused=True)
        ),
        Family("olmo2", "Olmo2ForCausalLM", _read_olmo2, _llama_like(lambda _: {"attention_bias": False}), llama_rows),
        Family("smollm3", "SmolLM3ForCausalLM", _read_smollm3, _llama_like(_write_smollm3), llama_rows),
        Family(
            "starcoder2", "Starcoder2ForCausalLM", _read_starcoder2, _llama_like(_write_starcoder2),
            lambda c: llama_rows(c, up="c_fc", down="c_proj"),
        ),
        Family("gpt_neox", "GPTNeoXForCausalLM", _read_neox, _llama_like(_write_neox), neox_rows),
        Family("gpt2", "GPT2LMHeadModel", _read_gpt2, _write_gpt2, gpt2_rows),
    )
}  # fmt: skip
