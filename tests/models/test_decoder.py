import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.layers.cache import init_cache
from jaxllm.layers.config import (
    ClampedGate,
    Experts,
    RelativeBias,
    RMSNorm,
    Rope,
    Sinusoids,
    SlidingWindow,
    YarnScaling,
)
from jaxllm.layers.masks import CausalMask
from jaxllm.models import presets
from jaxllm.models.build import abstract_params, bind, graph, init_params, logical_axes, unstack
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.models.decoder import Transformer

LLAMA = ModelConfig(
    vocab_size=97, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=160, qk_norm="head"
)
GPT = presets.get("gpt2-124m", vocab_size=97, d_model=32, n_layers=3, n_heads=4, d_ff=64, max_seq_len=160)
CPU = ComputeConfig(dtype="float32", layers="unroll")
# What differs by layer, and what bends scores and logits: a Gemma whose last layer has no rotation.
MIXED = LLAMA.model_copy(
    update={
        "window": SlidingWindow(size=9, layers=(True, False)), "norm": RMSNorm(offset=1.0), "score_softcap": 3.0,
        "positions": Rope(local_theta=100.0, fraction=0.5, skipped=(False, False, True)), "logit_softcap": 5.0,
        "norm_placement": "sandwich",
    }
)  # fmt: skip
SPARSE = LLAMA.model_copy(update={"ffn": Experts(number=5, top_k=2), "n_layers": 2})
SINKS = LLAMA.model_copy(
    update={
        "sinks": True, "bias": True, "ffn": Experts(number=5, top_k=2, clamped=ClampedGate(limit=0.5)), "n_layers": 2,
        "window": SlidingWindow(size=5, layers=(True, False)), "qk_norm": "none",
        "positions": Rope(scaling=YarnScaling(factor=4, original_len=40, magnitude=1.1, truncate=False)),
    }
)  # fmt: skip
REZERO = LLAMA.model_copy(
    update={"norm_placement": "none", "residual_gate": True, "positions": Sinusoids(), "n_layers": 2}
)
RELATIVE = LLAMA.model_copy(update={"positions": RelativeBias(buckets=8, max_distance=20), "embed_norm": True})
DENSE = pytest.mark.parametrize("config", [LLAMA, GPT, MIXED], ids=["llama", "gpt", "mixed"])
MODELS = pytest.mark.parametrize(
    "config",
    [LLAMA, GPT, MIXED, SPARSE, SINKS, REZERO, RELATIVE],
    ids=["llama", "gpt", "mixed", "sparse", "sinks", "rezero", "relative"],
)
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 12))
LONG = np.random.default_rng(1).integers(0, 97, (1, 160))  # three blocks of queries: 64, 64 and 32


@functools.cache
def noisy_params(config):
    """Initial parameters with every bias and scale moved off its trivial start."""

    @jax.jit
    def draw():
        leaves, tree = jax.tree.flatten(init_params(config, 0))
        keys = jax.random.split(jax.random.key(1), len(leaves))
        noisy = [x + 0.1 * jax.random.normal(key, x.shape) for x, key in zip(leaves, keys, strict=True)]
        return jax.tree.unflatten(tree, noisy)

    return draw()


@functools.cache
def program(config, compute=CPU):
    return jax.jit(lambda params, *batch: bind(graph(config, compute)[0], params)(*batch))


def forward(config, params, tokens, *rest, compute=CPU):
    return program(config, compute)(params, tokens, *rest)


@functools.cache
def loss_and_gradient(config, compute):
    loss = lambda params: jnp.mean(bind(graph(config, compute)[0], params)(TOKENS) ** 2)
    return jax.jit(jax.value_and_grad(loss))(noisy_params(config))


@functools.cache
def gradient_at(config):
    """Gradient of the logits at a probe: the embedding of every token may change a little, who notices?"""
    module = bind(graph(config, CPU)[0], noisy_params(config))

    def probed(x, probe):
        hidden, _ = module.run_blocks(x, CausalMask(), jnp.arange(x.shape[1])[None])
        return jnp.sum(module.logits(module.final_norm(hidden))[0, probe])

    return jax.jit(jax.grad(probed))


@DENSE
@pytest.mark.parametrize(("length", "probe"), [(12, 5), (160, 70), (160, 127), (160, 128)])
def test_no_gradient_flows_from_the_future(config, length, probe):
    x = np.random.default_rng(0).normal(size=(1, length, 32)).astype(np.float32)
    gradient = gradient_at(config)(x, probe)[0]
    assert np.all(gradient[probe + 1 :] == 0.0)
    assert np.all(np.abs(gradient[: probe + 1]).max(-1) > 0.0)


