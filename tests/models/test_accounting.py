import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.core.batch import Batch
from jaxllm.layers.config import SlidingWindow
from jaxllm.models import accounting, presets
from jaxllm.models.build import init_params
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.training.optim import AdamW, optimizer
from jaxllm.training.state import TrainState
from jaxllm.training.step import StepConfig, train_step

# Llama and GPT-2: counts of the published checkpoints. GPT-3: the shapes of Brown et al. 2020, table 2.1, which names
# them 125M ... 175B.
PUBLISHED = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "mixtral-8x7b": 46_702_792_704,
    "qwen3-30b-a3b": 30_532_122_624,
    "deepseek-v3": 671_026_419_200,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert accounting.param_count(presets.get(name)) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "billions"),
    [("gpt3-125m", 0.125), ("gpt3-350m", 0.356), ("gpt3-760m", 0.760), ("gpt3-1.3b", 1.3), ("gpt3-2.7b", 2.7),
     ("gpt3-6.7b", 6.7), ("gpt3-13b", 13), ("gpt3-175b", 175)],
)  # fmt: skip
def test_gpt3_sizes(name, billions):
    assert accounting.param_count(presets.get(name)) / 1e9 == pytest.approx(billions, rel=0.02)


@pytest.mark.parametrize(
    ("name", "active"),
    [("mixtral-8x7b", 12_879_925_248), ("qwen3-30b-a3b", 3_353_032_704), ("llama2-7b", 6_738_415_616)],
)
def test_active_parameters_are_those_of_the_chosen_experts(name, active):
    config = presets.get(name)
    assert accounting.active_param_count(config) == active
    products = accounting.active_param_count(config) - config.vocab_size * config.d_model
    attention = 6 * config.n_layers * 4096 * config.n_heads * config.head_width
    assert accounting.flops_per_token(config, 4096) == 6 * products + attention


def test_deepseek_uses_37_of_its_671_billions_for_a_token():
    config = presets.get("deepseek-v3")
    active = accounting.active_param_count(config)
    assert active == 37_552_297_472
    products = active - config.vocab_size * config.d_model
    assert accounting.flops_per_token(config, 4096) == 6 * products + 3 * 61 * 4096 * 128 * (192 + 128)
    dense, sparse = (accounting.layer_bytes(stack.config, 2, 1, 64) for stack in config.stacks())
    assert dense - sparse == 64 * 2 * (6 * 18432 - 8 * (6 * 2048 + 2 * 7168) - 6 * 2048)


@pytest.mark.parametrize(("name", "billions"), [("gpt-oss-20b", 3.61), ("gpt-oss-120b", 5.13)])
def test_active_parameters_of_gpt_oss_as_published_without_the_table_of_tokens(name, billions):
    config = presets.get(name)
    active = accounting.active_param_count(config) - config.vocab_size * config.d_model
    assert round(active / 1e9, 2) == billions


def test_activations_of_long_rows_grow_with_the_row_alone():
    size = lambda length: accounting.layer_bytes(presets.get("llama3-8b"), 2, 1, length)
    assert size(2**20) == 128 * size(2**13)
    assert 2**19 * 2 * 14336 * 6 < size(2**19) < 2**19 * 2 * 14336 * 10  # most of it is of the feed-forward layer


def test_experts_cost_as_many_activations_as_are_chosen():
    sizes = [
        accounting.layer_bytes(presets.get("tiny", ffn={"kind": "experts", "number": 8, "top_k": top_k}), 2, 1, 64)
        for top_k in (1, 2, 3)
    ]
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0] == 64 * 2 * (6 * 176 + 2 * 64)


def test_counts_equal_real_arrays():
    config = presets.get("tiny")
    assert accounting.param_count(config) == sum(
        x.size for x in jax.tree.leaves(jax.eval_shape(lambda: init_params(config, 0)))
    )


def test_flops_of_7b_at_4k():
    # 6 x 6.607e9 (all but the token table) + 6 x 32 layers x 4096 x 4096
    assert (
        accounting.flops_per_token(presets.get("llama2-7b"), 4096)
        == 6 * (6_738_415_616 - 32000 * 4096) + 6 * 32 * 4096 * 4096
    )


