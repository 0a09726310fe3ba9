"""A micro-world to pretrain and tune on, in English and Chinese: seeded, the same bytes everywhere, nothing to fetch.

`documents` is running text, `conversations` are instructions with answers for five applications. What they may contain
is decided in `words.py`: contents that `is_held_out` are in neither, late words are in documents only. Item i is
a function of (seed, i), so a longer collection begins with the shorter one. Its sentences are in `world.yaml`.
"""

import random
from collections.abc import Callable, Iterator
from functools import partial

from jaxllm.data.documents import Conversation, Document, Message
from jaxllm.data.world.tasks import TASKS
from jaxllm.data.world.texts import Text, basket, clause, fact_words, films, review, story
from jaxllm.data.world.words import EN, EVERY, NOVEL_PEOPLE, SEEN, WORLD, ZH, Word

SOURCE = "world"
_ROLES = ("user", "assistant")
_TASK = {task.name: task for task in TASKS}
SCHEDULE = tuple(_TASK[name] for name in WORLD["schedule"].split())
JOINED = 0.1  # of the conversations go on to other exercises: a quarter of all tokens


def documents(count: int, seed: int) -> Iterator[Document]:
    """Yield `count` pretraining documents of one to nine lines, 37 tokens on average and at most 103 (BPE of 1,280).

    Args:
      seed: another seed gives other documents of the same world.
    """
    makers, weights = zip(*_DOCUMENTS, strict=True)
    for index in range(count):
        rng = random.Random(f"world documents {seed} {index}")
        [maker] = rng.choices(makers, weights)
        yield Document(maker(rng), SOURCE, f"seed {seed}, document {index}")


def conversations(count: int, seed: int) -> Iterator[Conversation]:
    """Yield `count` instructions with their answers; any run of `len(SCHEDULE)` begins with every application equally
    often, and one in ten (`JOINED`) goes on to one to three exercises of other contents.
    """
    for index in range(count):
        rng = random.Random(f"world conversations {seed} {index}")
        task = SCHEDULE[index % len(SCHEDULE)]
        prompt, answer, follow_ups, _ = task.draw(rng, SEEN, False)
        turns = [(prompt, answer), *follow_ups]
        if rng.random() < JOINED:
            turns += [rng.choice(SCHEDULE).draw(rng, SEEN, False)[:2] for _ in range(rng.randint(1, 3))]
        messages = tuple(Message(role, text) for turn in turns for role, text in zip(_ROLES, turn, strict=True))
        yield Conversation(messages, SOURCE, f"seed {seed}, conversation {index}, {task.name}")


def _told(name: str, draw: Callable[..., Text], rng: random.Random) -> str:
    text = draw(rng, EVERY, False)
    language = rng.choice((EN, ZH))
    return text.fill(WORLD["documents"][name][language], language)


def _comprehension(rng: random.Random) -> str:
    told, language = story(rng, EVERY, False), rng.choice((EN, ZH))
    if language == EN and rng.random() < 0.3:
        name = _invented_name(rng)  # names are there to be copied, also those never met before
        hero = told.words["hero"]
        told = told._replace(words={slot: Word(name, name) if w == hero else w for slot, w in told.words.items()})
    questions = told.questions(language)
    asked = [line for index in sorted(rng.sample(range(len(questions)), 3)) for line in questions[index]]
    return told.fill(WORLD["documents"]["comprehension"][language], language, questions="\n".join(asked))


def _invented_name(rng: random.Random) -> str:
    while True:
        name = "".join(rng.choice("bdfghklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
        if not any(novel.en.lower() in name for novel in NOVEL_PEOPLE):
            return name.capitalize()


def _fact(rng: random.Random) -> str:
    words = fact_words(rng.choice(EVERY.things))
    return "\n".join(rng.sample([line.format(**words) for line in WORLD["facts"]], 3))


def _diary(rng: random.Random) -> str:
    language = rng.choice((EN, ZH))
    name, draw = ("shopping", basket) if rng.random() < 0.7 else ("watching", films)
    return draw(rng, EVERY, False).fill(WORLD["documents"][name][language], language)


def _exercise(rng: random.Random) -> str:
    prompt, answer, follow_ups, _ = rng.choice(TASKS).draw(rng, EVERY, False)
    return "\n".join([prompt, answer, *(line for turn in follow_ups for line in turn)])


_DOCUMENTS: tuple[tuple[Callable[[random.Random], str], float], ...] = (
    (partial(_told, "tale", story), 0.17),
    (_comprehension, 0.22),
    (partial(_told, "parallel", clause), 0.16),
    (_fact, 0.07),
    (partial(_told, "critique", review), 0.09),
    (_diary, 0.13),
    (_exercise, 0.18),
)
