"""The texts of the micro-world: each draws its content and says it in English and Chinese.

`clause`, `story`, `review`, `films` and `basket` draw a text of a pool's words, so that it is held out or, for what is
trained on, is not. A text is told from a template and a story is read back by the same template, so they cannot differ.
"""

import random
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Self

from jaxllm.data import world_words as known
from jaxllm.data.world_words import EN, WORLD, ZH, Pool, Thing, Word, draw_triple, is_held_out, with_article


class Text(NamedTuple):
    """Content that can be said in two languages: the template of each, and the words for its slots."""

    template: tuple[str, str]
    words: Mapping[str, Word | Thing]

    def say(self, language: int) -> str:
        """Return the text."""
        return self.template[language].format(**self._slots(language))

    def fill(self, template: str, language: int, **more: str) -> str:
        """Return `template` with the words of this text; {text} is the text itself, {translation} the other one."""
        texts = {"text": self.say(language), "translation": self.say(1 - language)}
        return template.format(**self._slots(language), **texts, **more)

    def questions(self, language: int) -> list[tuple[str, str]]:
        """Return every (question, answer) about a story; each answer is one that the text determines."""
        return [(self.fill(q, language), self.fill(a, language)) for q, a in WORLD["questions"][language]]

    def _slots(self, language: int) -> dict[str, str]:
        return {slot: word[language] for slot, word in self.words.items()}


def clause(rng: random.Random, pool: Pool, held_out: bool) -> Text:
    """Somebody does something with a coloured thing at a place, the unit of translation: the first three decide."""
    person, colour, thing = draw_triple(rng, pool.people + known.RELATIVES, pool.things, held_out)
    words = {"person": person, "verb": rng.choice(known.VERBS), "colour": colour, "thing": thing}
    words |= {"place": rng.choice(known.PLACES), "measure": Word("", thing.measure)}
    words["A_kind"] = Word(with_article(thing.kind.en).capitalize(), thing.kind.zh)
    return Text(WORLD["texts"]["clause"], words)


class Plot(NamedTuple):
    """A way to tell a story, and who ("hero" or "relative") owns the thing and who feels how at its end."""

    telling: tuple[str, str]
    owner: str
    feeler: str
    feeling: Word


PLOTS = tuple(Plot(**plot) for plot in WORLD["plots"])


@dataclass(frozen=True)
class Story:
    """A hero sees a thing somewhere, and a relative comes in."""

    plot: Plot
    hero: Word
    relative: Word
    colour: Word
    thing: Thing
    place: Word

    @classmethod
    def draw(cls, rng: random.Random, pool: Pool, held_out: bool) -> Self:
        """Return a random story; the (hero, colour, thing) decides whether it is held out."""
        hero, colour, thing = draw_triple(rng, pool.people, pool.things, held_out)
        return cls(rng.choice(PLOTS), hero, rng.choice(known.RELATIVES), colour, thing, rng.choice(known.PLACES))

    @property
    def text(self) -> Text:
        """The story as it is told."""
        words = {slot: word for slot, word in vars(self).items() if slot != "plot"}
        end = {"owner": words[self.plot.owner], "feeler": words[self.plot.feeler], "feeling": self.plot.feeling}
        return Text(self.plot.telling, words | end | {"measure": Word("", self.thing.measure)})


def story(rng: random.Random, pool: Pool, held_out: bool) -> Text:
    """The text of a random `Story`."""
    return Story.draw(rng, pool, held_out).text


_SLOT_WORDS = {
    "hero": known.PEOPLE,
    "relative": known.RELATIVES,
    "colour": known.COLOURS,
    "thing": known.THINGS,
    "place": known.PLACES,
}


def parse(text: str, language: int) -> Story | None:
    """Return the one `Story` that is told by exactly this text, or None where the grammar cannot tell it."""
    for plot in PLOTS:
        if match := _pattern(plot.telling[language], language).fullmatch(text):
            story = Story(plot, **{slot: _lookup(slot, language)[match[slot]] for slot in _SLOT_WORDS})
            # The pattern does not know which measure word goes with which thing.
            return story if story.text.say(language) == text else None
    return None


