import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from pydantic import ValidationError

from jaxllm.layers.config import ClampedGate, Experts, Groups
from jaxllm.layers.moe import Kernels, Moe, RouterSums, _mix
from jaxllm.models.balance import balance_loss, router_metrics, z_loss

X = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def noisy(moe):
    """The layer with its biases off zero."""
    generator = np.random.default_rng(1)
    biases = [moe.router_bias, moe.experts.gate_bias, moe.experts.up_bias, moe.experts.down_bias]
    for bias in biases if moe.router_bias is not None else ():
        bias[...] = jnp.asarray(generator.normal(size=bias.shape), jnp.float32)
    return moe


def compiled(moe):
    """Return (the layer as a program of its parameters and of x, its parameters)."""
    graph, params = nnx.split(moe)
    return jax.jit(lambda params, x: nnx.merge(graph, params)(x)), params


@pytest.mark.parametrize("clamped", [None, ClampedGate(alpha=1.5, limit=0.5)])
@pytest.mark.parametrize("renormalise", [True, False])
def test_the_formula_token_by_token(renormalise, clamped):
    config = Experts(number=4, top_k=2, renormalise=renormalise, clamped=clamped)
    moe = noisy(Moe(nnx.Rngs(0), config, d_model=8, d_ff=6, bias=clamped is not None, std=0.5, out_std=0.5))
    gate, up, down = (np.asarray(kernel) for kernel in moe.experts.kernels(jnp.float32)[:3])
    bias_of = lambda bias: np.zeros(4)[:, None] if bias is None else np.asarray(bias[...])
    gate_bias, up_bias, down_bias = (bias_of(getattr(moe.experts, f"{name}_bias")) for name in ("gate", "up", "down"))
    router_bias = bias_of(moe.router_bias).reshape(-1)
    expected, counts = np.zeros_like(X), np.zeros(4)
    for place in np.ndindex(2, 5):
        probs = softmax(X[place] @ np.asarray(moe.router[...]) + router_bias)
        chosen = np.argsort(-probs)[:2]
        counts[chosen] += 1
        for e in chosen:
            g, u = X[place] @ gate[e] + gate_bias[e], X[place] @ up[e] + up_bias[e]
            if clamped:
                g, u = np.minimum(g, 0.5), np.clip(u, -0.5, 0.5) + 1
            y = (g / (1 + np.exp(-(clamped.alpha if clamped else 1) * g)) * u) @ down[e] + down_bias[e]
            expected[place] += y * probs[e] / (probs[chosen].sum() if renormalise else 1)
    forward, params = compiled(moe)
    y, sums = forward(params, X)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_array_equal(sums.counts, counts)
    # All tokens at one expert, and a token alone: no capacity, the same numbers.
    params["router"][...] = jnp.eye(8, 4) * 100
    crowd = (np.abs(X) * [9, 1, *[0.1] * 6]).astype(np.float32)
    together = forward(params, crowd)[0]
    alone = [forward(params, crowd[:1, i : i + 1])[0][0, 0] for i in range(5)]
    np.testing.assert_allclose(together[0], np.stack(alone), rtol=2e-5, atol=1e-6)


