import pytest

from jaxllm.data.cleaning.clean import CleanConfig, Cleaner, remove_control, rules, strip_line_ends
from jaxllm.data.documents import Conversation, Document, Message


def doc(text, location="x"):
    return Document(text, "s", location)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\r\nb\rc\x0cd\x0be\x85f", "a\nb\nc\nd\ne\nf"),
        ("a\x00b\x07c\x1bd\x7fe\x9ff", "abcdef"),
        ("tab\tstays\nline too, and \u2028 and \u200b", "tab\tstays\nline too, and \u2028 and \u200b"),
    ],
)
def test_remove_control(text, expected):
    assert remove_control(text) == expected


def test_strip_line_ends():
    assert strip_line_ends("\n  indented  \n\n\tb\t \nc\u3000\n\n") == "  indented\n\n\tb\nc\u3000"
    assert len(strip_line_ends(" " * 1_000_000 + "x")) == 1_000_001  # linear, not quadratic


def test_rules_run_in_order_and_can_be_switched_off():
    assert list(rules(CleanConfig(nfc=True))) == ["nfc", "control", "trailing_space", "min_chars"]
    off = Cleaner(CleanConfig(control=False, trailing_space=False, deduplicate=False))
    assert off.document(doc("a\x00 ")) == doc("a\x00 ")
    assert list(off.counts) == ["min_chars"]
    assert Cleaner(CleanConfig(nfc=True)).document(doc("e\u0301")).text == "é"


def test_drops_are_counted_with_examples():
    cleaner = Cleaner(CleanConfig(min_chars=3))
    kept = [
        cleaner.document(doc(text, str(i)))
        for i, text in enumerate(["abc", "ab", " a\n ", "abc", "abc \r\n", "", "xyz"])
    ]
    assert [each.text for each in kept if each] == ["abc", "abc", "abc", "xyz"]
    assert cleaner.counts["min_chars"].dropped == 3
    assert cleaner.counts["min_chars"].examples == ["s, 1: 'ab'", "s, 2: ' a'", "s, 5: ''"]
    assert cleaner.counts["trailing_space"].changed == 2
    assert cleaner.counts["control"].changed == 1


def test_conversations_are_cleaned_and_dropped_whole():
    cleaner = Cleaner(CleanConfig())
    first = cleaner.conversation(Conversation.pair("q \r\n", "a", "s", "1"))
    assert [message.content for message in first.messages] == ["q", "a"]
    assert cleaner.conversation(Conversation.pair("q", " ", "s", "4")) is None
    with_system = Conversation((Message("system", " \n"), Message("user", "q"), Message("assistant", "b")), "s", "5")
    assert [message.role for message in cleaner.conversation(with_system).messages] == ["user", "assistant"]
    assert cleaner.counts["min_chars"].dropped == 1
