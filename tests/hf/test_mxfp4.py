"""MXFP4 checkpoints of gpt-oss: the values of blocks and scales, a whole model against transformers, broken files."""

import json
import tracemalloc

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxllm.core.tree import named_leaves
from jaxllm.hf.checkpoint import Checkpoint, Stored, Tensors, Writer
from jaxllm.hf.families import FAMILIES
from jaxllm.hf.mxfp4 import unpacked
from jaxllm.hf.rows import sizes_of
from jaxllm.hf.table import names, stacked, stored_shape
from jaxllm.hf.weights import read_params
from jaxllm.inference.decode import Decoder, Limits, Request
from jaxllm.inference.sampling import Sampler
from jaxllm.models.build import abstract_params, bind, graph
from jaxllm.models.config import ComputeConfig

FAMILY = FAMILIES["gpt_oss"]
EXPERTS = "model.layers.{}.mlp.experts.{}_proj"
RAW = {
    "model_type": "gpt_oss", "vocab_size": 288, "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 128,
    "sliding_window": 6, "num_local_experts": 5, "num_experts_per_tok": 3, "swiglu_limit": 0.5,
    "rope_scaling": {
        "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "truncate": False,
        "beta_fast": 32.0, "beta_slow": 1.0,
    },
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}  # fmt: skip
F32 = ComputeConfig(dtype="float32", layers="scan")
# Two bits of exponent, one of mantissa; the lowest exponent has no hidden one.
E2M1 = np.array([m / 2 if e == 0 else (1 + m / 2) * 2 ** (e - 1) for e in range(4) for m in range(2)])


def quantised(weight):
    """(blocks, scales, what they mean) of a weight [expert, input, output]."""
    experts, inputs, outputs = weight.shape
    groups = weight.swapaxes(1, 2).reshape(experts, outputs, inputs // 32, 32)
    exponent = np.floor(np.log2(np.abs(groups).max(-1))) - 2
    scaled = groups / 2 ** exponent[..., None]
    nearest = np.abs(np.abs(scaled)[..., None] - E2M1).argmin(-1)
    code = (nearest + 8 * (scaled < 0)).astype(np.uint8)
    value = np.copysign(E2M1[nearest], scaled) * 2 ** exponent[..., None]
    meant = value.reshape(experts, outputs, inputs).swapaxes(1, 2)
    return code[..., ::2] | code[..., 1::2] << 4, (exponent + 127).astype(np.uint8), meant


def write(path, tensors, raw=RAW):
    writer = Writer(path)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()
    (path / "config.json").write_text(json.dumps(raw))


def read(path, dtype=None):
    config, checkpoint = FAMILY.parse(RAW, "config.json"), Checkpoint(path)
    return config, read_params(FAMILY.open(checkpoint, config), FAMILY.rows(config), config, dtype=dtype)


def pair(blocks, scales):
    stored = lambda x: Stored(x.shape, str(x.dtype), lambda: x)
    return Tensors("file", {"w_blocks": stored(blocks), "w_scales": stored(scales)})


def test_every_byte_under_every_scale_means_what_the_standard_says():
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), (1, 256, 1, 1))
    scales = np.tile(np.arange(256, dtype=np.uint8)[None, :, None], (1, 1, 16))
    found = unpacked(pair(blocks, scales))["w"]
    assert found.dtype == ml_dtypes.bfloat16
    assert found.shape == (1, 512, 256)
    code = np.stack([np.arange(256) % 16, np.arange(256) // 16], 1).reshape(-1)
    value = np.where(code < 8, E2M1[code % 8], -E2M1[code % 8])
    with np.errstate(over="ignore"):
        expected = (value[:, None] * 2.0 ** (np.arange(255) - 127)).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found[0, :, :255].view(np.int16), expected.view(np.int16))  # with the sign of zero
    assert np.isnan(found[0, :, 255].astype(np.float32)).all()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """(a model of transformers with the values that the quantised tensors mean, directory, {name: blocks, ...})."""
    why = "pip install 'jaxllm[parity]' compares with transformers and torch"
    torch, transformers = (pytest.importorskip(name, reason=why) for name in ("torch", "transformers"))
    plain = {key: value for key, value in RAW.items() if key != "quantization_config"}
    config = transformers.GptOssConfig.from_dict(plain)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    written, experts = {}, {}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            start = float("norm" in name)
            weight.copy_(start + (1.0 if "sinks" in name else 0.15) * torch.randn_like(weight))
            if name.endswith("_proj") and "experts" in name:
                blocks, scales, meant = experts[name] = quantised(weight.double().numpy())
                written |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
                weight.copy_(torch.from_numpy(meant))
            else:
                weight.copy_(weight.bfloat16())
                written[name] = weight.numpy().astype(ml_dtypes.bfloat16)
    path = tmp_path_factory.mktemp("mxfp4")
    write(path, written)
    return model, path, experts


def test_blocks_are_read_as_the_bfloat16_that_they_mean_and_as_transformers_reads_them(checkpoint):
    torch = pytest.importorskip("torch")
    integration = pytest.importorskip("transformers.integrations.mxfp4")
    _, path, experts = checkpoint
    config, params = read(path)
    leaves = named_leaves(params)
    assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype(jnp.bfloat16)}
    bits = lambda x: np.ascontiguousarray(x).view(np.int16)
    for layer in range(config.n_layers):
        for name, parts in (("gate_up", ("gate", "up")), ("down", ("down",))):
            blocks, scales, meant = experts[EXPERTS.format(layer, name)]
            theirs = integration.convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales))
            np.testing.assert_array_equal(meant, theirs.double().numpy())
            for i, part in enumerate(parts):
                found = np.asarray(leaves[f"blocks/ffn/experts/{part}"][layer])
                expected = meant[..., i :: len(parts)].astype(ml_dtypes.bfloat16)
                np.testing.assert_array_equal(bits(found), bits(expected))


