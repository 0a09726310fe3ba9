"""The micro-world's laws: same bytes everywhere, held-out contents and late words never where they must not be."""

import collections
import hashlib
import itertools
import random
import re
import time

import pytest

from jaxllm.data.world import world
from jaxllm.data.world.tasks import APPLICATIONS, EXAMPLES, GUIDE, TASKS
from jaxllm.data.world.words import (
    EN,
    EVERY,
    LATE,
    LATE_WORDS,
    NOVEL_PEOPLE,
    PEOPLE,
    RELATIVES,
    SEEN,
    SERIES,
    THINGS,
    ZH,
    draw_triple,
    is_held_out,
)


@pytest.fixture(scope="module")
def documents():
    return [document.text for document in world.documents(6000, seed=3)]


@pytest.fixture(scope="module")
def conversations():
    return list(world.conversations(6000, seed=3))


def _said(conversations):
    return [message.content for conversation in conversations for message in conversation.messages]


def test_the_bytes_are_a_function_of_the_seed():
    texts = [document.text for document in world.documents(1000, seed=0)]
    digest = hashlib.sha256("\0".join(texts).encode("utf-8")).hexdigest()[:16]
    assert digest == "7ca4d49fdaa41b2e", "the pretraining text changed; if that was meant, update the digest"
    digest = hashlib.sha256("\0".join(_said(world.conversations(1000, seed=0))).encode("utf-8")).hexdigest()[:16]
    assert digest == "4e5e0afd69f459f1", "the instruction data changed; if that was meant, update the digest"


def test_a_longer_collection_begins_with_the_shorter_one_and_seeds_differ():
    assert list(world.documents(50, seed=1)) == list(itertools.islice(world.documents(500, seed=1), 50))
    assert list(world.conversations(50, seed=1)) == list(itertools.islice(world.conversations(500, seed=1), 50))
    assert list(world.documents(50, seed=1)) != list(world.documents(50, seed=2))


def test_every_application_is_equally_frequent(conversations):
    application = {task.name: task.application for task in TASKS}
    names = [conversation.location.split(", ")[-1] for conversation in conversations]
    counts = collections.Counter(application[name] for name in names)
    assert set(counts) == set(APPLICATIONS) and set(counts.values()) == {6000 // 5}
    assert set(names) == set(application)


def test_conversations_alternate_user_and_assistant(conversations):
    lengths = collections.Counter(len(conversation.messages) for conversation in conversations)
    assert set(lengths) == {2, 4, 6, 8, 10, 12}  # reading has two follow-up questions, joined ones up to three more
    for conversation in conversations:
        roles = [message.role for message in conversation.messages]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message.content and message.content == message.content.strip() for message in conversation.messages)


def test_a_quarter_of_the_text_is_in_joined_conversations(conversations):
    """Without them a model that is asked a second question answers one in two wrong."""
    joined = size = 0
    for conversation in conversations:
        reading = "reading" in conversation.location
        n = sum(len(message.content.encode()) for message in conversation.messages)
        size, joined = size + n, joined + n * (len(conversation.messages) > (6 if reading else 2))
    assert 0.2 < joined / size < 0.3


def test_late_words_are_in_documents_and_in_no_conversation(documents, conversations):
    text, said = "\n".join(documents), "\n".join(_said(conversations))
    late = [form for word in LATE_WORDS for form in word] + [title for series in LATE.series for title in series]
    assert [form for form in late if form not in text] == []
    assert [form for form in late if form in said] == []


def test_seen_words_are_in_conversations(conversations):
    said = "\n".join(_said(conversations))
    assert [
        w for w in (*SEEN.people, *SEEN.things, *SEEN.praise, *SEEN.blame) if w.en not in said or w.zh not in said
    ] == []


def test_novel_names_are_nowhere(documents, conversations):
    text = "\n".join([*documents, *_said(conversations)]).lower()
    assert [name.en for name in NOVEL_PEOPLE if name.en.lower() in text] == []


def test_no_word_is_part_of_another():
    """Else the late words could not be searched for."""
    for language in (EN, ZH):
        words = [word[language] for word in (*PEOPLE, *RELATIVES, *THINGS)]
        assert [(a, b) for a, b in itertools.permutations(words, 2) if a in b] == []


def test_held_out_triples_are_a_fifth_and_in_no_clause_or_story():
    triples = list(itertools.product(PEOPLE, ["red", "blue", "green", "yellow", "black", "white"], THINGS))
    fraction = sum(is_held_out(person.en, colour, thing.en) for person, colour, thing in triples) / len(triples)
    assert fraction == pytest.approx(0.2, abs=0.02)
    rng = random.Random(0)
    for held_out in (False, True):
        for person, colour, thing in (draw_triple(rng, EVERY.people, EVERY.things, held_out) for _ in range(500)):
            assert is_held_out(person.en, colour.en, thing.en) is held_out


def test_no_document_or_conversation_names_a_held_out_triple(documents, conversations):
    colours = {"red", "blue", "green", "yellow", "black", "white"}
    things, people = {thing.en for thing in THINGS}, {person.en for person in PEOPLE}
    phrases = 0
    for text in (line for document in [*documents, *_said(conversations)] for line in document.split("\n")):
        words = text.replace(".", " ").replace("?", " ").replace(":", " ").split()
        for index in range(len(words) - 2):
            if words[index] == "a" and words[index + 1] in colours and words[index + 2] in things:
                named = [word for word in words[:index] if word in people]
                phrases += bool(named)
                assert not named or not is_held_out(named[-1], words[index + 1], words[index + 2]), text
    assert phrases > 3000


def test_series_go_round():
    assert len({title for series in SERIES for title in series}) == 24


def test_thirty_thousand_documents_take_seconds():
    start = time.process_time()
    collections.deque(world.documents(3000, seed=0), maxlen=0)
    assert time.process_time() - start < 1.0  # 0.1 s on a quiet machine: 30,000 documents in well under 3 s


def test_what_a_guide_shows_is_asked_as_in_training():
    asks = [ask for task in TASKS if not task.closed_book for ask in task.ask]
    patterns = [re.sub(r"\\\{\w+\\\}", ".+", re.escape(ask)) for ask in asks]
    assert all(any(re.fullmatch(pattern, example) for pattern in patterns) for example in EXAMPLES)
    assert not any(re.fullmatch(pattern, "Hello") for pattern in patterns)
    assert all(example in GUIDE for example in EXAMPLES)
