import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from jaxllm.inference.sampling import Sampler, Settings, choose, filtered, penalise, row_key, settings

RANDOM = np.random.default_rng(0).normal(size=(5, 200)).astype(np.float32) * 3


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kept(logits, **values):
    return np.isfinite(np.asarray(filtered(jnp.asarray(logits), settings(Sampler(temperature=1, **values)))))


@pytest.mark.parametrize("k", [1, 2, 50, 199, 200, 1000])
def test_top_k_keeps_the_k_largest(k):
    expected = np.sort(RANDOM, -1)[:, -min(k, 200), None] <= RANDOM
    np.testing.assert_array_equal(kept(RANDOM, top_k=k), expected)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.99])
def test_top_p_keeps_the_smallest_set_that_reaches_p(p):
    for row, mask in zip(softmax(RANDOM), kept(RANDOM, top_p=p), strict=True):
        order = np.argsort(-row)
        count = int(np.searchsorted(np.cumsum(row[order]), p)) + 1
        np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(order[:count]))


def test_min_p_keeps_a_share_of_the_best():
    probs = softmax(RANDOM)
    np.testing.assert_array_equal(kept(RANDOM, min_p=0.1), probs >= 0.1 * probs.max(-1, keepdims=True))


def test_top_p_sees_what_top_k_left_renormalised():
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.1]], np.float32))
    np.testing.assert_array_equal(kept(logits, top_p=0.55), [[True, True, False, False]])
    np.testing.assert_array_equal(kept(logits, top_p=0.55, top_k=2), [[True, False, False, False]])  # 0.4 / 0.7 > 0.55


def test_filters_keep_ties_and_never_drop_everything():
    np.testing.assert_array_equal(kept(np.zeros((1, 4)), top_k=1, top_p=0.1, min_p=1.0), [[True] * 4])
    np.testing.assert_array_equal(kept([[-5.0, -1.0, 0.0, -0.0]], top_k=1).any(), True)


def test_one_token_vocabulary_and_infinite_logits():
    np.testing.assert_array_equal(kept([[3.0]], top_k=5, top_p=0.5, min_p=0.5), [[True]])
    hidden = np.array([[1.0, -np.inf, 0.0, -np.inf]], np.float32)  # ids beyond the tokenizer's are -inf
    np.testing.assert_array_equal(kept(hidden, top_k=4, top_p=1.0 - 1e-6, min_p=1e-6), [[True, False, True, False]])
    tokens, logprobs = choose(jnp.asarray(hidden), None, np.zeros((1, 2), np.uint32), 0, settings(Sampler(top_k=3)))
    assert int(tokens[0]) in (0, 2)
    assert np.isfinite(logprobs).all()


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature):
    keys = np.stack([np.arange(5), np.arange(5)], -1).astype(np.uint32)
    sampler = Sampler(temperature=temperature, top_k=50, top_p=0.9, min_p=0.1)
    tokens, _ = choose(jnp.asarray(RANDOM), None, keys, 0, settings(sampler))
    np.testing.assert_array_equal(tokens, RANDOM.argmax(-1))


def test_penalty_pushes_both_signs_down_for_seen_tokens_only():
    logits = jnp.array([[2.0, -2.0, 2.0, -2.0]])
    seen = jnp.array([[True, True, False, False]])
    np.testing.assert_allclose(penalise(logits, seen, jnp.float32(2.0)), [[1.0, -4.0, 2.0, -2.0]])


def test_greedy_is_argmax_and_logprobs_are_the_models_own():
    keys = np.zeros((5, 2), np.uint32)
    tokens, logprobs = choose(jnp.asarray(RANDOM), None, keys, 0, settings(Sampler(temperature=0, top_k=3)))
    np.testing.assert_array_equal(tokens, RANDOM.argmax(-1))
    np.testing.assert_allclose(logprobs, np.log(softmax(RANDOM).max(-1)), rtol=1e-5)


@pytest.mark.parametrize(
    ("sampler", "expected"),
    [
        (Sampler(temperature=1.0), [0.5, 0.3, 0.15, 0.05]),
        (Sampler(temperature=0.5), np.square([0.5, 0.3, 0.15, 0.05]) / 0.365),
        (Sampler(temperature=1.0, top_k=2), [0.625, 0.375, 0, 0]),
        (Sampler(temperature=1.0, min_p=0.25), np.array([0.5, 0.3, 0.15, 0]) / 0.95),
    ],
    ids=["plain", "temperature", "top_k", "min_p"],
)
def test_draws_follow_the_distribution(sampler, expected):
    n = 20_000
    logits = jnp.broadcast_to(jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05])), (n, 4))
    keys = np.stack([np.arange(n), np.full(n, 7)], -1).astype(np.uint32)
    tokens, _ = jax.jit(choose)(logits, None, keys, 0, settings(sampler))
    shares = np.bincount(tokens, minlength=4) / n
    np.testing.assert_allclose(shares, expected, atol=4.5 * np.sqrt(0.25 / n))


def test_changing_a_value_does_not_compile_again():
    traces = []

    @functools.partial(jax.jit)
    def run(logits, keys, values):
        traces.append(1)
        return choose(logits, None, keys, 0, values)

    for temperature, top_k, top_p in [(0.5, 3, 0.9), (0.7, 100, 0.2)]:
        values = settings(Sampler(temperature=temperature, top_k=top_k, top_p=top_p))
        run(jnp.asarray(RANDOM), np.zeros((5, 2), np.uint32), values)
    assert len(traces) == 1


def test_steps_that_do_nothing_are_left_out():
    assert settings(Sampler(temperature=0, top_k=5, top_p=0.5)) == Settings()
    assert settings(Sampler(temperature=1, top_p=1, min_p=0)) == Settings(temperature=1)


def test_row_keys_differ_by_seed_prompt_and_sample():
    cases = itertools.product((0, 1), ([1, 2], [12]), (0, 1))
    keys = {row_key(*case).tobytes() for case in cases}
    assert len(keys) == 8
    np.testing.assert_array_equal(row_key(0, [1, 2], 0), row_key(0, (1, 2), 0))


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 2}, {"min_p": -1}])
def test_impossible_values_are_refused(wrong):
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        Sampler(**wrong)
