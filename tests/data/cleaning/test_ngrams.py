import numpy as np

from jaxllm.data.cleaning import ngrams


def grams(text, size=1):
    """All n-grams of one text, its parts one after the other."""
    return np.concatenate([ngrams.windows(found, size)[0] for found in ngrams.units([text])]).tolist()


def begins(text):
    return np.concatenate([found.begins for found in ngrams.units([text])]).tolist()


def test_units_are_words_and_characters_of_scripts_without_spaces():
    assert begins("Hello, wide world 2024!") == [0, 7, 12, 18]
    assert begins("我爱jax，今天") == [0, 1, 2, 6, 7]
    assert begins("ひらカナ ไทย") == [0, 1, 2, 3, 5, 6, 7]
    assert begins("한국어 हिन्दी naïve") == [0, 4, 11]  # vowel signs are part of their word
    assert begins("... \n——") == begins("") == []


def test_case_width_spaces_and_punctuation_do_not_count():
    assert grams("Hello, World", 2) == grams("ＨＥＬＬＯ  world!", 2)
    assert grams("我爱你。", 3) == grams("我 爱\n你", 3)
    assert grams("ab") != grams("ba") and grams("a b", 2) != grams("b a", 2) and grams("a b", 2) != grams("ab")
    assert grams("天", 1) != grams("犬", 1)


def test_ngrams_are_a_function_of_the_text_alone():
    texts = ["one two three four", "", "一二三四五六七", "!", "x", "y " * 300]
    together = {}
    for found in ngrams.units(texts):
        hashes, bounds = ngrams.windows(found, 3)
        together |= {int(owner): hashes[bounds[i] : bounds[i + 1]].tolist() for i, owner in enumerate(found.owners)}
    assert together == {index: grams(text, 3) for index, text in enumerate(texts)}
    assert [len(together[i]) for i in range(6)] == [2, 1, 5, 1, 1, 298]
    assert together[1] == together[3] == [0]
    # What prepare --resume compares with: these numbers may never change.
    assert grams("Hello world 世界", 2) == [15781501166013306276, 17451784100994505598, 13075425519028294992]


def test_a_long_text_comes_in_parts_that_lose_no_ngram():
    words = [f"w{i}" for i in range(120_000)]
    text = " ".join(words)
    assert len(text) > 3 * ngrams.PART_CHARS
    found = list(ngrams.units(["before", text, "after"]))
    assert all(len(set(each.owners.tolist())) == len(each.owners) for each in found)
    assert max(len(each.hashes) for each in found) < ngrams.PART_CHARS
    whole = set(grams(text, 5))
    for at in range(0, len(words) - 5, 1000):
        assert set(grams(" ".join(words[at : at + 1005]), 5)) <= whole
    starts = set(begins(text))
    assert {text.index(f" w{i} ") + 1 for i in range(1, 119_999, 997)} <= starts
    assert grams("a" * (ngrams.PART_CHARS + 10))  # one word, longer than a part


def test_lone_surrogates_and_any_character_are_read():
    text = "".join(map(chr, range(0x0, 0x30000, 7)))
    assert len(grams(text + "\ud800")) > 8000
