"""The five applications: held-out exercises asked in the chat template, answered greedily, judged by `tasks`."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from jaxllm.evaluation.tasks import APPLICATIONS, Example, Split, held_out, is_correct
from jaxllm.inference.sampling import Sampler

MAX_FAILURES = 20  # per application and split, that are kept to look at
GREEDY = Sampler(temperature=0.0)


def evaluate_applications(
    model: Any, count: int = 200, seed: int = 0, splits: Sequence[Split] = ("new_combinations",),
    applications: Sequence[str] = APPLICATIONS,
) -> dict[str, Any]:  # fmt: skip
    """Ask `count` exercises of each application and split, and say how many answers are right.

    Every model gets the same tokens, those of the chat template, also one that was never taught to answer.

    Args:
      model: `jaxllm.LanguageModel`, or what has a `tokenizer` and a `generate` like it.
      splits: as in `tasks.held_out`; "novel" is asked of "qa" alone, where it exists.
    Returns:
      What JSON can hold:
      {split: {application: {"fraction", "correct", "n", "by_task": {task: fraction}, "failures": [{"prompt",
      "expected", "got"}, ...]}}, "seconds": in all, "answer_tokens": written in all}
    Raises:
      ValueError: an unknown application or split, or count is more than there are exercises.
    """
    start = time.perf_counter()
    results: dict[str, Any] = {split: {} for split in splits}
    asked = exercises(count, seed, splits, applications)
    answers = _answer(model, [example for examples in asked.values() for example in examples])
    texts = (answer.text for answer in answers)
    for (split, application), examples in asked.items():
        results[split][application] = _entry(examples, [next(texts) for _ in examples])
    written = sum(len(answer.tokens) for answer in answers)
    return {**results, "seconds": time.perf_counter() - start, "answer_tokens": written}


def exercises(
    count: int, seed: int, splits: Sequence[Split], applications: Sequence[str]
) -> dict[tuple[Split, str], list[Example]]:
    """Return what `evaluate_applications` asks, by (split, application)."""
    return {
        (split, application): held_out(application, split, count, seed)
        for application in applications for split in splits if split != "novel" or application == "qa"
    }  # fmt: skip


def compare(base: Mapping[str, Any] | None, tuned: Mapping[str, Any], split: Split) -> dict[str, dict[str, float]]:
    """Join two results of `evaluate_applications` to {application: {"base", "tuned", "n"}}, as the report shows it.

    Args:
      base: None where there was no model to compare with; the entries then have no "base".
    """
    return {
        application: ({"base": base[split][application]["fraction"]} if base is not None else {})
        | {"tuned": entry["fraction"], "n": entry["n"]}
        for application, entry in tuned[split].items()
    }


def _answer(model: Any, examples: Sequence[Example]) -> Sequence[Any]:
    """Answer all prompts in one call, so that few shapes are compiled, with as much room as a right answer can need."""
    if not examples:
        return []
    longest = max(len(model.tokenizer.encode(example.answer)) for example in examples)
    limit = longest + longest // 2  # another story than ours may be longer; and a model that never stops is cut
    prompts = [[{"role": "user", "content": example.prompt}] for example in examples]
    return model.generate(prompts, max_new_tokens=limit, sampler=GREEDY)


def _entry(examples: Sequence[Example], texts: Sequence[str]) -> dict[str, Any]:
    """Judge one text per example."""
    failures = [(e, text) for e, text in zip(examples, texts, strict=True) if not is_correct(e, text)]
    asked, failed = Counter(each.task for each in examples), Counter(each.task for each, _ in failures)
    correct, n = len(examples) - len(failures), len(examples)
    kept = [{"prompt": e.prompt, "expected": e.answer, "got": text} for e, text in failures[:MAX_FAILURES]]
    by_task = {task: 1 - failed[task] / asked[task] for task in asked}
    return {"fraction": correct / n, "correct": correct, "n": n, "by_task": by_task, "failures": kept}