@cache
def _lookup(slot: str, language: int) -> dict[str, Word | Thing]:
    return {word[language]: word for word in _SLOT_WORDS[slot]}


@cache
def _pattern(template: str, language: int) -> re.Pattern[str]:
    """Turn a template into a pattern: a slot's first use is a group, later ones must repeat what it matched."""
    pattern, met = "", set()
    for literal, slot, _, _ in string.Formatter().parse(template):
        pattern += re.escape(literal)
        if slot is None:
            continue
        words = [thing.measure for thing in known.THINGS] if slot == "measure" else _lookup(slot, language)
        pattern += f"(?P={slot})" if slot in met else f"(?P<{slot}>{'|'.join(map(re.escape, words))})"
        met.add(slot)
    return re.compile(pattern)


def review(rng: random.Random, pool: Pool, held_out: bool) -> Text:
    """Two remarks of one mind, of which at most one says it by negation: the aspects and adjectives decide."""
    while True:
        positive, negated = rng.random() < 0.5, rng.choice((None, None, 0, 1))
        words, content = {}, []
        for index, (name, aspect) in enumerate(zip(("first", "second"), rng.sample(known.ASPECTS, 2), strict=True)):
            adjective = rng.choice(pool.praise if positive != (index == negated) else pool.blame)
            negation = Word("not ", "不") if index == negated else Word("", "")
            words |= {name: adjective, f"{name}_aspect": aspect, f"{name}_not": negation}
            content += [aspect.en, adjective.en]
        if is_held_out(*content) == held_out:
            break
    words["mood"] = Word("positive", "正面") if positive else Word("negative", "负面")
    words["verdict"] = Word("loved", "喜欢") if positive else Word("hated", "讨厌")
    return Text(WORLD["texts"]["review"], words)


def films(rng: random.Random, pool: Pool, held_out: bool) -> Text:
    """What a person watched, two to four consecutive films of one series: the person and the first film decide."""
    while True:
        person, series = rng.choice(pool.people + known.RELATIVES), rng.choice(pool.series)
        start = rng.randrange(len(series))
        if is_held_out(person.en, series[start]) == held_out:
            break
    titles = [series[(start + i) % len(series)] for i in range(rng.randint(2, 4) + 1)]
    *watched, following = (Word(title, title) for title in titles)
    return Text(WORLD["texts"]["films"], {"person": person, "watched": _listing(watched), "next": following})


def basket(rng: random.Random, pool: Pool, held_out: bool) -> Text:
    """What a person bought, two things of one kind, and three on offer of which one, `wanted`, is of that kind: the
    person and the two things decide.
    """
    # A pool may have one thing of a kind only, to be offered; things that every pool knows can have been bought.
    familiar = dict.fromkeys(known.SEEN.things + pool.things)
    while True:
        person, wanted = rng.choice(pool.people + known.RELATIVES), rng.choice(pool.things)
        bought = rng.sample([t for t in familiar if t.kind == wanted.kind and t != wanted], 2)
        if is_held_out(person.en, *(thing.en for thing in bought)) == held_out:
            break
    kinds = rng.sample([kind for kind in known.KINDS if kind != wanted.kind], 2)
    offered = [wanted, *(rng.choice([t for t in pool.things if t.kind == kind]) for kind in kinds)]
    rng.shuffle(offered)
    offer = Word(*(mark.join(t[language] for t in offered) for language, mark in ((EN, ", "), (ZH, "、"))))
    listing = _listing([Word(with_article(thing.en), thing.zh) for thing in bought])
    return Text(WORLD["texts"]["basket"], {"person": person, "bought": listing, "offer": offer, "wanted": wanted})


def fact_words(thing: Thing) -> dict[str, str]:
    """Return the slots of sentences about one thing, which mix the languages."""
    a_thing = with_article(thing.en)
    return {
        "a_thing": a_thing, "A_thing": a_thing.capitalize(), "a_kind": with_article(thing.kind.en), "zh": thing.zh,
        "kind_zh": thing.kind.zh,
    }  # fmt: skip


def _listing(words: list[Word]) -> Word:
    """Join as "x, y and z" and "x、y、z"."""
    *others, last = (word.en for word in words)
    return Word(f"{', '.join(others)} and {last}", "、".join(word.zh for word in words))
