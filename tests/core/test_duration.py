"""Lengths of training in steps, tokens and epochs."""

import pytest
from pydantic import ValidationError

from jaxllm.core.config import Duration


@pytest.mark.parametrize(
    ("given", "steps"),
    [
        (10000, 10000), ("10000", 10000), ("1e4", 10000), ("10_000 steps", 10000), ("1 step", 1), (5.0, 5),
        ("1 epoch", 250), ("1.5 epochs", 375), ("0.29 epochs", 72), ("0.001 epochs", 1), (".5 epochs", 125),
        ("2e9 tokens", 2_000_000), ("4095 tokens", 4), ("1 token", 1),
    ],
)  # fmt: skip
def test_duration(given, steps):
    assert Duration(given).resolve(steps_per_epoch=250, tokens_per_step=1000) == steps


def test_duration_is_exact_where_floats_are_not():
    assert Duration("0.29 epochs").resolve(steps_per_epoch=100, tokens_per_step=1) == 29


def test_durations_compare_by_meaning():
    assert Duration("10000 steps") == Duration(10000)
    assert Duration("2_000_000 tokens") == Duration("2e6 TOKENS")


@pytest.mark.parametrize(
    "bad", [0, -1, "0 epochs", "-5 tokens", "epoch", "1 week", "", None, True, "1.2.3", "nan", "inf", "_"]
)
def test_bad_duration(bad):
    with pytest.raises(ValidationError, match='expected a number of steps, "2e9 tokens" or "1 epoch", more than 0'):
        Duration(bad)
