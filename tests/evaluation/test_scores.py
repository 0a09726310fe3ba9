"""Rows of a results table."""

import pytest

from jaxllm.evaluation import scores

SCORES = {"qa": {"base": 0.0, "tuned": 1.0, "n": 10}, "poetry": {"tuned": 0.5, "n": 30}}


@pytest.mark.parametrize(
    ("fraction", "n", "low", "high"),
    [(0.5, 100, 0.4038, 0.5962), (0.0, 10, 0.0, 0.2775), (1.0, 10, 0.7225, 1.0)],
)
def test_wilson_interval_equals_published_values(fraction, n, low, high):
    assert scores.interval(fraction, n) == pytest.approx((low, high), abs=1e-4)


def test_rows_are_in_percent_with_their_interval():
    qa, poetry = scores.table(SCORES)
    assert (qa.application, qa.n, qa.tuned.percent, qa.base.percent) == ("qa", 10, 100, 0)
    assert (qa.tuned.low, qa.tuned.high) == pytest.approx((72.25, 100), abs=0.01)
    assert (poetry.application, poetry.base) == ("poetry", None)


def test_summary_counts_examples_not_applications():
    assert scores.summarise(SCORES) == (62.5, None, 40)
    assert scores.summarise({"qa": SCORES["qa"]}) == (100, 0, 10)
    assert scores.summarise({}) is None
