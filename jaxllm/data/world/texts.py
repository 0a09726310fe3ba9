"""The texts of the micro-world: each draws its content and says it in English and Chinese.

`clause`, `story`, `review`, `films` and `basket` draw a text of a pool's words, so that it is held out or, for what is
trained on, is not.
"""

import random
from collections.abc import Mapping
from typing import NamedTuple

from jaxllm.data.world import words as known
from jaxllm.data.world.words import EN, WORLD, ZH, Pool, Thing, Word, draw_triple, is_held_out, with_article


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


def story(rng: random.Random, pool: Pool, held_out: bool) -> Text:
    """A hero sees a coloured thing at a place, and a relative comes in: the first three decide.

    A plot is a way to tell it, and says who ("hero" or "relative") owns the thing and who feels how at its end.
    """
    hero, colour, thing = draw_triple(rng, pool.people, pool.things, held_out)
    words = {"hero": hero, "colour": colour, "thing": thing, "measure": Word("", thing.measure)}
    plot = rng.choice(WORLD["plots"])
    words |= {"relative": rng.choice(known.RELATIVES), "place": rng.choice(known.PLACES)}
    end = {"owner": words[plot["owner"]], "feeler": words[plot["feeler"]], "feeling": Word(*plot["feeling"])}
    return Text(plot["telling"], words | end)


def tellings(words: Text, language: int) -> tuple[str, ...]:
    """Return all that can be told of the words of a story: one text for each plot."""
    return tuple(words._replace(template=plot["telling"]).say(language) for plot in WORLD["plots"])


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
