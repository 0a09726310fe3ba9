"""Evaluation on the micro-world: held-out exercises of five applications and what counts as a right answer.

Nothing here depends on what was generated for training: `data.world.words` keeps the held-out contents out of every
document and conversation, whatever their number and seed.
"""

import random
from dataclasses import dataclass
from typing import Literal

from jaxllm.data.world.tasks import APPLICATIONS as APPLICATIONS
from jaxllm.data.world.tasks import TASKS
from jaxllm.data.world.words import LATE, NOVEL, SEEN, Pool

Split = Literal["new_combinations", "pretrain_only", "novel"]
_POOLS: dict[str, Pool] = {"new_combinations": SEEN, "pretrain_only": LATE, "novel": NOVEL}
_TRIES_FOR_A_NEW_PROMPT = 1000


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt that is in no training data, and its right answer.

    Attributes:
      application: one of `APPLICATIONS`.
      task: the finer kind, such as "reading_zh".
      split: "new_combinations" of words that conversations use, "pretrain_only" about a word that only documents use,
        or "novel", names that occur nowhere.
      answer: of a generation example, one of the right answers; right: all of them.
    """

    application: str
    task: str
    split: Split
    prompt: str
    answer: str
    right: tuple[str, ...] = ()


def held_out(application: str, split: Split, count: int, seed: int) -> list[Example]:
    """Return `count` examples of distinct prompts, drawn from the application's tasks in turn.

    Args:
      application: one of `APPLICATIONS`.
      split: as in `Example`; "novel" exists for "qa" alone, the application that can be answered by copying.
    Raises:
      ValueError: an unknown application or split, or fewer than `count` distinct prompts exist.
    """
    tasks = [task for task in TASKS if task.application == application]
    if not tasks:
        raise ValueError(f"application={application!r} is unknown; use one of {', '.join(APPLICATIONS)}")
    if split not in _POOLS or (split == "novel" and application != "qa"):
        known = "new_combinations or pretrain_only (or novel, for qa)"
        raise ValueError(f"split={split!r} does not exist for {application}; use {known}")
    if split == "novel":
        tasks = [task for task in tasks if task.name == "reading_en"]  # the novel names are not written in Chinese
    elif split == "new_combinations":
        tasks = [task for task in tasks if not task.closed_book]
    rng = random.Random(f"world held out {application} {split} {seed}")
    examples: dict[str, Example] = {}
    index, last_new = 0, 0
    while len(examples) < count:
        task = tasks[index % len(tasks)]
        prompt, answer, _, right = task.draw(rng, _POOLS[split], True)
        index += 1
        if prompt not in examples:
            examples[prompt], last_new = Example(application, task.name, split, prompt, answer, right), index
        elif index - last_new > _TRIES_FOR_A_NEW_PROMPT:
            raise ValueError(f"count={count} is too many: {application}, {split} has {len(examples)} distinct prompts")
    return list(examples.values())


def is_correct(example: Example, text: str) -> bool:
    """Say whether `text` answers the example: exactly, or for generation by any story about what was asked.

    Surrounding white space does not count. A story must be one that `data.world.texts` can tell of the two people,
    the colour, the thing and the place of the prompt; the plot is free.
    """
    return text.strip() in (example.answer, *example.right)
