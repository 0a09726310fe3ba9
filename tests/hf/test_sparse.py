"""Families with experts: published files, shapes and counts without allocation, what is refused, and many devices."""

import math

import jax
import numpy as np
import pytest

from jaxllm.core.tree import named_leaves
from jaxllm.hf.checkpoint import Checkpoint, Writer
from jaxllm.hf.families import FAMILIES
from jaxllm.hf.table import names, stacked, stored_shape
from jaxllm.hf.weights import read_params, sizes_of, write_params
from jaxllm.layers.config import Experts, Groups, LatentAttention, Rope
from jaxllm.models import presets
from jaxllm.models.build import abstract_params
from jaxllm.models.config import DenseLayers, ModelConfig
from jaxllm.sharding.config import MeshConfig
from jaxllm.sharding.mesh import make_mesh
from jaxllm.training.state import param_shardings

CONFIG = ModelConfig(
    vocab_size=40, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, d_ff=24, max_seq_len=32,
    ffn=Experts(number=4, top_k=2, balance=0.001),
)  # fmt: skip
DEEPSEEK = CONFIG.model_copy(
    update={
        "n_layers": 3, "n_kv_heads": 4, "head_dim": 10, "positions": Rope(interleaved=True),
        "mla": LatentAttention(rank=12, query_rank=8, rotated=4, value_dim=6), "dense": DenseLayers(number=1, d_ff=40),
        "ffn": Experts(number=4, top_k=2, score="sigmoid", biased=True, groups=Groups(number=2, top_k=1), shared=1),
    }
)  # fmt: skip
CONFIGS = {
    "mixtral": CONFIG, "qwen3_moe": CONFIG.model_copy(update={"qk_norm": "head"}), "deepseek_v3": DEEPSEEK,
    "gpt_oss": CONFIG.model_copy(update={"bias": True, "sinks": True}),
}  # fmt: skip
COMMON = {
    "attention_dropout": 0.0, "hidden_act": "silu", "initializer_range": 0.02, "num_attention_heads": 32,
    "output_router_logits": False, "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "use_cache": True,
}  # fmt: skip
# config.json of mistralai/Mixtral-8x7B-v0.1, Qwen/Qwen3-30B-A3B, deepseek-ai/DeepSeek-V3 (less its quantisation) and
# openai/gpt-oss-20b, less what concerns tokens.
PUBLISHED = {
    "mixtral-8x7b": {
        **COMMON, "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000,
        "max_position_embeddings": 32768, "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "num_local_experts": 8, "rms_norm_eps": 1e-05, "router_aux_loss_coef": 0.02,
    },
    "qwen3-30b-a3b": {
        **COMMON, "model_type": "qwen3_moe", "attention_bias": False, "decoder_sparse_step": 1, "head_dim": 128,
        "hidden_size": 2048, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
        "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_scaling": None, "router_aux_loss_coef": 0.001, "use_sliding_window": False, "vocab_size": 151936,
    },
    "deepseek-v3": {
        **COMMON, "model_type": "deepseek_v3", "attention_bias": False, "aux_loss_alpha": 0.0001, "ep_size": 1,
        "first_k_dense_replace": 3, "hidden_size": 7168, "intermediate_size": 18432, "kv_lora_rank": 512,
        "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
        "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
        "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
        "rope_scaling": {
            "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "seq_aux": True,
        "topk_group": 4, "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
    },
    "gpt-oss-20b": {
        **{key: value for key, value in COMMON.items() if key != "torch_dtype"}, "model_type": "gpt_oss",
        "attention_bias": True, "experts_per_token": 4, "head_dim": 64, "hidden_size": 2880,
        "initial_context_length": 4096, "intermediate_size": 2880, "max_position_embeddings": 131072,
        "layer_types": ["sliding_attention", "full_attention"] * 12, "num_attention_heads": 64,
        "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8, "num_local_experts": 32,
        "rms_norm_eps": 1e-05, "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128,
        "swiglu_limit": 7.0, "vocab_size": 201088,
        "quantization_config": {
            "modules_to_not_convert": [
                "model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"
            ],
            "quant_method": "mxfp4",
        },
        "rope_scaling": {
            "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
            "rope_type": "yarn", "truncate": False,
        },
    },
}  # fmt: skip
COUNTS = {"mixtral-8x7b": 46_702_792_704, "qwen3-30b-a3b": 30_532_122_624, "gpt-oss-20b": 20_914_757_184,
          "deepseek-v3": 671_026_419_200}  # fmt: skip


def parse(raw):
    return FAMILIES[raw["model_type"]].parse(raw, "config.json")


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_a_published_config_is_the_preset_and_its_tensors_hold_every_parameter(name, count):
    raw, config = PUBLISHED[name], presets.get(name)
    assert parse(raw).model_copy(update={"head_dim": config.head_dim}) == config
    sizes, leaves = sizes_of(config), named_leaves(abstract_params(config))
    rows = FAMILIES[raw["model_type"]].rows(config)
    assert {row.ours for row in rows} == set(leaves)
    shapes = {}  # of a tensor that several rows share, once
    for row in rows:
        shapes |= dict.fromkeys(names(row, sizes), stored_shape(row, leaves[row.ours].shape[stacked(row) :], sizes))
    assert sum(map(math.prod, shapes.values())) == count


def test_tensors_of_an_expert_have_the_published_names_and_shapes():
    expected_of = {
        "mixtral-8x7b": {"experts.7.w2.weight": (4096, 14336), "gate.weight": (8, 4096)},
        "qwen3-30b-a3b": {"experts.127.up_proj.weight": (768, 2048), "gate.weight": (128, 2048)},
        "deepseek-v3": {"experts.255.down_proj.weight": (7168, 2048), "gate.e_score_correction_bias": (256,)},
        "gpt-oss-20b": {
            "experts.gate_up_proj": (32, 2880, 5760), "experts.gate_up_proj_bias": (32, 5760),
            "experts.down_proj": (32, 2880, 2880), "experts.down_proj_bias": (32, 2880),
            "router.weight": (32, 2880), "router.bias": (32,),
        },
    }  # fmt: skip
    for (name, expected), layer in zip(expected_of.items(), ("block_sparse_moe", "mlp", "mlp", "mlp"), strict=True):
        config = presets.get(name)
        sizes, leaves = sizes_of(config), named_leaves(abstract_params(config))
        found = {}
        for row in FAMILIES[PUBLISHED[name]["model_type"]].rows(config):
            shape = stored_shape(row, leaves[row.ours].shape[stacked(row) :], sizes)
            found |= dict.fromkeys(names(row, sizes), shape)
        assert {key: found[f"model.layers.5.{layer}.{key}"] for key in expected} == expected


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("mixtral-8x7b", {"router_jitter_noise": 0.1}, r"router_jitter_noise=0\.1: only 0\.0 is computed"),
        ("mixtral-8x7b", {"norm_topk_prob": True}, "norm_topk_prob=True: unknown"),
        ("mixtral-8x7b", {"num_experts_per_tok": 9}, "top_k=9 is more than number=8 experts"),
        ("qwen3-30b-a3b", {"decoder_sparse_step": 2}, "decoder_sparse_step=2: only 1 is computed"),
        ("qwen3-30b-a3b", {"mlp_only_layers": [0]}, r"mlp_only_layers=\[0\]: only \[\] is computed"),
        ("qwen3-30b-a3b", {"attention_bias": True}, "attention_bias=True: only False"),
        ("qwen3-30b-a3b", {"num_local_experts": 8}, "num_experts=128 and num_local_experts=8"),
        ("qwen3-30b-a3b", {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64: unknown"),
        ("deepseek-v3", {"topk_method": "greedy"}, "topk_method='greedy': only 'noaux_tc'"),
        ("deepseek-v3", {"scoring_func": "softmax"}, "scoring_func='softmax': only 'sigmoid'"),
        ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq=2: only 1"),
        ("deepseek-v3", {"head_dim": 192}, "head_dim=192: only 64"),
        ("deepseek-v3", {"num_key_value_heads": 8}, "mla has keys for each head"),
        ("deepseek-v3", {"n_group": 7}, "groups have the same number"),
        ("deepseek-v3", {"first_k_dense_replace": 61}, "dense is for the first of n_layers=61"),
        ("deepseek-v3", {"index_topk": 2048}, "index_topk=2048: unknown"),
        ("gpt-oss-20b", {"attention_bias": False}, "attention_bias=False: only True"),
        ("gpt-oss-20b", {"experts_per_token": 8}, "experts_per_token=8 and num_experts_per_tok=4"),
        ("gpt-oss-20b", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config.quant_method='fp8'"),
        ("gpt-oss-20b", {"quantization_config": {"group_size": 16}}, "quantization_config.group_size=16"),
        ("gpt-oss-20b", {"layer_types": ["chunked_attention"] * 24}, "layer_types has chunked_attention"),
        ("gpt-oss-20b", {"mlp_bias": True}, "mlp_bias=True: unknown"),
        ("mixtral-8x7b", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config={.*}: unknown"),
        ("qwen3-30b-a3b", {"layer_types": ["full_attention"]}, r"layer_types=\['full_attention'\]: unknown"),
    ],
)
def test_what_is_computed_otherwise_is_refused(name, change, message):
    with pytest.raises(ValueError, match=message):
        parse(PUBLISHED[name] | change)


def test_all_that_is_wrong_is_listed_at_once():
    with pytest.raises(ValueError, match=r"(?s)decoder_sparse_step=2.*mlp_only_layers=\[3\].*n_shared_experts=1"):
        parse(PUBLISHED["qwen3-30b-a3b"] | {"decoder_sparse_step": 2, "mlp_only_layers": [3], "n_shared_experts": 1})


def test_returning_router_logits_changes_nothing():
    for raw in PUBLISHED.values():
        assert parse(raw | {"output_router_logits": True}) == parse(raw)


def test_the_window_of_qwen3_moe_is_that_of_every_layer():
    raw = PUBLISHED["qwen3-30b-a3b"] | {"sliding_window": 512, "use_sliding_window": True}
    assert parse(raw).window.size == 512
    assert parse(raw).window.layers == (True,)
    assert parse(raw | {"use_sliding_window": False}).window is None


def test_mixtral_has_no_words_for_weights_that_do_not_sum_to_one():
    config = presets.get("mixtral-8x7b", ffn={"kind": "experts", "number": 8, "top_k": 2, "renormalise": False})
    with pytest.raises(ValueError, match=r"ffn\.renormalise=False: only True in this family"):
        FAMILIES["mixtral"].write(config)


def test_the_layer_that_predicts_a_second_token_is_left_out_and_no_other(tmp_path, drawn):
    family, rows = FAMILIES["deepseek_v3"], FAMILIES["deepseek_v3"].rows(DEEPSEEK)

    def read(*more):
        writer = Writer(tmp_path)
        write_params(drawn(DEEPSEEK), rows, DEEPSEEK, writer)
        for name in more:
            writer.add(name, np.zeros(3, np.float32))
        writer.close()
        return read_params(family.open(Checkpoint(tmp_path), DEEPSEEK), rows, DEEPSEEK)

    jax.tree.map(np.testing.assert_array_equal, read("model.layers.3.eh_proj.weight"), read())
    with pytest.raises(ValueError, match=r"model\.layers\.4\.enorm\.weight: not part of this model"):
        read("model.layers.4.enorm.weight")
    assert family.write(DEEPSEEK)["num_nextn_predict_layers"] == 0


def test_deepseek_has_no_words_for_layers_without_a_shared_expert():
    config = DEEPSEEK.model_copy(update={"ffn": DEEPSEEK.ffn.model_copy(update={"shared": 0})})
    with pytest.raises(ValueError, match="shared experts in every layer"):
        FAMILIES["deepseek_v3"].write(config)


def test_gpt_oss_without_a_word_on_positions_has_those_of_its_class():
    raw = {key: value for key, value in PUBLISHED["gpt-oss-20b"].items() if not key.startswith("rope")}
    assert parse(raw).positions == presets.get("gpt-oss-20b").positions


@pytest.mark.parametrize("devices", [1, 8])
def test_what_experts_are_chosen_by_is_never_narrowed(devices, tmp_path, drawn):
    """As transformers keeps e_score_correction_bias and gate.weight of DeepSeek-V3."""
    rows, params = FAMILIES["deepseek_v3"].rows(DEEPSEEK), drawn(DEEPSEEK)
    noise = jax.random.normal(jax.random.key(0), (2, 4))
    params["blocks"]["ffn"]["choice_bias"] = noise
    writer = Writer(tmp_path)
    write_params(params, rows, DEEPSEEK, writer)
    writer.close()
    shardings = None if devices == 1 else param_shardings(DEEPSEEK, make_mesh(MeshConfig(expert=2, fsdp=4)))
    again = named_leaves(read_params(Checkpoint(tmp_path), rows, DEEPSEEK, shardings, "bfloat16"))
    exact = {name for name, leaf in again.items() if leaf.dtype == "float32"}
    assert exact == {"blocks/ffn/choice_bias", "blocks/ffn/router"}
    assert {str(leaf.dtype) for leaf in again.values()} == {"float32", "bfloat16"}
    np.testing.assert_array_equal(again["blocks/ffn/choice_bias"], noise)


@pytest.mark.parametrize("model_type", list(CONFIGS))
def test_experts_are_read_onto_the_devices_that_own_them(model_type, tmp_path, drawn):
    config = CONFIGS[model_type]
    rows, params = FAMILIES[model_type].rows(config), drawn(config)
    writer = Writer(tmp_path)
    write_params(params, rows, config, writer)
    writer.close()
    mesh = make_mesh(MeshConfig(expert=2, fsdp=2, data=2))
    again = named_leaves(read_params(Checkpoint(tmp_path), rows, config, param_shardings(config, mesh)))
    for name, leaf in named_leaves(params).items():
        np.testing.assert_array_equal(again[name], leaf)
    experts = again["blocks/ffn/experts/up"]
    assert {shard.data.shape[1] for shard in experts.addressable_shards} == {2}
    assert len(jax.devices()) == 8


@pytest.mark.parametrize("broken", ["model.layers.1.mlp.experts.3.up_proj.weight", "model.layers.0.mlp.gate.weight"])
def test_a_tensor_of_an_expert_that_is_missing_or_misshaped_is_named(broken, tmp_path, drawn):
    config = CONFIGS["qwen3_moe"]
    rows = FAMILIES["qwen3_moe"].rows(config)
    writer = Writer(tmp_path)
    write_params(drawn(config), rows, config, writer)
    writer.close()
    tensors = dict(Checkpoint(tmp_path))
    for change, message in ((lambda _: None, "missing"), (lambda x: x[:2], "shape")):
        writer = Writer(tmp_path)
        for name, tensor in tensors.items():
            if name != broken:
                writer.add(name, tensor)
            elif change(tensor) is not None:
                writer.add(name, change(tensor))
        writer.close()
        with pytest.raises(ValueError, match=rf"{broken}: {message}"):
            read_params(Checkpoint(tmp_path), rows, config)
