import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxllm.layers.cache import init_cache
from jaxllm.layers.masks import CausalMask
from jaxllm.models import presets
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.models.decoder import bind, graph, init_params, logical_axes, unstack

LLAMA = ModelConfig(
    vocab_size=97, d_model=32, n_layers=3, n_heads=4, n_kv_heads=2, d_ff=48, max_seq_len=64, qk_norm=True
)
GPT = presets.get("gpt2-124m", vocab_size=97, d_model=32, n_layers=3, n_heads=4, d_ff=64, max_seq_len=64)
CPU = ComputeConfig(dtype="float32", layers="unroll")
MODELS = pytest.mark.parametrize("config", [LLAMA, GPT], ids=["llama", "gpt"])
TOKENS = np.random.default_rng(0).integers(0, 97, (2, 12))


def noisy_params(config, seed=0):
    """Initial parameters with every bias and scale moved off its trivial start."""
    params = init_params(config, seed)
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
    return jax.tree.unflatten(
        tree, [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    )


def forward(config, params, tokens, *rest, compute=CPU):
    return jax.jit(lambda p, *a: bind(graph(config, compute)[0], p)(*a))(params, tokens, *rest)


@MODELS
def test_no_gradient_flows_from_the_future(config):
    params = noisy_params(config)
    module = bind(graph(config, CPU)[0], params)

    def position_5(x):
        # The embedding of every token may change a little: does the logit at position 5 notice tokens after it?
        mask, positions = CausalMask(), jnp.arange(12)[None]
        hidden = module._blocks(x, mask, None if config is GPT else angles(positions))
        return jnp.sum(module.logits(module.final_norm(hidden))[0, 5])

    def angles(positions):
        from jaxllm.layers.positions import rope_angles

        return rope_angles(positions, config.head_width, 10_000.0)

    x = jax.random.normal(jax.random.key(0), (1, 12, 32))
    gradient = jax.jit(jax.grad(position_5))(x)[0]
    assert np.all(gradient[6:] == 0.0)
    assert np.all(np.abs(gradient[:6]).max(-1) > 0.0)


@MODELS
def test_packed_equals_unpacked_and_ignores_its_neighbour_bitwise(config):
    params = noisy_params(config)
    segments = np.array([[1] * 5 + [2] * 7])
    positions = np.array([[*range(5), *range(7)]])
    packed = forward(config, params, TOKENS[:1], segments, positions)
    alone = forward(config, params, TOKENS[:1, 5:])
    np.testing.assert_allclose(packed[:, 5:], alone, atol=1e-5)
    neighbour = TOKENS[:1].copy()
    neighbour[:, :5] = 7
    np.testing.assert_array_equal(forward(config, params, neighbour, segments, positions)[:, 5:], packed[:, 5:])


@MODELS
@pytest.mark.parametrize("remat", ["none", "dots", "full"])
@pytest.mark.parametrize("layers", ["scan", "unroll"])
def test_scan_and_remat_change_nothing(config, remat, layers):
    params = noisy_params(config)
    loss = lambda p, compute: jnp.mean(bind(graph(config, compute)[0], p)(TOKENS) ** 2)
    plain = jax.jit(jax.value_and_grad(lambda p: loss(p, CPU)))(params)
    other = jax.jit(jax.value_and_grad(lambda p: loss(p, ComputeConfig(dtype="float32", remat=remat, layers=layers))))(
        params
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5), plain, other)


@MODELS
def test_cached_decode_equals_the_full_forward(config):
    params = noisy_params(config)
    full = forward(config, params, TOKENS)
    graphdef = graph(config, CPU, stacked=False)[0]
    cache = init_cache(config.n_layers, (2, 16, config.kv_heads, config.head_width), jnp.float32)

    @jax.jit
    def decode(params, tokens, positions, cache):
        module = bind(graphdef, params)
        hidden, cache = module.decode(tokens, positions, cache)
        return module.logits(hidden), cache

    layers = unstack(params)
    module = bind(graphdef, layers)
    hidden, cache = module.hidden(TOKENS[:, :4], jnp.tile(jnp.arange(4), (2, 1)), CausalMask(), cache)  # prefill
    logits = [module.logits(hidden)]
    for t in range(4, 12):
        step, cache = decode(layers, TOKENS[:, t : t + 1], jnp.full((2, 1), t), cache)
        logits.append(step)
    np.testing.assert_allclose(jnp.concatenate(logits, 1), full, atol=2e-5)


def test_every_parameter_has_axes_and_a_layer_axis_where_stacked():
    axes = logical_axes(LLAMA)
    assert axes["blocks"]["attention"]["q"]["kernel"] == ("layers", "embed", "heads", "head_dim")
    assert axes["embed"]["table"] == ("vocab", "embed")
    assert axes["head"] == ("vocab", "embed")
    shapes = jax.tree.map(
        lambda a, p: len(a) == p.ndim, axes, init_params(LLAMA, 0), is_leaf=lambda x: isinstance(x, tuple)
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
        ({"head_dim": 7}, "even head_dim, not 7"),
    ],
)
def test_impossible_shapes(change, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig.model_validate({**LLAMA.model_dump(), **change})
