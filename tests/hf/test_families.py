"""Families against transformers: logits, padding, loss, gradients, greedy text, and back again through an export."""

import copy
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.batch import Batch
from jaxllm.core.tree import named_leaves
from jaxllm.hf.checkpoint import Checkpoint, Writer
from jaxllm.hf.families import FAMILIES
from jaxllm.hf.table import names, stacked, take
from jaxllm.hf.weights import read_params, sizes_of, write_params
from jaxllm.layers.config import Experts
from jaxllm.models.build import bind, graph
from jaxllm.models.config import ComputeConfig
from jaxllm.training.objectives import loss_sums

WHY = "pip install 'jaxllm[parity]' compares with transformers and torch"
torch = pytest.importorskip("torch", reason=WHY)
transformers = pytest.importorskip("transformers", reason=WHY)

SIZES = {
    "vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
WITHOUT_GROUPS = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
ROPE = {"rope_theta": 10_000.0}
DEEPSEEK = {
    **SIZES, "num_key_value_heads": 4, "q_lora_rank": 40, "kv_lora_rank": 24, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 12, "v_head_dim": 20, "moe_intermediate_size": 48, "n_routed_experts": 12, "n_group": 4,
    "topk_group": 2, "num_experts_per_tok": 3, "first_k_dense_replace": 1,
}  # fmt: skip
LONG = {"short_factor": [1 + 0.1 * i for i in range(8)], "long_factor": [2 + 0.3 * i for i in range(8)]}
MODELS = {
    "llama": ("LlamaConfig", SIZES),
    "llama-tied": ("LlamaConfig", {**SIZES, "tie_word_embeddings": True, "head_dim": 32}),
    "llama-biases": ("LlamaConfig", {**SIZES, "attention_bias": True, "mlp_bias": True}),
    "llama-attention-biases": ("LlamaConfig", {**SIZES, "attention_bias": True}),
    "llama3": ("LlamaConfig", {**SIZES, "rope_parameters": {
        **ROPE, "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}}),
    "llama-linear": ("LlamaConfig", {**SIZES, "rope_parameters": {**ROPE, "rope_type": "linear", "factor": 3.0}}),
    "llama-yarn": ("LlamaConfig", {**SIZES, "rope_parameters": {
        **ROPE, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}}),
    "mistral": ("MistralConfig", {**SIZES, "sliding_window": 7}),
    "qwen2": ("Qwen2Config", {**SIZES, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}),
    "qwen3": ("Qwen3Config", SIZES),
    "mixtral": ("MixtralConfig", {**SIZES, "num_local_experts": 4, "sliding_window": 7,
        "router_aux_loss_coef": 0.5}),
    "qwen3_moe": ("Qwen3MoeConfig", {**SIZES, "head_dim": 32, "moe_intermediate_size": 48, "num_experts": 6,
        "num_experts_per_tok": 3}),
    "deepseek_v3": ("DeepseekV3Config", {**DEEPSEEK, "attention_bias": True, "rope_parameters": {
        **ROPE, "rope_type": "yarn", "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.7,
        "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1}}),
    "deepseek_v3-straight": ("DeepseekV3Config", {**DEEPSEEK, "q_lora_rank": None, "n_group": 1, "topk_group": 1,
        "norm_topk_prob": False, "first_k_dense_replace": 0, "rope_interleave": False, "n_shared_experts": 2}),
    "gpt_oss": ("GptOssConfig", {**SIZES, "head_dim": 32, "sliding_window": 6, "num_local_experts": 6,
        "num_experts_per_tok": 3, "swiglu_alpha": 1.5, "swiglu_limit": 0.5, "router_aux_loss_coef": 0.5,
        "rope_parameters": {**ROPE, "rope_type": "yarn", "factor": 4.0, "truncate": False,
                            "original_max_position_embeddings": 32}}),
    "gemma": ("GemmaConfig", {**SIZES, "head_dim": 32}),
    "gemma2": ("Gemma2Config", {**SIZES, "head_dim": 32, "query_pre_attn_scalar": 20, "sliding_window": 6,
        "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0}),
    "gemma3": ("Gemma3TextConfig", {**SIZES, "head_dim": 32, "query_pre_attn_scalar": 20, "sliding_window": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]}),
    "phi3": ("Phi3Config", SIZES),
    "phi3-long": ("Phi3Config", {**SIZES, "original_max_position_embeddings": 16,
        "rope_parameters": {**ROPE, "rope_type": "longrope", **LONG}}),
    "olmo2": ("Olmo2Config", SIZES),
    "smollm3": ("SmolLM3Config", {**SIZES, "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}}),
    "starcoder2": ("Starcoder2Config", {**SIZES, "sliding_window": 7}),
    "gpt_neox": ("GPTNeoXConfig", WITHOUT_GROUPS),
    "gpt_neox-serial": ("GPTNeoXConfig", {**WITHOUT_GROUPS, "use_parallel_residual": False}),
    "gpt2": ("GPT2Config", {"vocab_size": 288, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64,
        "bos_token_id": 1, "eos_token_id": 2}),
}  # fmt: skip
WINDOWS = {
    "smollm3": {"use_sliding_window": True, "sliding_window": 64},
    "qwen2": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3},
    "qwen3": {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3},
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 64},
}
# Variants of a family that change no gradient but by angles and the like.
WITHOUT_GRADIENTS = (
    "llama-tied", "llama-attention-biases", "llama3", "llama-linear", "llama-yarn", "phi3-long", "gpt_neox-serial"
)  # fmt: skip
PROMPT, NEW = 8, 16
# Every published config.json has these; leaving one out is an error here, or a shape that does not fit.
REQUIRED = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "rope_parameters", "head_dim",
}  # fmt: skip


@pytest.fixture(scope="module", params=list(MODELS))
def pair(request, tmp_path_factory):
    """(name, the model of transformers, its directory): random weights, every bias and norm off its trivial value."""
    kind, fields = MODELS[request.param]
    config = getattr(transformers, kind)(**fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            norm = "norm" in name or "ln_" in name
            start = float(norm and name.endswith("weight") and not kind.startswith("Gemma"))
            large = norm or name.endswith("bias")
            scale = 2.0 if name.endswith("sinks") else 0.2 if large else 0.12
            weight.copy_(start + scale * torch.randn_like(weight))
        for name, weight in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                weight.copy_(0.2 * torch.randn_like(weight))
    path = tmp_path_factory.mktemp("model")
    model.save_pretrained(path)
    return request.param, model, path


def ours(path):
    raw = json.loads((path / "config.json").read_text())
    family = FAMILIES[raw["model_type"]]
    config = family.parse(raw, str(path))
    checkpoint = Checkpoint(path)
    return family, config, read_params(checkpoint, family.rows(config), config)


def theirs(model, tokens, mask):
    positions = np.clip(np.cumsum(mask, 1) - 1, 0, None)
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        return model(
            **{key: torch.from_numpy(np.asarray(value, np.int64)) for key, value in inputs.items()}
        ).logits.numpy()


def test_logits_padding_greedy_text_gradients_and_the_way_back(pair, tmp_path):
    name, model, path = pair
    family, config, params = ours(path)
    compute = ComputeConfig(dtype="float32", layers="scan")
    graphdef, _ = graph(config, compute)
    forward = jax.jit(lambda params, *batch: bind(graphdef, params)(*batch))

    def logits(tokens, mask):
        positions = np.clip(np.cumsum(mask, 1) - 1, 0, None)
        return np.asarray(forward(params, jnp.asarray(tokens), jnp.asarray(mask, jnp.int32), jnp.asarray(positions)))

    tokens = np.random.default_rng(0).integers(3, 288, (3, 24))
    mask = np.ones((3, 24), int)
    mask[1, 17:], mask[2, :7] = 0, 0  # padded on the right, and on the left
    expected, found = theirs(model, tokens, mask), logits(tokens, mask)
    real = mask.astype(bool)
    np.testing.assert_allclose(found[real], expected[real], atol=1e-4 * np.abs(expected[real]).max(), rtol=0)

    written = list(tokens[0, :PROMPT])
    for _ in range(NEW):
        row = np.array([written + [0] * (24 - len(written))] * 3)
        seen = (np.arange(24) < len(written)).astype(int)[None].repeat(3, 0)
        written.append(int(logits(row, seen)[0, len(written) - 1].argmax()))
    model.generation_config.eos_token_id = None
    greedy = model.generate(torch.tensor(tokens[:1, :PROMPT]), max_new_tokens=NEW, do_sample=False)
    assert written == greedy[0].tolist()

    if name not in WITHOUT_GRADIENTS:
        compare_gradients(model, family, config, params, tokens, tmp_path / "gradients")
    way_back(model, family, config, path, tmp_path, (tokens, mask), expected)


@pytest.mark.parametrize("model_type", list(FAMILIES))
def test_a_key_that_is_left_out_means_what_transformers_takes_it_for(model_type):
    kind = transformers.CONFIG_MAPPING[model_type]
    full = kind(**WINDOWS.get(model_type, {})).to_dict()

    def read(raw):
        return FAMILIES[model_type].parse(raw, model_type)

    for key in full:
        raw = {name: value for name, value in full.items() if name != key}
        again = kind.from_dict(json.loads(json.dumps(raw))).to_dict()
        if key in REQUIRED:
            continue
        with_key, without = read(again), read(raw)
        assert without == with_key, key


def compare_gradients(model, family, config, params, tokens, path):
    inputs, labels = torch.from_numpy(tokens[:, :-1]), torch.from_numpy(tokens[:, 1:])
    sparse = isinstance(config.ffn, Experts) and family.model_type != "deepseek_v3"  # which has no loss to balance them
    out = model(inputs, **({"output_router_logits": True} if sparse else {}))
    loss = torch.nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    loss = loss + config.ffn.balance * out.aux_loss if sparse else loss
    loss.backward()
    gradients = copy.deepcopy(model)  # saved, for the names and the shapes of its files
    for into, weight in zip(gradients.parameters(), model.parameters(), strict=True):
        into.data = weight.grad
    for buffer in gradients.buffers():
        buffer.zero_()  # no gradient: biases that routers choose by
    gradients.save_pretrained(path)
    theirs = Checkpoint(path)
    batch = Batch(
        tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32), np.ones((3, 23), np.float32),
        np.ones((3, 23), np.int32), np.arange(23, dtype=np.int32)[None].repeat(3, 0),
    )  # fmt: skip
    compute = ComputeConfig(dtype="float32", layers="scan", loss_chunk=8)
    ours = lambda params: loss_sums(params, batch, config, compute)[0] / (3 * 23)
    value, gradient = jax.jit(jax.value_and_grad(ours))(params)
    np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
    leaves = named_leaves(gradient)
    for row in family.rows(config):
        flat = np.asarray(leaves[row.ours]).reshape(-1, *leaves[row.ours].shape[stacked(row) :])
        for found, name in zip(flat, names(row, sizes_of(config)), strict=True):
            expected = take(row, theirs[name], sizes_of(config))
            assert np.linalg.norm(found - expected) <= 2e-3 * np.linalg.norm(expected) + 1e-7, row.ours


def way_back(model, family, config, path, out, batch, expected):
    """Export is the inverse of import, bit for bit, and transformers computes the same from it."""
    checkpoint = Checkpoint(path)
    writer = Writer(out, max_bytes=200_000)
    write_params(read_params(checkpoint, family.rows(config), config), family.rows(config), config, writer)
    writer.close()
    again = Checkpoint(out)
    assert set(again) == set(checkpoint)
    for name in again:
        np.testing.assert_array_equal(again[name], checkpoint[name])
    ids = {key: SIZES[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    description = {"architectures": [family.architecture], "model_type": family.model_type, **family.write(config)}
    (out / "config.json").write_text(json.dumps(description | ids))
    assert family.parse(description, "the export") == config
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").float().eval()
    np.testing.assert_array_equal(theirs(reloaded, *batch)[0], expected[0])