def test_what_windows_hide_is_no_work():
    wide, length = SMALL.explicit(), 256
    windowed = wide.model_copy(update={"window": SlidingWindow(size=64, layers=(True, False))})
    seen = sum(min(place + 1, 64) for place in range(length)) / sum(range(1, length + 1))
    attention = lambda model: accounting.flops_per_token(model, length) - 6 * products
    products = accounting.active_param_count(wide) - wide.vocab_size * wide.d_model
    assert attention(windowed) / attention(wide) == pytest.approx((1 + seen) / 2, rel=0.01)
    assert accounting.flops_per_token(windowed, 64) == accounting.flops_per_token(wide, 64)


def test_remat_orders_the_activation_estimate():
    config = presets.get("llama2-7b")
    sizes = [
        accounting.activation_bytes(config, ComputeConfig(dtype="bfloat16", remat=remat), 1, 4096)["activations"]
        for remat in ("none", "dots", "full")
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_neither_a_row_of_a_million_tokens_nor_a_kernel_has_a_square():
    config = presets.get("llama3-8b")
    half, whole = (accounting.layer_bytes(config, 2, 1, size) for size in (524_288, 1_048_576))
    assert whole == 2 * half
    short, kept = (accounting.layer_bytes(config, 2, 1, 2048, square) for square in (False, True))
    assert short * 512 == whole < kept * 512


SMALL = ModelConfig(vocab_size=512, d_model=64, n_layers=4, n_heads=4, n_kv_heads=2, d_ff=160, max_seq_len=256)


def train_step_bytes(config, compute, rows, seq_len):
    """(arguments, temporary arrays) of a compiled training step, by XLA's account; nothing is allocated."""
    optim = AdamW(lr=1e-3)

    def start():
        params, zero = init_params(config, 0), jnp.zeros(())
        return TrainState(zero.astype(jnp.int32), params, optimizer(optim).init(params), None, zero)

    ids, weights = (jax.ShapeDtypeStruct((rows, seq_len), dtype) for dtype in (np.int32, np.float32))
    step = functools.partial(train_step, model=config, compute=compute, optim=optim, step=StepConfig())
    lowered = jax.jit(step, donate_argnums=0).lower(
        jax.eval_shape(start), Batch(ids, ids, weights, ids, ids), np.float32(1)
    )
    found = lowered.compile().memory_analysis()
    return found.argument_size_in_bytes, found.temp_size_in_bytes


@pytest.mark.parametrize("remat", ["none", "dots", "full"])
def test_the_memory_estimate_is_near_the_compilers(remat):
    compute = ComputeConfig(dtype="float32", layers="scan", remat=remat, loss_chunk=128)
    arguments, temporary = train_step_bytes(SMALL, compute, 8, 256)
    sizes = accounting.activation_bytes(SMALL, compute, 8, 256)
    gradients = 4 * accounting.param_count(SMALL)
    assert 3 * gradients == pytest.approx(arguments, rel=0.1)
    ratio = (gradients + sizes["activations"] + sizes["logits"]) / temporary
    assert 1 / 1.5 < ratio < 1.5


def test_the_memory_line_names_each_category():
    sizes = {"parameters": 1_000_000_000, "optimizer": 2_000_000_000, "logits": 40_000_000}
    assert accounting.memory_line(sizes) == "3.0 GB: parameters 1.0 GB, optimizer 2.0 GB, logits 40.0 MB"
    assert accounting.memory_line({"logits": 1500}) == "1.5 kB: logits 1.5 kB"


def test_logits_grow_with_rows_up_to_a_chunk_of_each():
    compute = ComputeConfig(dtype="float32", loss_chunk=128)
    logits = [accounting.activation_bytes(SMALL, compute, *shape)["logits"] for shape in ((1, 64), (8, 64), (8, 256))]
    assert logits == [64 * 512 * 8, 8 * 64 * 512 * 8, 8 * 128 * 512 * 8]


def test_unknown_preset_suggests():
    with pytest.raises(ValueError, match="did you mean llama2-7b"):
        presets.get("lama2-7b")


def test_peak_is_unknown_for_a_cpu():
    assert accounting.peak_flops("cpu") is None
    assert accounting.peak_flops("NVIDIA H200") == 989e12
