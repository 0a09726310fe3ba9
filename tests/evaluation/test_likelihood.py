"""Likelihood: sums first, one division, and a unit that does not depend on the tokenizer."""

import math

import numpy as np
import pytest

from jaxllm.core.batch import Batch
from jaxllm.evaluation.likelihood import bits_per_byte, evaluate_loss


def batch(weights):
    """A batch of these loss weights; nothing else of it is read."""
    return Batch(None, None, np.asarray(weights, np.float32), None, None)


def constant(nats):
    """Every weighted token costs `nats`."""
    return lambda batch: {"nats": nats * batch.weights.sum(), "tokens": batch.weights.sum()}


def test_uniform_over_bytes_is_eight_bits():
    assert bits_per_byte(10 * math.log(256), 10) == pytest.approx(8)


def test_tokenizers_compare_in_bits_per_byte():
    """The same text, 12 bytes for 24 bits, as 12 tokens or as 4."""
    bytewise, _ = evaluate_loss([batch([[1] * 12])], constant(2 * math.log(2)), bytes_per_token=1)
    pieces, _ = evaluate_loss([batch([[1] * 4])], constant(6 * math.log(2)), bytes_per_token=3)
    assert bytewise.bits_per_byte == pytest.approx(2) == pieces.bits_per_byte
    assert (bytewise.perplexity, pieces.perplexity) == pytest.approx((4, 64))


def test_batches_count_by_their_tokens():
    costs = iter([{"nats": 9.0, "tokens": 3.0}, {"nats": 1.0, "tokens": 1.0}])
    result, _ = evaluate_loss([batch([0]), batch([0])], lambda _: next(costs), bytes_per_token=1)
    assert (result.nats_per_token, result.tokens) == (2.5, 4)


def test_max_batches():
    batches = [batch([[1, 1]])] * 5
    assert evaluate_loss(iter(batches), constant(1.0), 1.0, max_batches=2)[0].tokens == 4


def test_perplexity_of_a_diverged_model_is_infinite():
    assert evaluate_loss([batch([[1]])], constant(1e4), 1.0)[0].perplexity == math.inf


def test_nothing_to_evaluate():
    with pytest.raises(ValueError, match="there is no token to evaluate; give a validation split"):
        evaluate_loss([batch([[0, 0]])], constant(1.0), 1.0)
