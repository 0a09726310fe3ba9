"""The exercises of the micro-world: five applications, each a few tasks in English and Chinese."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from jaxllm.data.world_stories import Story
from jaxllm.data.world_texts import Basket, Clause, FilmLog, Review
from jaxllm.data.world_words import EN, ZH, Pool, with_article


class Exercise(NamedTuple):
    """What is asked, the one right answer (of a generation task: one of them), and further questions with answers."""

    prompt: str
    answer: str
    follow_ups: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Task:
    """A way to draw exercises: `draw(rng, pool, held_out)`.

    Attributes:
      name: unique.
      application: what it counts for in an evaluation.
      draw: makes one exercise of the pool's words; held_out as in `world_words.is_held_out`.
      closed_book: the answer is not in the prompt and has no new combinations, because it is a fact about one word.
    """

    name: str
    application: str
    draw: Callable[[random.Random, Pool, bool], Exercise]
    closed_book: bool = False


_WRITE = (
    (
        "Write a story about {hero}, {relative} and a {colour} {thing} in the {place}.",
        "Tell me a story about {hero}, {relative} and a {colour} {thing} in the {place}.",
        "Please write a short story with {hero}, {relative} and a {colour} {thing} in the {place}.",
    ),
    (
        "写一个关于{hero}、{relative}和{place}里{colour}的{thing}的故事。",
        "请写一个故事，关于{hero}、{relative}和{place}里{colour}的{thing}。",
        "给我讲一个关于{hero}、{relative}和{place}里{colour}的{thing}的故事。",
    ),
)
_TO_CHINESE = (
    "Translate to Chinese: {}",
    "Please translate into Chinese: {}",
    "What is this in Chinese? {}",
    "翻译成中文：{}",
)
_TO_ENGLISH = (
    "翻译成英文：{}",
    "请把这句话翻译成英文：{}",
    "Translate to English: {}",
    "Please translate into English: {}",
)
_READ = (
    (
        "Read and answer. {story} {question}",
        "Answer the question. {story} {question}",
        "Story: {story} Question: {question}",
    ),
    ("请根据以下信息回答问题：{story}{question}", "请回答问题。{story}{question}", "故事：{story}问题：{question}"),
)
_FEEL = (
    ("Is this review positive or negative? {}", "Positive or negative? {}", "Sentiment of this review: {}"),
    ("这条评论是正面还是负面？{}", "正面还是负面？{}", "判断评论的情感：{}"),
)
_OPINIONS = (("It is negative.", "It is positive."), ("负面。", "正面。"))
_ABOUT = (
    ("What is this text about? {}", "Topic of this text: {}", "Classify the topic: {}"),
    ("这句话的主题是什么？{}", "判断主题：{}", "请给这句话分类：{}"),
)
_NEXT = (
    ("{log} What should {person} watch next?", "{log} Recommend the next film."),
    ("{log}下一部应该看什么？", "{log}请推荐下一部电影。"),
)
_PICK = (
    ("{basket} Recommend one of these: {offer}.", "{basket} What should {person} buy next: {offer}?"),
    ("{basket}请从这些里推荐一个：{offer}。", "{basket}下一个应该买什么：{offer}？"),
)
_RECOMMEND = ("I recommend the {}.", "我推荐{}。")


def _generation(language: int) -> Callable[[random.Random, Pool, bool], Exercise]:
    def draw(rng: random.Random, pool: Pool, held_out: bool) -> Exercise:
        story = Story.draw(rng, pool, held_out)
        return Exercise(story.fill(rng.choice(_WRITE[language]), language), story.say(language))

    return draw


def _translation(source: int, target: int) -> Callable[[random.Random, Pool, bool], Exercise]:
    phrasings = _TO_CHINESE if target == ZH else _TO_ENGLISH

    def draw(rng: random.Random, pool: Pool, held_out: bool) -> Exercise:
        clause = Clause.draw(rng, pool, held_out)
        return Exercise(rng.choice(phrasings).format(clause.say(source)), clause.say(target))

    return draw


def _reading(language: int) -> Callable[[random.Random, Pool, bool], Exercise]:
    def draw(rng: random.Random, pool: Pool, held_out: bool) -> Exercise:
        story = Story.draw(rng, pool, held_out)
        (question, answer), *follow_ups = rng.sample(story.questions(language), 3)
        prompt = rng.choice(_READ[language]).format(story=story.say(language), question=question)
        return Exercise(prompt, answer, tuple(follow_ups))

    return draw


def _closed_book(rng: random.Random, pool: Pool, held_out: bool) -> Exercise:
    thing = rng.choice(pool.things)
    name = with_article(thing.en)
    return Exercise(
        *rng.choice(
            (
                (f"What kind of thing is {name}?", f"It is {with_article(thing.kind.en)}."),
                (f"What is {name} in Chinese?", f"{thing.zh}。"),
                (f"{thing.zh}是什么东西？", f"是{thing.kind.zh}。"),
                (f"{thing.zh}的英文是什么？", f"It is {name}."),
            )
        )
    )


def _sentiment(language: int) -> Callable[[random.Random, Pool, bool], Exercise]:
    def draw(rng: random.Random, pool: Pool, held_out: bool) -> Exercise:
        review = Review.draw(rng, pool, held_out)
        return Exercise(rng.choice(_FEEL[language]).format(review.say(language)), _OPINIONS[language][review.positive])

    return draw


def _topic(language: int) -> Callable[[random.Random, Pool, bool], Exercise]:
    def draw(rng: random.Random, pool: Pool, held_out: bool) -> Exercise:
        clause = Clause.draw(rng, pool, held_out)
        kind = clause.thing.kind
        answer = f"{kind.zh}。" if language == ZH else f"{with_article(kind.en).capitalize()}."
        return Exercise(rng.choice(_ABOUT[language]).format(clause.say(language)), answer)

    return draw


def _films(language: int) -> Callable[[random.Random, Pool, bool], Exercise]:
    def draw(rng: random.Random, pool: Pool, held_out: bool) -> Exercise:
        log = FilmLog.draw(rng, pool, held_out)
        prompt = rng.choice(_NEXT[language]).format(log=log.say(language), person=log.person[language])
        title = log.title(log.length)
        return Exercise(prompt, f"我推荐 {title} 。" if language == ZH else f"I recommend {title}.")

    return draw


def _basket(language: int) -> Callable[[random.Random, Pool, bool], Exercise]:
    def draw(rng: random.Random, pool: Pool, held_out: bool) -> Exercise:
        basket = Basket.draw(rng, pool, held_out)
        prompt = rng.choice(_PICK[language]).format(
            basket=basket.say(language), person=basket.person[language], offer=basket.offer(language)
        )
        return Exercise(prompt, _RECOMMEND[language].format(basket.wanted[language]))

    return draw


TASKS = (
    Task("story_en", "generation", _generation(EN)),
    Task("story_zh", "generation", _generation(ZH)),
    Task("en_zh", "translation", _translation(EN, ZH)),
    Task("zh_en", "translation", _translation(ZH, EN)),
    Task("reading_en", "qa", _reading(EN)),
    Task("reading_zh", "qa", _reading(ZH)),
    Task("closed_book", "qa", _closed_book, closed_book=True),
    Task("sentiment_en", "classification", _sentiment(EN)),
    Task("sentiment_zh", "classification", _sentiment(ZH)),
    Task("topic_en", "classification", _topic(EN)),
    Task("topic_zh", "classification", _topic(ZH)),
    Task("films_en", "recommendation", _films(EN)),
    Task("films_zh", "recommendation", _films(ZH)),
    Task("basket_en", "recommendation", _basket(EN)),
    Task("basket_zh", "recommendation", _basket(ZH)),
)
APPLICATIONS = tuple(dict.fromkeys(task.application for task in TASKS))
