"""The texts of the micro-world: each draws its content and says it in English and Chinese.

A text is told from a template and a story is read back by the same template, so they cannot differ.
"""

import random
import re
import string
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Self

from jaxllm.data import world_words as known
from jaxllm.data.world_words import EN, WORLD, ZH, Pool, Series, Thing, Word, draw_triple, is_held_out, with_article


class Text:
    """Content that can be said in two languages: `draw` makes it, so that it is held out or, for everything trained on,
    is not; the `template` of a language says it, whose slots are the `words`.
    """

    def say(self, language: int) -> str:
        """Return the text."""
        return self.template[language].format(**self._slots(language))

    def fill(self, template: str, language: int, **more: str) -> str:
        """Return `template` with the words of this text; {text} is the text itself, {translation} the other one."""
        texts = {"text": self.say(language), "translation": self.say(1 - language)}
        return template.format(**self._slots(language), **texts, **more)

    def _slots(self, language: int) -> dict[str, str]:
        return {slot: word[language] for slot, word in self.words().items()}


@dataclass(frozen=True)
class Clause(Text):
    """Somebody does something with a coloured thing at a place: the unit of translation."""

    person: Word
    verb: Word
    colour: Word
    thing: Thing
    place: Word
    template = WORLD["texts"]["clause"]

    @classmethod
    def draw(cls, rng: random.Random, pool: Pool, held_out: bool) -> Self:
        """Return a random clause; the (person, colour, thing) decides whether it is held out."""
        person, colour, thing = draw_triple(rng, pool.people + known.RELATIVES, pool.things, held_out)
        return cls(person, rng.choice(known.VERBS), colour, thing, rng.choice(known.PLACES))

    def words(self) -> dict[str, Word | Thing]:
        kind = Word(with_article(self.thing.kind.en).capitalize(), self.thing.kind.zh)
        return vars(self) | {"measure": Word("", self.thing.measure), "A_kind": kind}


class Plot(NamedTuple):
    """A way to tell a story, and who ("hero" or "relative") owns the thing and who feels how at its end."""

    telling: tuple[str, str]
    owner: str
    feeler: str
    feeling: Word


PLOTS = tuple(Plot(**plot) for plot in WORLD["plots"])


@dataclass(frozen=True)
class Story(Text):
    """A hero sees a thing somewhere, and a relative comes in."""

    plot: Plot
    hero: Word
    relative: Word
    colour: Word
    thing: Thing
    place: Word

    @classmethod
    def draw(cls, rng: random.Random, pool: Pool, held_out: bool) -> Self:
        """Return a random story; the (hero, colour, thing) decides, as in `Clause.draw`."""
        hero, colour, thing = draw_triple(rng, pool.people, pool.things, held_out)
        return cls(rng.choice(PLOTS), hero, rng.choice(known.RELATIVES), colour, thing, rng.choice(known.PLACES))

    @property
    def template(self) -> tuple[str, str]:
        return self.plot.telling

    def words(self) -> dict[str, Word | Thing]:
        words = {slot: word for slot, word in vars(self).items() if slot != "plot"}
        end = {"owner": words[self.plot.owner], "feeler": words[self.plot.feeler], "feeling": self.plot.feeling}
        return words | end | {"measure": Word("", self.thing.measure)}

    def questions(self, language: int) -> list[tuple[str, str]]:
        """Return every (question, answer) about the story; each answer is one that the text determines."""
        return [(self.fill(q, language), self.fill(a, language)) for q, a in WORLD["questions"][language]]


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
            return story if story.say(language) == text else None
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


@dataclass(frozen=True)
class Review(Text):
    """Two remarks of one mind, (aspect, word, negated), of which at most one says it by negation."""

    positive: bool
    remarks: tuple[tuple[Word, Word, bool], ...]
    template = WORLD["texts"]["review"]

    @classmethod
    def draw(cls, rng: random.Random, pool: Pool, held_out: bool) -> Self:
        """Return a random review; its two aspects and two adjectives decide whether it is held out."""
        while True:
            positive, negated = rng.random() < 0.5, rng.choice((None, None, 0, 1))
            remarks = []
            for index, aspect in enumerate(rng.sample(known.ASPECTS, 2)):
                words = pool.praise if positive != (index == negated) else pool.blame
                remarks.append((aspect, rng.choice(words), index == negated))
            if is_held_out(*(word.en for aspect, adjective, _ in remarks for word in (aspect, adjective))) == held_out:
                return cls(positive, tuple(remarks))

    def words(self) -> dict[str, Word | Thing]:
        words = {
            "mood": Word("positive", "正面") if self.positive else Word("negative", "负面"),
            "verdict": Word("loved", "喜欢") if self.positive else Word("hated", "讨厌"),
        }
        for name, (aspect, adjective, negated) in zip(("first", "second"), self.remarks, strict=True):
            negation = Word("not ", "不") if negated else Word("", "")
            words |= {name: adjective, f"{name}_aspect": aspect, f"{name}_not": negation}
        return words


@dataclass(frozen=True)
class FilmLog(Text):
    """What a person watched: consecutive films of one series."""

    person: Word
    series: Series
    start: int
    length: int
    template = WORLD["texts"]["films"]

    @classmethod
    def draw(cls, rng: random.Random, pool: Pool, held_out: bool) -> Self:
        """Return a random log of 2 to 4 films; the person and the first film decide whether it is held out."""
        while True:
            person, series = rng.choice(pool.people + known.RELATIVES), rng.choice(pool.series)
            start = rng.randrange(len(series.titles))
            if is_held_out(person.en, series.titles[start]) == held_out:
                return cls(person, series, start, rng.randint(2, 4))

    def words(self) -> dict[str, Word | Thing]:
        titles = [self.series.titles[(self.start + i) % len(self.series.titles)] for i in range(self.length + 1)]
        *watched, following = (Word(title, title) for title in titles)
        return {"person": self.person, "watched": _listing(watched), "next": following}


@dataclass(frozen=True)
class Basket(Text):
    """What a person bought: two things of one kind, and three on offer of which one, `wanted`, is of that kind."""

    person: Word
    bought: tuple[Thing, ...]
    offered: tuple[Thing, ...]
    wanted: Thing
    template = WORLD["texts"]["basket"]

    @classmethod
    def draw(cls, rng: random.Random, pool: Pool, held_out: bool) -> Self:
        """Return a random basket; the person and the two things bought decide whether it is held out."""
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
        return cls(person, tuple(bought), tuple(offered), wanted)

    def words(self) -> dict[str, Word | Thing]:
        bought = _listing([Word(with_article(thing.en), thing.zh) for thing in self.bought])
        offer = Word(*(mark.join(t[language] for t in self.offered) for language, mark in ((EN, ", "), (ZH, "、"))))
        return {"person": self.person, "bought": bought, "offer": offer, "wanted": self.wanted}


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
