"""The evaluation over applications, asked of models whose right answers are known."""

import json
from typing import NamedTuple

import pytest

from jaxllm.data.tokenizers.tokenizer import byte_tokenizer
from jaxllm.evaluation.applications import MAX_FAILURES, compare, evaluate_applications
from jaxllm.evaluation.tasks import APPLICATIONS, held_out

SPLITS = ("new_combinations", "pretrain_only", "novel")


class Answer(NamedTuple):
    text: str
    tokens: list[int]


class Oracle:
    """Knows every answer of seed 0, except to prompts that `forgets` says; cuts its answers as a real model must."""

    def __init__(self, forgets=lambda example: False, count=12):
        self.tokenizer = byte_tokenizer()
        self.calls = []
        self.answers = {}
        for application in APPLICATIONS:
            for split in SPLITS[:2] if application != "qa" else SPLITS:
                for example in held_out(application, split, count, 0):
                    self.answers[example.prompt] = "?" if forgets(example) else example.answer

    def generate(self, prompts, *, max_new_tokens, sampler):
        assert all([message["role"] for message in prompt] == ["user"] for prompt in prompts)
        assert sampler.temperature == 0
        self.calls.append(len(prompts))
        ids = [self.tokenizer.encode(self.answers[prompt[0]["content"]])[:max_new_tokens] for prompt in prompts]
        return [Answer(self.tokenizer.decode(each), each) for each in ids]


def test_a_model_that_knows_everything_scores_one_in_one_greedy_call():
    oracle = Oracle()
    results = evaluate_applications(oracle, 12, splits=SPLITS)
    assert set(results["new_combinations"]) == set(APPLICATIONS) == set(results["pretrain_only"])
    assert set(results["novel"]) == {"qa"}
    entries = [entry for split in SPLITS for entry in results[split].values()]
    assert all(entry["fraction"] == 1 and entry["n"] == entry["correct"] == 12 for entry in entries)
    assert oracle.calls == [132]
    assert results["answer_tokens"] == sum(len(answer.encode()) for answer in oracle.answers.values())
    assert results["seconds"] >= 0
    json.dumps(results)


def test_failures_are_counted_by_task_and_shown():
    oracle = Oracle(lambda example: example.task == "en_zh")
    entry = evaluate_applications(oracle, 12, applications=["translation"])["new_combinations"]["translation"]
    assert entry["by_task"] == {"en_zh": 0.0, "zh_en": 1.0}
    assert (entry["correct"], entry["n"], entry["fraction"]) == (6, 12, 0.5)
    missed = [each for each in held_out("translation", "new_combinations", 12, 0) if each.task == "en_zh"]
    assert entry["failures"] == [{"prompt": e.prompt, "expected": e.answer, "got": "?"} for e in missed]


def test_failures_kept_are_few():
    oracle = Oracle(lambda example: True, count=50)
    entry = evaluate_applications(oracle, 50, applications=["qa"])["new_combinations"]["qa"]
    assert entry["fraction"] == 0 and len(entry["failures"]) == MAX_FAILURES


def test_compare_joins_two_results():
    base = evaluate_applications(Oracle(lambda example: True), 4)
    tuned = evaluate_applications(Oracle(), 4)
    joined = compare(base, tuned, "new_combinations")
    assert joined == {name: {"base": 0.0, "tuned": 1.0, "n": 4} for name in APPLICATIONS}


def test_unknown_application():
    with pytest.raises(ValueError, match="application='poetry' is unknown"):
        evaluate_applications(Oracle(), 4, applications=["poetry"])
