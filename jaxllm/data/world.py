"""A micro-world to pretrain and tune on, in English and Chinese: seeded, the same bytes everywhere, nothing to fetch.

`documents` is running text, `conversations` are instructions with answers for five applications. What they may contain
is decided in `world_words.py`: contents that `is_held_out` are in neither, late words are in documents only. Item i is
a function of (seed, i), so a longer collection begins with the shorter one.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace

from jaxllm.data.documents import Conversation, Document, Message
from jaxllm.data.world_stories import Story
from jaxllm.data.world_tasks import TASKS
from jaxllm.data.world_texts import Basket, Clause, FilmLog, Review
from jaxllm.data.world_words import (
    EN,
    EVERY,
    NOVEL_PEOPLE,
    SEEN,
    ZH,
    Word,
    with_article,
)

SOURCE = "world"
_ROLES = ("user", "assistant")


_TASK = {task.name: task for task in TASKS}
# Eight rounds of the five applications; what is harder to learn comes more often.
SCHEDULE = tuple(
    _TASK[name]
    for name in (
        *("story_en", "en_zh", "reading_en", "sentiment_en", "basket_en"),
        *("story_zh", "zh_en", "reading_zh", "sentiment_zh", "basket_zh"),
        *("story_en", "en_zh", "reading_en", "sentiment_en", "basket_en"),
        *("story_zh", "zh_en", "reading_zh", "sentiment_zh", "basket_zh"),
        *("story_en", "en_zh", "reading_en", "topic_zh", "basket_en"),
        *("story_zh", "zh_en", "reading_zh", "sentiment_zh", "basket_zh"),
        *("story_en", "en_zh", "reading_zh", "topic_en", "films_en"),
        *("story_zh", "zh_en", "closed_book", "topic_zh", "films_zh"),
    )
)


def documents(count: int, seed: int) -> Iterator[Document]:
    """Yield `count` pretraining documents of one to nine lines, 37 tokens on average and at most 103 (BPE of 1,280).

    Args:
      seed: another seed gives other documents of the same world.
    """
    makers, weights = zip(*_DOCUMENTS, strict=True)
    for index in range(count):
        rng = random.Random(f"world documents {seed} {index}")
        [maker] = rng.choices(makers, weights)
        yield Document("\n".join(maker(rng)), SOURCE, f"seed {seed}, document {index}")


def conversations(count: int, seed: int) -> Iterator[Conversation]:
    """Yield `count` instructions with their answers; any run of `len(SCHEDULE)` has every application equally often."""
    for index in range(count):
        rng = random.Random(f"world conversations {seed} {index}")
        task = SCHEDULE[index % len(SCHEDULE)]
        prompt, answer, follow_ups = task.draw(rng, SEEN, False)
        turns = ((prompt, answer), *follow_ups)
        messages = tuple(Message(role, text) for turn in turns for role, text in zip(_ROLES, turn, strict=True))
        yield Conversation(messages, SOURCE, f"seed {seed}, conversation {index}, {task.name}")


def _language(rng: random.Random) -> int:
    return rng.choice((EN, ZH))


def _other(language: int) -> int:
    return EN if language == ZH else ZH


_TITLE = ("{hero}, {relative} and a {colour} {thing} in the {place}", "{hero}、{relative}和{place}里{colour}的{thing}")


# One line of a document is news, the others follow from it: what cannot be predicted teaches a small model only noise.
def _tale(rng: random.Random) -> list[str]:
    story, first = Story.draw(rng, EVERY, False), _language(rng)
    return [story.fill(_TITLE[first], first), story.say(first), story.say(_other(first))]


def _comprehension(rng: random.Random) -> list[str]:
    story, language = Story.draw(rng, EVERY, False), _language(rng)
    if language == EN and rng.random() < 0.3:
        name = _invented_name(rng)  # names are there to be copied, also those never met before
        story = replace(story, hero=Word(name, name))
    questions = story.questions(language)
    asked = [questions[index] for index in sorted(rng.sample(range(len(questions)), 3))]
    return [story.fill(_TITLE[language], language), story.say(language), *(line for pair in asked for line in pair)]


def _parallel(rng: random.Random) -> list[str]:
    clause, first = Clause.draw(rng, EVERY, False), _language(rng)
    return [clause.say(first), clause.say(_other(first)), clause.say(first)]


def _fact(rng: random.Random) -> list[str]:
    thing = rng.choice(EVERY.things)
    name = with_article(thing.en).capitalize()
    lines = [
        f"{name} is {with_article(thing.kind.en)}.",
        f"{thing.zh}是{thing.kind.zh}。",
        f"{name} in Chinese is {thing.zh}.",
    ]
    return rng.sample(lines, 3)


def _critique(rng: random.Random) -> list[str]:
    review, language = Review.draw(rng, EVERY, False), _language(rng)
    verdict = (("I hated it.", "I loved it."), ("我讨厌它。", "我喜欢它。"))[language][review.positive]
    return [review.say(language) + (verdict if language == ZH else " " + verdict)]


def _diary(rng: random.Random) -> list[str]:
    language = _language(rng)
    if rng.random() < 0.7:
        basket = Basket.draw(rng, EVERY, False)
        person, wanted, offer = basket.person[language], basket.wanted[language], basket.offer(language)
        if language == ZH:
            return [f"{basket.say(ZH)}店里有{offer}。", f"{person}选择{wanted}。"]
        return [f"{basket.say(EN)} The shop has: {offer}.", f"{person} takes the {wanted}."]
    log = FilmLog.draw(rng, EVERY, False)
    return [
        log.say(language),
        f"接着是 {log.title(log.length)} 。" if language == ZH else f"Next is {log.title(log.length)}.",
    ]


def _invented_name(rng: random.Random) -> str:
    while True:
        name = "".join(rng.choice("bdfghklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(2, 3)))
        if not any(novel.en.lower() in name for novel in NOVEL_PEOPLE):
            return name.capitalize()


def _exercise(rng: random.Random) -> list[str]:
    prompt, answer, follow_ups = rng.choice(TASKS).draw(rng, EVERY, False)
    return [prompt, answer, *(line for turn in follow_ups for line in turn)]


_DOCUMENTS: tuple[tuple[Callable[[random.Random], list[str]], float], ...] = (
    (_tale, 0.17),
    (_comprehension, 0.22),
    (_parallel, 0.16),
    (_fact, 0.07),
    (_critique, 0.09),
    (_diary, 0.13),
    (_exercise, 0.18),
)
