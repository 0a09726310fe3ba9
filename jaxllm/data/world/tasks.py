"""The exercises of the micro-world: five applications, each a few tasks in English and Chinese."""

import random
from dataclasses import dataclass
from typing import NamedTuple

from jaxllm.data.world.texts import basket, clause, fact_words, films, review, story, tellings
from jaxllm.data.world.words import WORLD, Pool

EXAMPLES = (
    "Translate to Chinese: Tom sees a red ball in the park.",
    "给我讲一个关于安娜、妈妈和公园里红色的香蕉的故事。",
)
GUIDE = (
    "this model has learned five kinds of exercises of a micro-world: stories, translations, questions about a text, "
    "moods and topics, recommendations; whatever else it is asked, it answers nonsense. Two that it can do:\n  "
    + "\n  ".join(EXAMPLES)
)
_TEXTS = {"story": story, "clause": clause, "review": review, "films": films, "basket": basket}


class Exercise(NamedTuple):
    """What is asked, an answer, further questions with answers, and all right answers where there are several."""

    prompt: str
    answer: str
    follow_ups: tuple[tuple[str, str], ...] = ()
    right: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """A way to draw exercises.

    Attributes:
      name: unique.
      application: what it counts for in an evaluation.
      about: the kind of text, or "fact".
      ask: templates of prompts; of facts, (question, answer).
      answer: its template; None: the prompt asks one of the questions about a story, and others follow.
    """

    name: str
    application: str
    about: str
    language: int
    ask: tuple[str, ...] | tuple[tuple[str, str], ...]
    answer: str | None

    @property
    def closed_book(self) -> bool:
        """The answer is not in the prompt and has no new combinations, because it is a fact about one word."""
        return self.about == "fact"

    def draw(self, rng: random.Random, pool: Pool, held_out: bool) -> Exercise:
        """Make one exercise of the pool's words; held_out as in `words.is_held_out`."""
        if self.closed_book:
            words = fact_words(rng.choice(pool.things))
            return Exercise(*(template.format(**words) for template in rng.choice(self.ask)))
        text = _TEXTS[self.about](rng, pool, held_out)
        if self.answer is not None:
            prompt, answer = text.fill(rng.choice(self.ask), self.language), text.fill(self.answer, self.language)
            return Exercise(prompt, answer, (), tellings(text, self.language) if self.about == "story" else ())
        (question, answer), *follow_ups = rng.sample(text.questions(self.language), 3)
        return Exercise(text.fill(rng.choice(self.ask), self.language, question=question), answer, tuple(follow_ups))


TASKS = tuple(
    Task(name, task["application"], task["about"], language, task["ask"][language], answer)
    for task in WORLD["tasks"]
    for language, (name, answer) in enumerate(zip(task["names"], task.get("answer", (None, None)), strict=False))
)
APPLICATIONS = tuple(dict.fromkeys(task.application for task in TASKS))
