"""Numbers in sentences."""

import pytest

from jaxllm.core.wording import count, short


@pytest.mark.parametrize(("number", "text"), [(0, "0 rows"), (1, "1 row"), (2, "2 rows"), (2000, "2,000 rows")])
def test_count_has_the_right_plural(number, text):
    assert count(number, "row") == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0k"), (49_152, "49.2k"), (3.4e6, "3.4M"), (6.74e9, "6.7B"), (2e12, "2,000.0B")],
)
def test_short_numbers_are_never_zero_millions(number, text):
    assert short(number) == text
