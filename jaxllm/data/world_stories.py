"""Stories of the micro-world: told from templates and read back by the same templates, so they cannot differ."""

import random
import re
import string
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from jaxllm.data.world_words import COLOURS, EN, PEOPLE, PLACES, RELATIVES, THINGS, ZH, Pool, Thing, Word, draw_triple


class Plot(NamedTuple):
    """A story told by filling slots, and who owns the thing and who feels how at its end."""

    telling: tuple[str, str]
    relative_owns: bool
    relative_feels: bool
    feeling: Word


_HAPPY, _SAD = Word("happy", "高兴"), Word("sad", "难过")
# The opening is a `Clause` with the verb "saw", so that stories and translations teach the same words together.
_OPENING = (
    "{hero} saw a {colour} {thing} in the {place}. ",
    "{hero}在{place}里看见一{measure}{colour}的{thing}。",
)
PLOTS = (
    Plot(
        (
            _OPENING[EN] + "{hero} gave the {thing} to {relative}. {relative} was happy.",
            _OPENING[ZH] + "{hero}把{thing}给了{relative}。{relative}很高兴。",
        ),
        relative_owns=True,
        relative_feels=True,
        feeling=_HAPPY,
    ),
    Plot(
        (
            _OPENING[EN] + "{hero} took the {thing} home and showed it to {relative}. {hero} was happy.",
            _OPENING[ZH] + "{hero}把{thing}带回家给{relative}看。{hero}很高兴。",
        ),
        relative_owns=False,
        relative_feels=False,
        feeling=_HAPPY,
    ),
    Plot(
        (
            _OPENING[EN] + "{hero} lost the {thing} and {relative} found it. {hero} was sad.",
            _OPENING[ZH] + "{hero}丢了{thing}，{relative}找到它。{hero}很难过。",
        ),
        relative_owns=True,
        relative_feels=False,
        feeling=_SAD,
    ),
)
_QUESTIONS = (
    (
        ("What did {hero} see?", "A {colour} {thing}."),
        ("What colour is the {thing}?", "It is {colour}."),
        ("Where was the {thing}?", "It was in the {place}."),
        ("Who has the {thing} now?", "It is {owner}."),
        ("Who was {feeling}?", "It was {feeler}."),
    ),
    (
        ("{hero}看见了什么？", "一{measure}{colour}的{thing}。"),
        ("{thing}是什么颜色？", "是{colour}。"),
        ("{thing}在哪里？", "在{place}里。"),
        ("{thing}现在在谁那里？", "在{owner}那里。"),
        ("谁很{feeling}？", "是{feeler}。"),
    ),
)


@dataclass(frozen=True, slots=True)
class Story:
    """A hero sees a thing somewhere, and a relative comes in."""

    plot: Plot
    hero: Word
    relative: Word
    colour: Word
    thing: Thing
    place: Word

    @classmethod
    def draw(cls, rng: random.Random, pool: Pool, held_out: bool) -> "Story":
        """Return a random story; the (hero, colour, thing) decides, as in `Clause.draw`."""
        hero, colour, thing = draw_triple(rng, pool.people, pool.things, held_out)
        return cls(rng.choice(PLOTS), hero, rng.choice(RELATIVES), colour, thing, rng.choice(PLACES))

    def _slots(self, language: int) -> dict[str, str]:
        words = {
            "hero": self.hero,
            "relative": self.relative,
            "colour": self.colour,
            "thing": self.thing,
            "place": self.place,
            "owner": self.relative if self.plot.relative_owns else self.hero,
            "feeler": self.relative if self.plot.relative_feels else self.hero,
            "feeling": self.plot.feeling,
        }
        return {"measure": self.thing.measure} | {slot: word[language] for slot, word in words.items()}

    def say(self, language: int) -> str:
        """Return the text of the story."""
        return self.fill(self.plot.telling[language], language)

    def fill(self, template: str, language: int) -> str:
        """Return the template with this story's words in its slots."""
        return template.format(**self._slots(language))

    def questions(self, language: int) -> list[tuple[str, str]]:
        """Return every (question, answer) about the story; each answer is one that the text determines."""
        return [(self.fill(q, language), self.fill(a, language)) for q, a in _QUESTIONS[language]]


_SLOT_WORDS = {
    "hero": PEOPLE,
    "relative": RELATIVES,
    "colour": COLOURS,
    "thing": THINGS,
    "place": PLACES,
}


def parse(text: str, language: int) -> Story | None:
    """Return the one `Story` that is told by exactly this text, or None where the grammar cannot tell it."""
    for plot in PLOTS:
        match = _pattern(plot.telling[language]).fullmatch(text)
        if match is None:
            continue
        words = {slot: _lookup(slot, language)[match[slot]] for slot in _SLOT_WORDS}
        story = Story(plot, **words)
        # The pattern does not know which measure word goes with which thing.
        return story if story.say(language) == text else None
    return None


@cache
def _lookup(slot: str, language: int) -> dict[str, Word | Thing]:
    return {word[language]: word for word in _SLOT_WORDS[slot]}


@cache
def _pattern(template: str) -> re.Pattern[str]:
    """Turn a template into a pattern: a slot's first use is a group, later ones must repeat what it matched."""
    pattern, met = "", set()
    language = EN if template.isascii() else ZH
    for literal, slot, _, _ in string.Formatter().parse(template):
        pattern += re.escape(literal)
        if slot is None:
            continue
        words = [t.measure for t in THINGS] if slot == "measure" else _lookup(slot, language)
        pattern += f"(?P={slot})" if slot in met else f"(?P<{slot}>{'|'.join(map(re.escape, words))})"
        met.add(slot)
    return re.compile(pattern)
