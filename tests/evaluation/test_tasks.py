"""Held-out exercises: disjoint from instruction data by construction, and judged exactly."""

import random
import re

import pytest

from jaxllm.data.world import tasks as world_tasks
from jaxllm.data.world import texts as world_texts
from jaxllm.data.world import world
from jaxllm.data.world.words import EN, LATE_WORDS, NOVEL_PEOPLE, SEEN, SERIES, ZH, Word
from jaxllm.evaluation import tasks

SPLITS = [(application, "new_combinations") for application in tasks.APPLICATIONS]
SPLITS += [(application, "pretrain_only") for application in tasks.APPLICATIONS] + [("qa", "novel")]


@pytest.fixture(scope="module")
def trained_on():
    conversations = world.conversations(12000, seed=0)
    return {conversation.messages[0].content for conversation in conversations}


def test_the_five_applications():
    assert tasks.APPLICATIONS == ("generation", "translation", "qa", "classification", "recommendation")


@pytest.mark.parametrize(("application", "split"), SPLITS)
def test_400_distinct_unseen_prompts_whose_answers_pass(application, split, trained_on):
    examples = tasks.held_out(application, split, count=400, seed=0)
    assert len({example.prompt for example in examples}) == 400
    assert not trained_on & {example.prompt for example in examples}
    assert all(tasks.is_correct(example, f" {example.answer}\n") for example in examples)
    assert {example.application for example in examples} == {application}
    assert examples == tasks.held_out(application, split, count=400, seed=0)
    assert examples != tasks.held_out(application, split, count=400, seed=1)


@pytest.mark.parametrize(
    "task", [task for task in world_tasks.TASKS if not task.closed_book], ids=lambda task: task.name
)
def test_no_held_out_prompt_can_be_drawn_for_training(task):
    """The law behind the disjointness: the two sides of `is_held_out` share no prompt, whatever the number drawn."""
    rng = random.Random(task.name)
    sides = [{task.draw(rng, SEEN, held_out).prompt for _ in range(1000)} for held_out in (False, True)]
    assert not sides[0] & sides[1]


def test_held_out_clauses_and_stories_are_in_no_document():
    text = "\n".join(document.text for document in world.documents(8000, seed=0))
    for application in ("translation", "generation"):
        for example in tasks.held_out(application, "pretrain_only", count=200, seed=0):
            assert example.answer not in text


def test_prompts_hold_the_words_of_their_split():
    late = [form for word in LATE_WORDS for form in word] + list(SERIES[3])
    for application in tasks.APPLICATIONS:
        for example in tasks.held_out(application, "pretrain_only", count=100, seed=0):
            assert any(form in example.prompt for form in late), example
        for example in tasks.held_out(application, "new_combinations", count=100, seed=0):
            assert not any(form in example.prompt for form in late), example
    for example in tasks.held_out("qa", "novel", count=100, seed=0):
        assert any(name.en in example.prompt for name in NOVEL_PEOPLE)


ANNA = {
    "hero": Word("Anna", "安娜"), "relative": Word("Mum", "妈妈"), "colour": Word("red", "红色"),
    "thing": Word("ball", "皮球"), "measure": Word("", "个"), "place": Word("park", "公园"),
}  # fmt: skip
ENGLISH = (
    "Anna saw a red ball in the park. Anna gave the ball to Mum. Mum was happy.",
    "Anna saw a red ball in the park. Anna took the ball home and showed it to Mum. Anna was happy.",
    "Anna saw a red ball in the park. Anna lost the ball and Mum found it. Anna was sad.",
)
CHINESE = (
    "安娜在公园里看见一个红色的皮球。安娜把皮球给了妈妈。妈妈很高兴。",
    "安娜在公园里看见一个红色的皮球。安娜把皮球带回家给妈妈看。安娜很高兴。",
    "安娜在公园里看见一个红色的皮球。安娜丢了皮球，妈妈找到它。安娜很难过。",
)


@pytest.mark.parametrize(("language", "right"), [(EN, ENGLISH), (ZH, CHINESE)])
def test_a_story_is_right_if_any_plot_tells_it_of_the_words_asked_for(language, right):
    assert world_texts.tellings(world_texts.Text(("", ""), ANNA), language) == right
    story = tasks.Example("generation", "story", "new_combinations", "Write a story about ...", right[0], right)
    assert all(tasks.is_correct(story, f" {told}\n") for told in right)
    wrong = (right[0].replace("Mum", "Uncle").replace("妈妈", "叔叔"), right[0] + " ...", *(ENGLISH + CHINESE), "")
    assert not any(tasks.is_correct(story, told) for told in wrong if told not in right)


def test_the_right_stories_of_an_example_begin_alike_and_its_answer_is_one_of_them():
    for example in tasks.held_out("generation", "pretrain_only", count=60, seed=1):
        assert len(set(example.right)) == 3 and example.answer in example.right
        assert len({re.split("[.。]", story)[0] for story in example.right}) == 1


def test_mutated_stories_fail():
    rng = random.Random(0)
    for example in tasks.held_out("generation", "new_combinations", count=60, seed=1):
        separator = " " if example.answer.isascii() else ""
        pieces = example.answer.split() if separator else list(example.answer)
        index = rng.randrange(len(pieces))
        assert not tasks.is_correct(example, separator.join(pieces[:index] + pieces[index + 1 :])), "a lost word"
        assert not tasks.is_correct(example, separator.join([*pieces[:index], pieces[index], *pieces[index:]])), "twice"


def test_exact_answers_are_compared_exactly():
    example = tasks.Example("classification", "topic_en", "new_combinations", "Topic of this text: ...", "A toy.")
    assert tasks.is_correct(example, " A toy.\n")
    assert not tasks.is_correct(example, "a toy.") and not tasks.is_correct(example, "A toy")


def test_errors_say_what_to_do(monkeypatch):
    with pytest.raises(ValueError, match=r"application='poetry' is unknown; use one of generation, translation"):
        tasks.held_out("poetry", "new_combinations", count=1, seed=0)
    with pytest.raises(ValueError, match=r"split='novel' does not exist for translation; use new_combinations"):
        tasks.held_out("translation", "novel", count=1, seed=0)
    monkeypatch.setattr(tasks, "_TRIES_FOR_A_NEW_PROMPT", 0)  # the first repetition counts as the end
    with pytest.raises(ValueError, match=r"count=4000 is too many: generation, pretrain_only has \d+ distinct prompts"):
        tasks.held_out("generation", "pretrain_only", count=4000, seed=0)