@MODELS
@pytest.mark.parametrize(("first", "second"), [(5, 7), (70, 90)])
def test_packed_equals_unpacked_and_ignores_its_neighbour_bitwise(config, first, second):
    params = noisy_params(config)
    tokens = LONG[:, : first + second]
    segments = np.array([[1] * first + [2] * second])
    positions = np.array([[*range(first), *range(second)]])
    packed = forward(config, params, tokens, segments, positions)
    alone = forward(
        config, params, np.concatenate([tokens, np.roll(tokens, -first, 1)])
    )  # each with something after it
    np.testing.assert_allclose(packed[:, first:], alone[1:, :second], atol=2e-5)
    np.testing.assert_allclose(packed[:, :first], alone[:1, :first], atol=2e-5)
    other = np.where(segments == 1, 7, tokens)
    np.testing.assert_array_equal(forward(config, params, other, segments, positions)[:, first:], packed[:, first:])
    other = np.where(segments == 2, 7, tokens)
    np.testing.assert_array_equal(forward(config, params, other, segments, positions)[:, :first], packed[:, :first])


@DENSE
@pytest.mark.parametrize(
    ("layers", "remat"), [("scan", "none"), ("scan", "dots"), ("scan", "full"), ("unroll", "full")]
)
def test_scan_and_remat_change_nothing(config, remat, layers):
    plain = loss_and_gradient(config, CPU)
    other = loss_and_gradient(config, ComputeConfig(dtype="float32", remat=remat, layers=layers))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), plain, other)


def test_remat_recomputes_the_projections_only_where_it_says_so():
    params = abstract_params(LLAMA)

    def products(remat):
        compute = ComputeConfig(dtype="float32", remat=remat, layers="scan")
        loss = lambda p: jnp.mean(bind(graph(LLAMA, compute)[0], p)(TOKENS) ** 2)
        return str(jax.make_jaxpr(jax.grad(loss))(params)).count("= dot_general")

    none, dots, full = (products(remat) for remat in ("none", "dots", "full"))
    assert dots - none == 2  # the attention's two
    assert full - dots == 6  # q, k, v, o, gate and up; nothing backward reads what down gives


@MODELS
def test_cached_decode_equals_the_full_forward(config):
    params = noisy_params(config)
    full = forward(config, params, TOKENS)
    graphdef = graph(config, CPU, stacked=False)[0]
    cache = init_cache(config.n_layers, (2, 16, config.kv_heads, config.head_width), jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(method, params, tokens, positions, cache):
        module = bind(graphdef, params)
        hidden, cache = method(module, tokens, positions, cache)
        return module.logits(hidden), cache

    layers = unstack(params)
    first, cache = run(Transformer.prefill, layers, TOKENS[:, :4], np.tile(np.arange(4), (2, 1)), cache)
    logits = [first]
    for t in range(4, 12):
        step, cache = run(Transformer.decode, layers, TOKENS[:, t : t + 1], np.full((2, 1), t), cache)
        logits.append(step)
    np.testing.assert_allclose(np.concatenate(logits, 1), full, atol=2e-5)


def test_every_parameter_has_axes_and_a_layer_axis_where_stacked():
    axes = logical_axes(LLAMA)
    assert axes["blocks"]["attention"]["q"]["kernel"] == ("layers", "embed", "heads", "head_dim")
    assert axes["embed"]["table"] == ("vocab", "embed")
    assert axes["head"] == ("vocab", "embed")
    shapes = jax.tree.map(
        lambda a, p: len(a) == p.ndim,
        axes,
        jax.eval_shape(lambda: init_params(LLAMA, 0)),
        is_leaf=lambda x: isinstance(x, tuple),
    )
    assert all(jax.tree.leaves(shapes))


def test_initial_parameters_are_a_function_of_the_seed():
    same = jax.tree.map(lambda a, b: bool((a == b).all()), init_params(LLAMA, 3), init_params(LLAMA, 3))
    assert all(jax.tree.leaves(same))
    assert not (init_params(LLAMA, 3)["embed"]["table"] == init_params(LLAMA, 4)["embed"]["table"]).all()
    # the layers must not be copies of one another
    kernel = init_params(LLAMA, 3)["blocks"]["ffn"]["up"]["kernel"]
    assert not (kernel[0] == kernel[1]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 5, "n_kv_heads": None}, "d_model=32 is not divisible by n_heads=5"),
        ({"n_kv_heads": 3}, "n_heads=4 is not a multiple of n_kv_heads=3"),
        ({"head_dim": 7}, "even number of dimensions of a head, not 7"),
    ],
)
def test_impossible_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate({**LLAMA.model_dump(), **change})


def test_a_gated_stack_is_the_identity_until_its_gates_open():
    params = jax.jit(lambda: init_params(REZERO, 0))()
    model = bind(graph(REZERO, CPU)[0], params)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    start = model.embedded(model.embed(jnp.asarray(TOKENS), jnp.float32), positions)
    np.testing.assert_array_equal(model.routed_states(TOKENS)[0], start)
    loss = lambda params: jnp.mean(jnp.sin(bind(graph(REZERO, CPU)[0], params)(TOKENS)))
    gates = jax.jit(jax.grad(loss))(params)["blocks"]
    for gate in (gates["attention_gate"], gates["ffn_gate"]):
        assert gate.shape == (2, 1)
        assert np.all(gate != 0)  # they can open


def test_a_stack_without_norms_needs_gates():
    with pytest.raises(ValueError, match="norm_placement=none does not train without residual_gate=true"):
        ModelConfig.model_validate({**LLAMA.model_dump(), "norm_placement": "none"})
