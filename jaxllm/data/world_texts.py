"""The other texts of the micro-world: clauses, reviews and logs, each able to say itself in English and Chinese."""

import random
from dataclasses import dataclass

from jaxllm.data.world_words import (
    ASPECTS,
    EN,
    KINDS,
    PLACES,
    RELATIVES,
    SEEN,
    VERBS,
    ZH,
    Pool,
    Series,
    Thing,
    Word,
    draw_triple,
    is_held_out,
    listing,
    with_article,
)


@dataclass(frozen=True, slots=True)
class Clause:
    """Somebody does something with a coloured thing at a place: the unit of translation."""

    person: Word
    verb: Word
    colour: Word
    thing: Thing
    place: Word

    @classmethod
    def draw(cls, rng: random.Random, pool: Pool, held_out: bool) -> "Clause":
        """Return a random clause whose (person, colour, thing) is held out or, for everything trained on, is not."""
        person, colour, thing = draw_triple(rng, pool.people + RELATIVES, pool.things, held_out)
        return cls(person, rng.choice(VERBS), colour, thing, rng.choice(PLACES))

    def say(self, language: int) -> str:
        """Return the sentence."""
        person, verb, colour, place = (w[language] for w in (self.person, self.verb, self.colour, self.place))
        if language == ZH:
            return f"{person}在{place}里{verb}一{self.thing.measure}{colour}的{self.thing.zh}。"
        return f"{person} {verb} a {colour} {self.thing.en} in the {place}."


@dataclass(frozen=True, slots=True)
class Remark:
    """One half of a review: the food was (not) good."""

    aspect: Word
    word: Word
    negated: bool

    def say(self, language: int) -> str:
        """Return the remark without a capital or a full stop."""
        if language == ZH:
            return self.aspect.zh + ("不" if self.negated else "") + self.word.zh
        return f"the {self.aspect.en} was {'not ' if self.negated else ''}{self.word.en}"


@dataclass(frozen=True, slots=True)
class Review:
    """Two remarks of one mind, of which at most one says it by negation."""

    positive: bool
    first: Remark
    second: Remark

    @classmethod
    def draw(cls, rng: random.Random, pool: Pool, held_out: bool) -> "Review":
        """Return a random review; its two aspects and two adjectives decide whether it is held out."""
        while True:
            positive, negated = rng.random() < 0.5, rng.choice((None, None, 0, 1))
            remarks = []
            for index, aspect in enumerate(rng.sample(ASPECTS, 2)):
                words = pool.praise if positive != (index == negated) else pool.blame
                remarks.append(Remark(aspect, rng.choice(words), index == negated))
            if is_held_out(*(word.en for remark in remarks for word in (remark.aspect, remark.word))) == held_out:
                return cls(positive, *remarks)

    def say(self, language: int) -> str:
        """Return the review as one sentence."""
        first, second = self.first.say(language), self.second.say(language)
        return f"{first}，{second}。" if language == ZH else f"{first.capitalize()} and {second}."


@dataclass(frozen=True, slots=True)
class FilmLog:
    """What a person watched: consecutive films of one series."""

    person: Word
    series: Series
    start: int
    length: int

    @classmethod
    def draw(cls, rng: random.Random, pool: Pool, held_out: bool) -> "FilmLog":
        """Return a random log of 2 to 4 films; the person and the first film decide whether it is held out."""
        while True:
            person, series = rng.choice(pool.people + RELATIVES), rng.choice(pool.series)
            start = rng.randrange(len(series.titles))
            if is_held_out(person.en, series.titles[start]) == held_out:
                return cls(person, series, start, rng.randint(2, 4))

    def title(self, index: int) -> str:
        """Return the film watched at `index` from 0; index `length` is the one to recommend."""
        return self.series.titles[(self.start + index) % len(self.series.titles)]

    def say(self, language: int) -> str:
        """Return "Anna watched x, y and z."."""
        watched = listing([self.title(i) for i in range(self.length)], language)
        return f"{self.person.zh}看了 {watched} 。" if language == ZH else f"{self.person.en} watched {watched}."


@dataclass(frozen=True, slots=True)
class Basket:
    """What a person bought: two things of one kind, and three on offer of which one is of that kind."""

    person: Word
    bought: tuple[Thing, Thing]
    offered: tuple[Thing, ...]

    @classmethod
    def draw(cls, rng: random.Random, pool: Pool, held_out: bool) -> "Basket":
        """Return a random basket; the person and the two things bought decide whether it is held out."""
        # A pool may have one thing of a kind only, to be offered; things that every pool knows can have been bought.
        familiar = dict.fromkeys(SEEN.things + pool.things)
        while True:
            person, wanted = rng.choice(pool.people + RELATIVES), rng.choice(pool.things)
            bought = rng.sample([t for t in familiar if t.kind == wanted.kind and t != wanted], 2)
            if is_held_out(person.en, *(thing.en for thing in bought)) == held_out:
                break
        kinds = rng.sample([kind for kind in KINDS if kind != wanted.kind], 2)
        offered = [wanted, *(rng.choice([t for t in pool.things if t.kind == kind]) for kind in kinds)]
        rng.shuffle(offered)
        return cls(person, tuple(bought), tuple(offered))

    @property
    def wanted(self) -> Thing:
        """The offered thing that is of the kind bought."""
        return next(thing for thing in self.offered if thing.kind == self.bought[0].kind)

    def say(self, language: int) -> str:
        """Return "Anna bought a pear and a lemon."."""
        if language == ZH:
            return f"{self.person.zh}买了{listing([thing.zh for thing in self.bought], ZH)}。"
        return f"{self.person.en} bought {listing([with_article(thing.en) for thing in self.bought], EN)}."

    def offer(self, language: int) -> str:
        """Return the offered things as a list."""
        return ("、" if language == ZH else ", ").join(thing[language] for thing in self.offered)
