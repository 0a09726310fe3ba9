"""The families: how a config.json is read and written, and where the parameters are. One entry per model_type.

The entries are data, in families.yaml; here is what they share, and what a family says in words of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from jaxllm.hf.checkpoint import Tensors
from jaxllm.hf.fields import ACTIVATIONS, NAMES, Fields, Vocabulary, entries
from jaxllm.hf.fp8 import scaled
from jaxllm.hf.mxfp4 import unpacked
from jaxllm.hf.ropes import ORIGINAL, read_rope, read_scaling, write_rope
from jaxllm.hf.rows import rows_of, sizes_of
from jaxllm.hf.table import Row, names
from jaxllm.layers.config import Rope
from jaxllm.models.config import ModelConfig

BUFFERS = r".*(rotary_emb\.inv_freq|\.(attn|attention)\.(masked_)?bias)$"  # constants that old files have
SLIDING, FULL = "sliding_attention", "full_attention"
Found = dict[str, Any]  # {field of ModelConfig: value}, of nested ones as "norm.eps"


class Family(NamedTuple):
    """A model_type of transformers.

    Attributes:
      architecture: its class with a language-model head.
      words: what it says as everyone does. rope: what it means by leaving out theta, and the rotated share; empty: it
        has other positions, or says it otherwise.
      tensors, transposed, interleaved: see families.yaml and `rows.rows_of`.
      extra_layer: files may have a layer behind the last one, which predicts a second token (MTP) and is left out.
    """

    model_type: str
    architecture: str
    words: Vocabulary
    tensors: Mapping[str, str]
    rope: tuple[float, ...] = ()
    transposed: bool = False
    interleaved: bool = False
    extra_layer: bool = False

    def parse(self, raw: Mapping[str, Any], name: str) -> ModelConfig:
        """Return the architecture that a config.json describes; errors as of `Fields.finish`, which call it `name`."""
        fields = Fields(raw)
        found = self.words.read(fields)
        if self.rope:
            found |= read_rope(fields, *self.rope)
        for own in OWN.get(self.model_type, ()):
            found |= own.read(fields)
        width, heads = found["d_model"], found["n_heads"]
        for field, absent in (("n_kv_heads", heads), ("head_dim", width // (heads or 1)), ("d_ff", 4 * width)):
            found[field] = absent if found.get(field) is None else found[field]
        if found.get("window.size") is None:
            found = {field: value for field, value in found.items() if not field.startswith("window.")}
        return fields.build(ModelConfig, found, self.words.keys, name)

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the config.json of an architecture, less what every model has.

        Raises:
          ValueError, KeyError, TypeError, AttributeError: this family has no words for something in it.
        """
        written = self.words.write(config.explicit())
        if isinstance(config.positions, Rope):
            rope = write_rope(config.positions)
            written |= {"rope_parameters": rope, "rope_theta": config.positions.theta}
            if config.positions.scaling is not None:
                written["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
        for own in OWN.get(self.model_type, ()):
            written |= own.write(config)
        return written

    def rows(self, config: ModelConfig) -> list[Row]:
        """Return where each parameter is in the checkpoint."""
        return rows_of(self.tensors, config, transposed=self.transposed, interleaved=self.interleaved)

    def open(self, checkpoint: Tensors, config: ModelConfig) -> Tensors:
        """Return the checkpoint under the table's names; errors as of `Tensors.under`.

        Files saved from the model without its head lack the first word, and some have a copy of a tied head.
        """
        wanted = {name for row in self.rows(config) for name in names(row, sizes_of(config))}
        table = f"{self.tensors['embed']}.weight"
        copies = {f"{self.tensors.get('head', 'lm_head')}.weight": table} if config.tie_embeddings else {}
        ignored = rf"{BUFFERS}|layers\.{config.n_layers}\." if self.extra_layer else BUFFERS
        tensors = scaled(unpacked(checkpoint))
        return tensors.under(wanted, first=table.partition(".")[0], copies=copies, ignored=ignored)


class Own(NamedTuple):
    """Something that no table can say: read from a config.json, and written."""

    read: Callable[[Fields], Found]
    write: Callable[[ModelConfig], dict[str, Any]] = lambda config: {}


def _whole_heads(fields: Fields) -> Found:
    """Refuse what transformers refuses for this family, so that nothing is exported which it cannot load."""
    if fields.need("hidden_size") % fields.need("num_attention_heads"):
        fields.problems.append("hidden_size is no multiple of num_attention_heads")
    return {}


def _read_biases(fields: Fields) -> Found:
    attention, mlp = fields.take("attention_bias", False), fields.take("mlp_bias", False)
    if mlp and not attention:
        fields.problems.append(
            "mlp_bias=True without attention_bias: only all biases or those of attention are computed"
        )
    return {"bias": "attention" if attention and not mlp else bool(attention)}


def _write_biases(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.bias in (True, "attention"), "mlp_bias": config.bias is True}


def _read_layers(fields: Fields, default: Callable[[int], bool]) -> Found:
    """Return which layers have the window, by layer_types or by the family's rule."""
    kinds = _each_layer(fields, "layer_types", lambda i: SLIDING if default(i) else FULL)
    if unknown := {str(kind) for kind in kinds} - {SLIDING, FULL}:
        fields.problems.append(f"layer_types has {', '.join(sorted(unknown))}: known are {SLIDING}, {FULL}")
    layers = tuple(kind == SLIDING for kind in kinds)
    return {"window.layers": _shortest(layers)} if any(layers) else {"window.size": None}


def _each_layer(fields: Fields, key: str, default: Callable[[int], Any]) -> list[Any]:
    """Return a list of something for each layer, which is the family's rule where the key is absent."""
    n_layers = int(fields.need("num_hidden_layers"))
    ruled = [default(i) for i in range(n_layers)]
    given = fields.take(key, ruled)
    if len(given) == n_layers:
        return given
    if fields.take("num_hidden_layers") == n_layers:  # else that is what is wrong
        fields.problems.append(f"{key} has {len(given)} entries: must be as many as num_hidden_layers={n_layers}")
    return ruled


def _write_layers(config: ModelConfig) -> dict[str, Any]:
    layers = config.window.layers if config.window else (False,)
    return {"layer_types": [SLIDING if layers[i % len(layers)] else FULL for i in range(config.n_layers)]}


def _shortest(pattern: tuple[bool, ...]) -> tuple[bool, ...]:
    """Return the shortest pattern whose repetition is this one."""
    n = len(pattern)
    return next(pattern[:k] for k in range(1, n + 1) if all(pattern[i] == pattern[i % k] for i in range(n)))


def _read_last_layers(fields: Fields) -> Found:
    sliding, first = fields.take("use_sliding_window", False), fields.take("max_window_layers", 28)
    return _read_layers(fields, lambda i: sliding and i >= first)


def _read_gemma(fields: Fields) -> Found:
    key = "hidden_activation" if "hidden_activation" in fields else "hidden_act"
    # In the first Gemma's hidden_act, "gelu" is a legacy value of the official releases that means the approximation.
    table = ACTIVATIONS | ({"gelu": "gelu_tanh"} if key == "hidden_act" else {})
    activation = fields.among(key, table, "gelu_pytorch_tanh")
    fields.take("hidden_act")
    return {"ffn.activation": activation, "embed_scale": fields.need("hidden_size") ** 0.5}


def _write_scale(config: ModelConfig) -> dict[str, Any]:
    scalar = config.scale**-2
    return {"query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar}


def _read_gemma3(fields: Fields) -> Found:
    every = fields.need("sliding_window_pattern", fields.need("_sliding_window_pattern", 6))
    found = _read_layers(fields, lambda i: bool((i + 1) % every))
    nested, local_theta = fields.take("rope_parameters", {}), fields.take("rope_local_base_freq", 10_000.0)
    if FULL in nested:
        fields.take("rope_theta")
        fields.take("rope_scaling")
        whole, local = dict(nested[FULL]), dict(nested.get(SLIDING, {}))
        theta, local_theta = whole.pop("rope_theta", 1e6), local.pop("rope_theta", 10_000.0)
        if (kind := local.pop("rope_type", "default")) != "default":
            fields.problems.append(f"rope_parameters.{SLIDING}.rope_type={kind!r}: only 'default' is computed here")
        scaling = read_scaling(whole, fields, fields.need("max_position_embeddings"))
        rope = {"positions.kind": "rope", "positions.theta": theta, "positions.scaling": scaling}
    else:
        rope = read_rope(fields, 1e6)
    has_window = "window.size" not in found and fields.get("sliding_window", True) is not None
    return found | rope | {"positions.local_theta": local_theta if has_window else None}


def _write_gemma3(config: ModelConfig) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": config.positions.local_theta or 10_000.0}
    return {**_write_layers(config), "rope_parameters": {FULL: write_rope(config.positions), SLIDING: local}}


def _write_phi3(config: ModelConfig) -> dict[str, Any]:
    scaling = config.positions.scaling
    return {} if scaling is None else {"original_max_position_embeddings": scaling.original_len}


def _read_smollm3(fields: Fields) -> Found:
    every = fields.need("no_rope_layer_interval", 4)
    rotated = _each_layer(fields, "no_rope_layers", lambda i: int((i + 1) % every != 0))
    sliding = fields.take("use_sliding_window", False)
    skipped = _shortest(tuple(not each for each in rotated))
    return {"positions.skipped": skipped, **_read_layers(fields, lambda i: sliding and not rotated[i])}


def _write_smollm3(config: ModelConfig) -> dict[str, Any]:
    skipped, switch = config.positions.skipped, {"use_sliding_window": config.window is not None}
    rotated = [int(not skipped[i % len(skipped)]) for i in range(config.n_layers)]
    return {"no_rope_layers": rotated, **switch, **_write_layers(config)}


def _read_experts(fields: Fields) -> Found:
    # transformers 5 writes the second name, the published files have the first.
    names = ("num_experts", "num_local_experts")
    number, same = (fields.take(name, fields.take(other, 128)) for name, other in (names, names[::-1]))
    if number != same:
        fields.problems.append(f"num_experts={number} and num_local_experts={same}: they are the same number")
    return {"ffn.number": number}


def _read_deepseek(fields: Fields) -> Found:
    plain, rotated = fields.take("qk_nope_head_dim", 128), fields.take("qk_rope_head_dim", 64)
    _expect_quantised(fields, quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128])
    fields.expect("head_dim", rotated)  # what transformers calls so
    fields.expect("qk_head_dim", plain + rotated)
    found = {"head_dim": plain + rotated} | read_rope(fields, 10_000.0)
    scaling = found["positions.scaling"]
    written = fields.take("rope_parameters", {}) or fields.take("rope_scaling", {})
    if scaling and scaling["kind"] == "yarn" and (mscale := written.get("mscale_all_dim")):
        scaling["score_mscale"] = mscale
    if first := fields.take("first_k_dense_replace", 3):
        found |= {"dense.number": first, "dense.d_ff": fields.take("intermediate_size")}
    number, top_k = fields.take("n_group", 8), fields.take("topk_group", 4)
    return found | ({"ffn.groups.number": number, "ffn.groups.top_k": top_k} if number > 1 else {})


def _write_deepseek(config: ModelConfig) -> dict[str, Any]:
    if not config.ffn.shared:
        raise ValueError("ffn.shared=0: this family has shared experts in every layer with experts")
    rotated, groups, dense = config.mla.rotated, config.ffn.groups, config.dense
    return {
        "qk_nope_head_dim": config.head_width - rotated, "head_dim": rotated, "qk_head_dim": config.head_width,
        "n_group": groups.number if groups else 1, "topk_group": groups.top_k if groups else 1,
        "first_k_dense_replace": dense.number if dense else 0, "intermediate_size": (dense or config).d_ff,
        "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    }  # fmt: skip


def _expect_quantised(fields: Fields, **known: Any) -> None:
    """Accept weights that are quantised in the way of this family. Which ones are, their names say."""
    how = {"quant_method": known["quant_method"], **fields.take("quantization_config", {})}
    ignored = ("modules_to_not_convert", "dequantize", "activation_scheme")  # activations stay as they are
    fields.problems += [
        f"quantization_config.{key}={value!r}: only {known} is read" for key, value in how.items()
        if key not in ignored and known.get(key) != value
    ]  # fmt: skip


def _read_gpt_oss(fields: Fields) -> Found:
    chosen = fields.take("num_experts_per_tok", 4)
    if (other := fields.take("experts_per_token", chosen)) != chosen:
        fields.problems.append(f"experts_per_token={other} and num_experts_per_tok={chosen}: they are the same number")
    _expect_quantised(fields, quant_method="mxfp4")
    if "rope_parameters" in fields or "rope_scaling" in fields:
        return {}
    yarn = {"rope_type": "yarn", "factor": 32.0, "truncate": False, ORIGINAL: 4096}
    return {"positions.scaling": read_scaling(yarn, fields, 0)}


WHOLE_HEADS, BIASES = Own(_whole_heads), Own(_read_biases, _write_biases)
LAST_LAYERS = Own(_read_last_layers, _write_layers)
SWITCH = Own(
    lambda fields: {} if fields.take("use_sliding_window", False) else {"window.size": None},
    lambda config: {"use_sliding_window": config.window is not None},
)
GEMMA = Own(
    _read_gemma, lambda config: dict.fromkeys(("hidden_act", "hidden_activation"), NAMES[config.ffn.activation])
)
SCALE = Own(lambda fields: {"score_scale": fields.need("query_pre_attn_scalar", 256) ** -0.5}, _write_scale)
EVERY_OTHER = Own(lambda fields: _read_layers(fields, lambda i: i % 2 == 0), _write_layers)
OWN: Mapping[str, tuple[Own, ...]] = {
    "llama": (WHOLE_HEADS, BIASES), "qwen2": (LAST_LAYERS, SWITCH), "qwen3": (LAST_LAYERS, SWITCH),
    "qwen3_moe": (SWITCH, Own(_read_experts)), "gemma": (WHOLE_HEADS, GEMMA),
    "gemma2": (WHOLE_HEADS, GEMMA, SCALE, EVERY_OTHER),
    "gemma3_text": (WHOLE_HEADS, GEMMA, SCALE, Own(_read_gemma3, _write_gemma3)),
    "phi3": (Own(lambda fields: {}, _write_phi3),), "smollm3": (Own(_read_smollm3, _write_smollm3),),
    "gpt_neox": (WHOLE_HEADS,), "deepseek_v3": (BIASES, Own(_read_deepseek, _write_deepseek)),
    "gpt_oss": (EVERY_OTHER, Own(_read_experts), Own(_read_gpt_oss)),
}  # fmt: skip


FAMILIES: Mapping[str, Family] = {
    name: Family(name, words=Vocabulary.of(entry), **entry) for name, entry in entries("families.yaml").items()
}