def test_a_quantised_model_has_the_logits_and_the_greedy_text_of_transformers(checkpoint):
    torch = pytest.importorskip("torch")
    model, path, _ = checkpoint
    config, params = read(path, "float32")
    tokens = np.random.default_rng(0).integers(3, 288, (2, 24))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    found = bind(graph(config, F32)[0], params)(jnp.asarray(tokens))
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max(), rtol=0)
    greedy = model.generate(torch.from_numpy(tokens[:1, :8]), max_new_tokens=16, do_sample=False, eos_token_id=None)
    decoder = Decoder(config, params, F32)
    answer = decoder.generate([Request(tokens[0, :8].tolist())], Sampler(temperature=0), Limits(16))[0]
    assert answer.tokens == greedy[0, 8:].tolist()


def test_beside_the_parameters_there_is_one_tensor_at_a_time(tmp_path):
    raw = RAW | {"hidden_size": 128, "intermediate_size": 256, "num_local_experts": 16, "num_hidden_layers": 6}
    config, generator, tensors = FAMILY.parse(raw, "config.json"), np.random.default_rng(0), {}
    leaves, sizes = named_leaves(abstract_params(config)), sizes_of(config)
    for row in FAMILY.rows(config):
        shape = stored_shape(row, leaves[row.ours].shape[stacked(row) :], sizes)
        for name in names(row, sizes):
            if name.endswith("_proj"):
                packed = (shape[0], shape[2], shape[1] // 32)
                tensors[f"{name}_blocks"] = generator.integers(0, 256, (*packed, 16), np.uint8)
                tensors[f"{name}_scales"] = generator.integers(120, 130, packed, np.uint8)
            else:
                tensors[name] = np.ones(shape, ml_dtypes.bfloat16)
    write(tmp_path, tensors)
    del tensors
    opened, rows = FAMILY.open(Checkpoint(tmp_path), config), FAMILY.rows(config)
    tracemalloc.start()
    params = read_params(opened, rows, config)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    held = sum(leaf.nbytes for leaf in named_leaves(params).values())
    largest = 16 * 128 * 512 * 2
    assert held > 8 * largest
    assert peak < held + 2 * largest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, r"down_proj: missing[^$]*down_proj_blocks: not part of this model"),
        ({"blocks": None}, r"down_proj: missing[^$]*down_proj_scales: not part of this model"),
        ({"scales": np.ones((5, 64, 2), np.uint8)}, r"down_proj_scales \[5, 64, 2\] are no MXFP4 weight"),
        ({"blocks": np.ones((5, 64, 3, 16), np.int8)}, "are no MXFP4 weight"),
        ({"blocks": np.ones((5, 64, 2, 16), np.uint8), "scales": np.ones((5, 64, 2), np.uint8)},
         r"down_proj: shape \[5, 64, 64\], expected \[5, 96, 64\]"),
        ({"": np.ones((5, 96, 64), np.float32)}, "are no MXFP4 weight"),
    ],
)  # fmt: skip
def test_what_does_not_fit_together_is_named(checkpoint, tmp_path, change, message):
    name = EXPERTS.format(1, "down")
    tensors = dict(Checkpoint(checkpoint[1]))
    tensors |= {f"{name}_{kind}".rstrip("_"): tensor for kind, tensor in change.items()}
    write(tmp_path, {key: tensor for key, tensor in tensors.items() if tensor is not None})
    with pytest.raises(ValueError, match=message):
        read(tmp_path)
