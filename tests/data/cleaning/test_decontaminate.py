import pickle

import pytest

from jaxllm.data.cleaning.clean import CleanConfig, Cleaner, rewrite
from jaxllm.data.cleaning.decontaminate import DecontaminateConfig, Evaluation
from jaxllm.data.documents import Conversation, Document, Message

EN = "Janet sells sixteen eggs a day at the farmers market and bakes muffins for all her friends"
ZH = "小明有十六个鸡蛋，每天早上吃三个，剩下的都拿到市场上去卖。"
CONFIG = DecontaminateConfig(action="cut")


def evaluation(config=CONFIG):
    return Evaluation(
        [("gsm8k", EN), ("cmrc", ZH), ("cmrc", EN), ("short", "what is the capital of france today")], config
    )


def test_overlaps_are_found_in_both_scripts_and_name_their_source():
    texts = [
        f"Some page.\nQ: {EN.upper()}?\nThe end.",
        "nothing to see here " * 10,
        f"他说：{ZH[:20]}……",
        EN[20:80],  # 12 words
        f"{ZH} {EN}",
        "what is the capital of france today",
        "",
    ]
    left = ["Some page.\nThe end.", texts[1], ("cmrc",), texts[3], ("gsm8k, cmrc",), *texts[5:]]
    assert [evaluation().leave(text) for text in texts] == left
    assert evaluation(DecontaminateConfig()).leave(texts[0]) == ("gsm8k",)  # to drop is the default


def test_short_texts_are_looked_for_as_a_whole_down_to_a_length():
    found = evaluation()
    assert found.n_texts == {"gsm8k": 1, "cmrc": 2} and found.n_short == {"short": 1}
    ten = Evaluation([("a", "one two three four five six seven eight nine ten")], CONFIG)
    assert ten.leave("zero One, two three four five six seven eight nine ten eleven") == ("a",)
    assert ten.leave("one two three four five six seven eight nine") == "one two three four five six seven eight nine"
    seven = evaluation(DecontaminateConfig(min_ngram=7))
    assert seven.leave("so what is the capital of France today") == ("short",)


def test_an_overlap_across_lines_takes_all_of_them():
    words = EN.split()
    text = "first\n" + "\n".join([" ".join(words[:5]), " ".join(words[5:9]), " ".join(words[9:])]) + "\nlast\n"
    assert evaluation().leave(text) == "first\nlast"
    head = " ".join(words[:13])
    assert evaluation().leave(f"a\n{head}\nb c d e f g h\n") == "a\nb c d e f g h"


def test_overlaps_deep_in_a_long_text_and_after_pickling():
    text = "\n".join(f"line {i} of many" for i in range(40_000))
    at = text.index("line 30000")
    found = pickle.loads(pickle.dumps(evaluation()))
    assert found.leave(text[:at] + EN + "\n" + text[at:]) == found.leave(text) == text


def test_no_evaluation_text_meets_nothing():
    assert Evaluation([], CONFIG).leave(EN) == EN


@pytest.mark.parametrize("chat", [False, True])
def test_tags_are_in_both_texts_or_in_neither(chat):
    config = CleanConfig(tags=True)
    tagged = " ".join(f"<b>{word}</b>" for word in EN.split())
    cleaner = Cleaner(config, Evaluation([("web", rewrite(tagged, config, chat=chat))], DecontaminateConfig()))
    messages = (Message("user", tagged), Message("assistant", "yes"))
    if chat:
        assert cleaner.conversation(Conversation(messages, "a", "b")) is None
    else:
        assert cleaner.document(Document(tagged, "a", "b")) is None
    assert cleaner.counts["contaminated"].dropped == 1