def test_sigmoids_in_groups_with_a_bias_and_a_shared_expert_token_by_token():
    groups = Groups(number=4, top_k=2)
    config = Experts(number=8, top_k=3, score="sigmoid", biased=True, groups=groups, scale=2.5, shared=2)
    moe = Moe(nnx.Rngs(0), config, d_model=8, d_ff=6, std=0.5, out_std=0.5)
    bias = np.random.default_rng(1).normal(size=8).astype(np.float32)
    moe.choice_bias[...] = jnp.asarray(bias)
    layer = lambda x, gate, up, down: (x @ gate / (1 + np.exp(-(x @ gate))) * (x @ up)) @ down
    kernels = [np.asarray(kernel) for kernel in moe.experts.kernels(jnp.float32)[:3]]
    shared = [np.asarray(part.kernel[...]) for part in (moe.shared.gate, moe.shared.up, moe.shared.down)]
    assert shared[0].shape == (8, 12)
    expected, counts, shares, unlimited = np.zeros_like(X), np.zeros(8), np.zeros(8), 0
    for place in np.ndindex(2, 5):
        p = 1 / (1 + np.exp(-X[place] @ np.asarray(moe.router[...])))
        merit = (p + bias).reshape(4, 2)
        outside = np.argsort(-merit.sum(-1))[2:]
        unlimited += set(np.argsort(-merit.reshape(-1))[:3]) != (set(np.argsort(-p)[:3]))
        merit[outside] = -np.inf
        chosen = np.argsort(-merit.reshape(-1))[:3]
        counts[chosen] += 1
        shares += p / p.sum()
        expected[place] = layer(X[place], *shared)
        for e in chosen:
            expected[place] += 2.5 * p[e] / p[chosen].sum() * layer(X[place], *(kernel[e] for kernel in kernels))
    assert unlimited  # the bias does change the choice
    forward, params = compiled(moe)
    y, sums = forward(params, X)
    np.testing.assert_allclose(y, expected, atol=1e-4)
    np.testing.assert_array_equal(sums.counts, counts)
    np.testing.assert_allclose(sums.probs, shares, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(forward(params, X)[0]))))(params)
    assert not np.any(gradient["choice_bias"][...])
    assert np.any(gradient["router"][...])


@pytest.mark.parametrize("groups", [(3, 1), (8, 4), (4, 1), (4, 5)])
def test_groups_that_do_not_hold_the_choice_are_refused(groups):
    with pytest.raises(ValidationError, match="the same number of them, two or more"):
        Experts(number=8, top_k=3, groups=Groups(number=groups[0], top_k=groups[1]))


@pytest.mark.parametrize("biases", [False, True])
def test_each_part_of_the_experts_gives_its_part_of_the_sum_and_of_the_gradient(biases):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((4, 8, 6), (4, 8, 6), (4, 6, 8), *[(4, 6)] * (2 * biases))
    kernels = Kernels(*(jax.random.normal(keys[i % 3], shape) for i, shape in enumerate(shapes)))
    choice = jnp.array([[[0, 3], [1, 2], [3, 1], [3, 0], [3, 2]]] * 2)
    weights = jax.random.uniform(keys[3], choice.shape)

    def whole(x, kernels):
        return _mix(x, choice, weights, kernels, "silu")

    def parts(x, kernels):
        cut = lambda part: jax.tree.map(lambda kernel: kernel[part], kernels)
        return sum(
            _mix(x, choice - first, weights, cut(slice(first, first + 2)), "silu", some=True) for first in (0, 2)
        )

    loss = lambda function: jax.jit(jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(function(*a))), (0, 1)))(X, kernels)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), loss(parts), loss(whole))


def test_router_losses_and_metrics_by_hand():
    # Two layers, three experts, one choice of each of 4 tokens: all at expert 0, and 2 1 1.
    sums = RouterSums(
        counts=jnp.array([[4.0, 0, 0], [2, 1, 1]]), probs=jnp.array([[2.0, 1, 1], [2, 2, 0]]),
        z=jnp.array([8.0, 16.0]), tokens=jnp.array([4.0, 4.0]),
    )  # fmt: skip
    assert balance_loss(sums) == pytest.approx(3 * (6 / 8 * 4 / 8 + 1 / 8 * 3 / 8 + 1 / 8 * 1 / 8))
    assert z_loss(sums) == 3.0
    metrics = router_metrics(sums, Experts(number=3, top_k=1))
    assert metrics["router_busiest"] == 1.0
    assert metrics["router_entropy"] == pytest.approx((0 + 1.5 * np.log(2) / np.log(3)) / 2, rel=1e-5)


def test_no_token_gives_no_loss():
    none = RouterSums(jnp.zeros((1, 3)), jnp.zeros((1, 3)), jnp.zeros(1), jnp.zeros(1))
    assert all(np.isfinite(value) for value in router_metrics(none, Experts(number=3, top_k=1)).values())
    assert balance_loss(none) == z_loss(none) == 0


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValidationError, match="top_k=5 is more than number=4"):
        Experts(number=4, top_k=5)
