"""The words of the micro-world, in English and Chinese, and which of them and of their combinations are held out.

Two rules make exact evaluation possible by construction, for any amount of data:

* `is_held_out(words)` decides by a checksum of the content, not by chance, so a fifth of all (person, colour, thing)
  triples, reviews, film logs and baskets is written into no document and no conversation, ever.
* `LATE_WORDS` occur in documents but in no conversation, `NOVEL_PEOPLE` in neither.
"""

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import NamedTuple

import yaml

EN, ZH = 0, 1  # index of a language in every bilingual tuple
HELD_OUT_ONE_IN = 5  # contents
WORLD = yaml.safe_load(resources.files(__package__).joinpath("world.yaml").read_text("utf-8"))


class Word(NamedTuple):
    """One meaning, `word[EN]` and `word[ZH]`."""

    en: str
    zh: str


class Thing(NamedTuple):
    """A noun with its Chinese measure word (一`个`苹果) and its kind, such as fruit."""

    en: str
    zh: str
    measure: str
    kind: Word


@dataclass(frozen=True, slots=True)
class Pool:
    """The words a text may be made of (colours, verbs, places and aspects are always all of them).

    Attributes:
      series: titles of films that are watched in this order.
    """

    people: tuple[Word, ...]
    things: tuple[Thing, ...]
    praise: tuple[Word, ...]
    blame: tuple[Word, ...]
    series: tuple[tuple[str, ...], ...]


KINDS, PEOPLE, NOVEL_PEOPLE, RELATIVES, COLOURS, VERBS, PLACES, ASPECTS, PRAISE, BLAME = (
    tuple(Word(*entry.split(":")) for entry in text.split()) for text in WORLD["words"].values()
)
THINGS = tuple(
    Thing(*entry.split(":"), kind) for kind, text in zip(KINDS, WORLD["things"], strict=True) for entry in text.split()
)
SERIES = tuple(map(tuple, WORLD["series"].values()))

_LATE_THINGS = THINGS[4::5]
EVERY = Pool(PEOPLE, THINGS, PRAISE, BLAME, SERIES)
SEEN = Pool(PEOPLE[:12], tuple(t for t in THINGS if t not in _LATE_THINGS), PRAISE[:6], BLAME[:6], SERIES[:3])
# With late people only there would be too few contents; a late thing, adjective or series is what makes a prompt late.
LATE = Pool(PEOPLE, _LATE_THINGS, PRAISE[6:], BLAME[6:], SERIES[3:])
NOVEL = Pool(NOVEL_PEOPLE, SEEN.things, SEEN.praise, SEEN.blame, SEEN.series)
LATE_WORDS = (*PEOPLE[12:], *(Word(t.en, t.zh) for t in _LATE_THINGS), *PRAISE[6:], *BLAME[6:])


def is_held_out(*words: str) -> bool:
    """Say whether content made of these English words is reserved for evaluation: the same answer on every machine."""
    return zlib.crc32("|".join(words).encode("utf-8")) % HELD_OUT_ONE_IN == 0


def draw_triple(
    rng: random.Random, people: Sequence[Word], things: Sequence[Thing], held_out: bool
) -> tuple[Word, Word, Thing]:
    """Return a random (person, colour, thing) that is held out or, for everything trained on, is not."""
    while True:
        person, colour, thing = rng.choice(people), rng.choice(COLOURS), rng.choice(things)
        if is_held_out(person.en, colour.en, thing.en) == held_out:
            return person, colour, thing


def with_article(noun: str) -> str:
    """Return "a ball", "an animal"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun
