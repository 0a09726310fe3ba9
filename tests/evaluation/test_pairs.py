"""BLEU against its formula by hand."""

import pytest

from jaxllm.evaluation.pairs import bleu


@pytest.mark.parametrize(
    ("found", "right", "value"),
    [
        (["a b c d e"], ["a b c d f"], 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
        (["a b c d"], ["a b c d e f"], 100 * 2.718281828 ** (1 - 6 / 4)),  # too short
        (["a b c d", "x"], ["a b c d", "y"], 100 * (4 / 5) ** 0.25),  # counts are added before they are divided
        (["the the the the the"], ["the cat is on the mat"], 0.0),
        (["我喜欢猫。"], ["我喜欢狗。"], 100 * (4 / 5 * 2 / 4 * 1 / 3 * 0) ** 0.25),
        (["我喜欢猫"], ["我喜欢猫"], 100.0),  # four words
        ([""], ["a"], 0.0),
    ],
)
def test_bleu(found, right, value):
    assert bleu(found, right) == pytest.approx(value)
