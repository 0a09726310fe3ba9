"""From fractions of right answers to the rows of a table, each with the uncertainty that few examples leave."""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Score(NamedTuple):
    """One bar: a fraction in percent, with the 95% interval that n examples leave open."""

    percent: float
    low: float
    high: float


class Row(NamedTuple):
    """A line of a results table."""

    application: str
    base: Score | None
    tuned: Score | None
    n: int


class Summary(NamedTuple):
    """Percent of all n examples that were solved; base is None where it was not measured."""

    tuned: float
    base: float | None
    n: int


def summarise(scores: Mapping[str, Mapping[str, float]]) -> Summary | None:
    """Add up all applications; None if nothing was measured."""
    entries = [entry for entry in scores.values() if "tuned" in entry]
    if not entries:
        return None
    n = sum(entry["n"] for entry in entries)
    tuned, base = (
        100 * sum(entry[key] * entry["n"] for entry in entries) / n if all(key in entry for entry in entries) else None
        for key in ("tuned", "base")
    )
    return Summary(tuned, base, n)


def table(scores: Mapping[str, Mapping[str, float]]) -> list[Row]:
    """Return a row per application of {application: {"base", "tuned", "n"}}; base or tuned may be absent."""
    rows = []
    for application, entry in scores.items():
        base, tuned = (
            Score(*(100 * x for x in (entry[kind], *interval(entry[kind], entry["n"])))) if kind in entry else None
            for kind in ("base", "tuned")
        )
        rows.append(Row(application, base, tuned, int(entry["n"])))
    return rows


def interval(fraction: float, n: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a fraction observed on n examples.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    z = 1.96
    centre = (fraction + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(fraction * (1 - fraction) / n + z * z / (4 * n * n))
    return max(centre - half, 0.0), min(centre + half, 1.0)
