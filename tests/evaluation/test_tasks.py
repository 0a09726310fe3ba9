"""Held-out exercises: disjoint from instruction data by construction, and judged exactly."""

import random

import pytest

from jaxllm.data import world, world_tasks
from jaxllm.data.world_words import EN, LATE_WORDS, NOVEL_PEOPLE, SEEN, SERIES, ZH
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
    sides = [{task.draw(rng, SEEN, held_out).prompt for _ in range(3000)} for held_out in (False, True)]
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


def test_the_answer_of_every_conversation_passes_its_own_check():
    application = {task.name: task.application for task in world_tasks.TASKS}
    for conversation in world.conversations(500, seed=0):
        task = conversation.location.split(", ")[-1]
        prompt, answer = (message.content for message in conversation.messages[:2])
        assert tasks.is_correct(tasks.Example(application[task], task, "new_combinations", prompt, answer), answer)


ENGLISH = "Anna saw a red ball in the park. Anna gave the ball to Mum. Mum was happy."
KEPT = "Anna saw a red ball in the park. Anna took the ball home and showed it to Mum. Anna was happy."
LOST = "Anna saw a red ball in the park. Anna lost the ball and Mum found it. Anna was sad."
CHINESE = "安娜在公园里看见一个红色的皮球。安娜丢了皮球，妈妈找到它。安娜很难过。"


@pytest.mark.parametrize(
    ("told", "right"),
    [
        (ENGLISH, True),
        (KEPT, True),
        (LOST, True),
        (ENGLISH.replace("Mum", "Uncle"), False),
        (ENGLISH.replace("red", "blue"), False),
        (ENGLISH.replace("ball", "kite"), False),
        (ENGLISH.replace("Anna", "Mary"), False),
        (ENGLISH.replace("park", "school"), False),
        (ENGLISH.replace("Mum", "Tom"), False),
        (ENGLISH.replace("Mum was", "Dad was"), False),
        (ENGLISH.replace("the ball to", "the kite to"), False),
        (ENGLISH.replace("Mum was", "Anna was"), False),
        (KEPT.replace("Anna was", "Mum was"), False),
        (LOST.replace("sad", "happy"), False),
        (LOST.replace("park", "castle"), False),
        (ENGLISH + " Mum was happy.", False),
        (ENGLISH.removesuffix(" Mum was happy."), False),
        (ENGLISH.replace(". ", "."), False),
        ("", False),
    ],
)
def test_english_stories_are_judged_by_the_grammar(told, right):
    prompt = "Write a story about Anna, Mum and a red ball in the park."
    example = tasks.Example("generation", "story_en", "new_combinations", prompt, ENGLISH)
    assert tasks.is_correct(example, told) is right


@pytest.mark.parametrize(
    ("told", "right"),
    [
        (CHINESE, True),
        (CHINESE.replace("妈妈", "叔叔"), False),
        (CHINESE.replace("一个", "一只"), False),
        (CHINESE.replace("红色", "蓝色"), False),
        (CHINESE.replace("难过", "高兴"), False),
        (CHINESE.replace("安娜丢了", "妈妈丢了"), False),
        (ENGLISH, False),
    ],
)
def test_chinese_stories_are_judged_by_the_grammar(told, right):
    example = tasks.Example(
        "generation", "story_zh", "new_combinations", "写一个关于安娜、妈妈和公园里红色的皮球的故事。", CHINESE
    )
    assert tasks.is_correct(example, told) is right


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


def test_languages_differ_by_script():
    """`is_correct` tells a story's language by whether its answer is ASCII."""
    for example in tasks.held_out("generation", "new_combinations", count=100, seed=0):
        assert example.answer.isascii() == (example.task == "story_en")
    assert (EN, ZH) == (0, 1)
