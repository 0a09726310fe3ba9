"""FP8 checkpoints of DeepSeek-V3: the values of weights and factors, a whole model, broken files."""

import ml_dtypes
import numpy as np
import pytest

from jaxllm.core.tree import named_leaves
from jaxllm.hf.checkpoint import Checkpoint, Writer
from jaxllm.hf.families import FAMILIES
from jaxllm.hf.fp8 import scaled
from jaxllm.hf.weights import read_params, write_params
from jaxllm.layers.config import Experts, LatentAttention, Rope
from jaxllm.models.build import init_params
from jaxllm.models.config import DenseLayers, ModelConfig

FAMILY = FAMILIES["deepseek_v3"]
CONFIG = ModelConfig(
    vocab_size=40, d_model=160, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=40, d_ff=24, max_seq_len=32,
    positions=Rope(interleaved=True), mla=LatentAttention(rank=130, query_rank=8, rotated=8, value_dim=33),
    dense=DenseLayers(number=1, d_ff=300),
    ffn=Experts(number=4, top_k=2, score="sigmoid", biased=True, shared=1, balance=0.0),
)  # fmt: skip
QUANTISATION = {
    "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]
}  # fmt: skip


def write(path, tensors):
    writer = Writer(path)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.close()


def quantised(weight):
    """(numbers, factors, what they mean): each square is divided by its largest number over 448."""
    rows, columns = weight.shape
    numbers, meant = np.zeros(weight.shape, ml_dtypes.float8_e4m3fn), np.zeros_like(weight)
    factors = np.zeros((-(-rows // 128), -(-columns // 128)), np.float32)
    for i, j in np.ndindex(factors.shape):
        square = (slice(128 * i, 128 * i + 128), slice(128 * j, 128 * j + 128))
        factors[i, j] = np.abs(weight[square]).max() / 448
        numbers[square] = (weight[square] / factors[i, j]).astype(ml_dtypes.float8_e4m3fn)
        meant[square] = numbers[square].astype(np.float32) * factors[i, j]
    return numbers, factors, meant


def test_a_model_is_read_as_what_its_numbers_and_factors_mean(tmp_path):
    plain, rows = tmp_path / "plain", FAMILY.rows(CONFIG)
    plain.mkdir()
    writer = Writer(plain)
    write_params(init_params(CONFIG, 0), rows, CONFIG, writer)
    writer.close()
    theirs, meant = {}, dict(Checkpoint(plain))
    for name, tensor in meant.items():
        if tensor.ndim == 2 and ("proj" in name):
            theirs[name], theirs[f"{name}_scale_inv"], meant[name] = quantised(tensor)
        else:
            theirs[name] = tensor
    behind = {f"model.layers.2.eh_proj.{end}": theirs["model.layers.0.mlp.up_proj.weight"] for end in ("weight", "x")}
    write(tmp_path, theirs | behind)
    write(plain, meant)
    assert sum(tensor.dtype == "float8_e4m3fn" for tensor in Checkpoint(tmp_path).stored.values()) > 20
    found = named_leaves(read_params(FAMILY.open(Checkpoint(tmp_path), CONFIG), rows, CONFIG))
    expected = named_leaves(read_params(Checkpoint(plain), rows, CONFIG))
    for name, leaf in expected.items():
        np.testing.assert_array_equal(found[name], leaf, err_msg=name)
        assert found[name].dtype == "float32"
    assert FAMILY.parse({**FAMILY.write(CONFIG), "quantization_config": QUANTISATION}, "config.json") == CONFIG


@pytest.mark.parametrize(
    "change",
    [{"quant_method": "gptq"}, {"fmt": "e5m2"}, {"weight_block_size": [64, 64]}, {"scale_fmt": "ue8m0"}],
    ids=str,
)
def test_another_way_to_quantise_is_refused(change):
    [(key, value)] = change.items()
    raw = {**FAMILY.write(CONFIG), "quantization_config": QUANTISATION | change}
    with pytest.raises(ValueError, match=rf"quantization_config\.{key}={value!r}: only ".replace("[", r"\[")):
        FAMILY.parse(raw, "config.json")


@pytest.mark.parametrize(
    ("weight", "factors"),
    [
        (np.zeros((130, 8), ml_dtypes.float8_e4m3fn), np.zeros((1, 1), np.float32)),
        (np.zeros((130, 8), ml_dtypes.float8_e4m3fn), np.zeros((2, 1), np.float16)),
        (np.zeros((130, 8), np.float32), np.zeros((2, 1), np.float32)),
        (np.zeros(130, ml_dtypes.float8_e4m3fn), np.zeros(2, np.float32)),
    ],
    ids=["squares", "factors", "weight", "vector"],
)
def test_numbers_and_factors_that_do_not_fit_are_named(weight, factors, tmp_path):
    write(tmp_path, {"a.weight": weight, "a.weight_scale_inv": factors})
    with pytest.raises(ValueError, match=r"a\.weight float.* and a\.weight_scale_inv .* are no FP8 weight"):
        scaled(Checkpoint(tmp_path))
