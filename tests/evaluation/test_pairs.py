"""BLEU is sacrebleu's, by the words of the script, and says so."""

from io import StringIO

import pytest
from rich.console import Console

from jaxllm.evaluate import show
from jaxllm.evaluation.pairs import bleu


@pytest.mark.parametrize(
    ("found", "right", "value", "words"),
    [
        (["a b c d e"], ["a b c d f"], 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25, "13a"),
        (["It is, isn't it?"], ["It is, isn't it?"], 100.0, "13a"),
        (["a b c d", "x"], ["a b c d", "y"], 100 * (4 / 5) ** 0.25, "13a"),  # counts are added before they are divided
        (["我喜欢大猫。"], ["我喜欢大狗。"], 100 * (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, "zh"),
        (["猫が好きです"], ["猫が好きです"], 100.0, "char"),
    ],
)
def test_bleu(found, right, value, words):
    score, signature = bleu(found, right)
    assert score == pytest.approx(value)
    assert f"case:mixed|eff:no|tok:{words}|" in signature
    values = {"nats_per_token": 1.0, "tokens": 9, "perplexity": 2.7, "bits_per_byte": 1.0, "examples": []}
    values |= {"bleu": score, "bleu_signature": signature, "correct": 0, "pairs": len(right)}
    console = Console(file=StringIO(), width=40)
    show({"perplexity": values}, console)
    assert f"0 right to the letter (sacrebleu {signature})\n" in console.file.getvalue()
