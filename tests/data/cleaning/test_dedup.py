import itertools
import random

import numpy as np
import pytest

from jaxllm.data.cleaning import dedup
from jaxllm.data.cleaning.dedup import DedupConfig

NEAR = DedupConfig(near=True)
HANZI = "".join(map(chr, range(0x4E00, 0x5200)))


def corpus(script, n_documents=40, n_units=200, seed=0):
    """Documents, each followed by a copy in which 3 units are others: a similarity of 0.86."""
    rng = random.Random(seed)
    alphabet = list(HANZI) if script == "zh" else [f"w{i}" for i in range(1000)]
    glue = "" if script == "zh" else " "
    texts = []
    for _ in range(n_documents):
        units = rng.choices(alphabet, k=n_units)
        copy = list(units)
        for at in rng.sample(range(n_units), 3):
            copy[at] = rng.choice(alphabet)
        texts += [glue.join(units), glue.join(copy)]
    return texts


def test_bands_find_the_pairs_at_the_threshold_with_as_many_rows_as_possible():
    for threshold, permutations in itertools.product((0.5, 0.7, 0.8, 0.9), (64, 128, 256)):
        count, rows = dedup.bands(threshold, permutations)
        assert count * rows <= permutations
        assert 1 - (1 - threshold**rows) ** count >= dedup.BAND_RECALL
        assert 1 - (1 - threshold ** (rows + 1)) ** (permutations // (rows + 1)) < dedup.BAND_RECALL
    assert dedup.bands(0.8, 128) == (18, 7)
    with pytest.raises(ValueError, match=r"16 permutations cannot find 95% of the pairs at threshold 0\.1; raise"):
        dedup.bands(0.1, 16)


@pytest.mark.parametrize("script", ["en", "zh"])
def test_near_duplicates_are_found_and_the_first_stays(script):
    texts = corpus(script)
    first = dedup.near_duplicates(dedup.signatures(texts, NEAR), NEAR)
    assert (first[::2] == np.arange(0, len(texts), 2)).all()
    assert (first[1::2] == first[::2]).mean() >= 0.95


def test_signatures_estimate_the_jaccard_similarity():
    rng = random.Random(1)
    config = DedupConfig(ngram=1, permutations=256)
    pairs, true = [], []
    for share in np.linspace(0, 1, 200):
        units = rng.sample(range(10_000), 100)
        other = [u if rng.random() < share else u + 10_000 for u in units]
        pairs += [" ".join(map(str, units)), " ".join(map(str, other))]
        true.append(len({*units} & {*other}) / len({*units} | {*other}))
    found = dedup.similarity(dedup.signatures(pairs, config), np.arange(400).reshape(-1, 2))
    error = found - true
    noise = np.sqrt(np.array(true) * (1 - np.array(true)) / 256)
    assert abs(error.mean()) < 0.005
    assert (error[noise > 0.01] / noise[noise > 0.01]).std() == pytest.approx(1, abs=0.2)


def test_signatures_depend_on_nothing_but_the_text():
    texts = [*corpus("en", 5), *corpus("zh", 5), "", "!!!", "???", "one"]
    whole = dedup.signatures(texts, NEAR)
    assert whole.dtype == np.uint32 and whole.shape == (len(texts), 128)
    for index, text in enumerate(texts):
        assert (dedup.signatures([text], NEAR)[0] == whole[index]).all()
    assert dedup.signatures([], NEAR).shape == (0, 128)
    # A dataset half made is continued with these: they may never change.
    assert dedup.signatures(["Hello world, this is a test 世界"], NEAR)[0, :3].tolist() == [
        22665916,
        223168559,
        1666028597,
    ]


def test_texts_without_words_are_alike_only_if_equal():
    texts = ["!!!", "???", "!!!", "", "...", ""]
    assert dedup.near_duplicates(dedup.signatures(texts, NEAR), NEAR).tolist() == [0, 1, 0, 3, 4, 3]


def test_a_long_text_and_its_copy_with_a_change_are_near():
    text = " ".join(f"w{i * i % 65_537}" for i in range(60_000))
    other = "an introduction " + text
    assert dedup.near_duplicates(dedup.signatures([text, "x", other], NEAR), NEAR).tolist() == [0, 1, 0]


def test_where_signatures_leave_it_open_the_texts_decide():
    texts = [
        " ".join(f"w{n}x{i + copy * (1000 if i >= 94 - n % 12 else 0)}" for i in range(100))
        for n in range(72)
        for copy in range(2)
    ]  # similarities from 0.70 to 0.88
    rows = dedup.signatures(texts, NEAR)
    grams = [{tuple(text.split()[at : at + 5]) for at in range(len(text.split()) - 4)} for text in texts]
    true = np.array([len(a & b) / len(a | b) >= 0.8 for a, b in zip(grams[::2], grams[1::2], strict=True)])
    found, guessed = (dedup.near_duplicates(rows, NEAR, text)[1::2] % 2 == 0 for text in (texts.__getitem__, None))
    assert not (found & ~true).any() and (guessed & ~true).any()
    assert found[true].mean() > guessed[true].mean()


def test_documents_after_one_pattern_are_not_compared_all_with_all(monkeypatch):
    rng, count = np.random.default_rng(0), 3000
    rows = rng.integers(0, 1 << 32, (count, 128), dtype=np.uint32)
    rows = np.where(rng.random(rows.shape) < 0.7**0.5, rows[0], rows)  # any two have a similarity of 0.7
    for copy in range(1, count, 2):
        rows[copy] = np.where(rng.random(128) < 0.9, rows[copy - 1], rows[copy])
    compared, similarity = 0, dedup.similarity

    def counted(rows, pairs):
        nonlocal compared
        compared += len(pairs)
        return similarity(rows, pairs)

    monkeypatch.setattr(dedup, "similarity", counted)
    first = dedup.near_duplicates(rows, NEAR)
    assert (first[1::2] == first[::2])[(rows[1::2] == rows[::2]).mean(axis=1) >= 0.8].mean() > 0.98
    assert compared < 800_000  # all with all: 2.9 million


@pytest.mark.parametrize("verify", [True, False])
def test_groups_by_band_give_the_same_clusters(verify):
    config = DedupConfig(near=True, threshold=0.5, permutations=64, verify=verify)
    texts = [*corpus("en", 30, 40), *corpus("zh", 30, 40), *["same words here every time again"] * 5]
    random.Random(3).shuffle(texts)
    rows = dedup.signatures(texts, config)
    groups = {}
    for index, keys in enumerate(dedup.band_keys(rows, config).tolist()):
        for band, key in enumerate(keys):
            groups.setdefault((band, key), []).append(index)
    pairs = [dedup.group_pairs(np.array(group), rows[group], config) for group in groups.values()]
    random.Random(4).shuffle(pairs)
    together = dedup.join(np.arange(len(texts)), np.concatenate(pairs))
    assert (together == dedup.near_duplicates(rows, config)).all()
    assert (together != np.arange(len(texts))).sum() > 20


def test_a_group_is_compared_beyond_its_first():
    rows = np.array([[1] * 16, [1] * 8 + [2] * 8, [1] * 8 + [2] * 7 + [3]], np.uint32)
    config = DedupConfig(near=True, permutations=16)
    assert dedup.group_pairs(np.array([4, 6, 9]), rows, config).tolist() == [[6, 9]]
    loose = DedupConfig(near=True, permutations=16, verify=False)
    assert dedup.group_pairs(np.array([4, 6, 9]), rows, loose).tolist() == [[4, 6], [4, 9]]


def test_components_are_those_of_a_plain_union_find():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        count = int(rng.integers(1, 100))
        pairs = rng.integers(0, count, (int(rng.integers(0, 80)), 2))
        root = list(range(count))
        for a, b in pairs.tolist():
            low, high = sorted((root[a], root[b]))
            root = [low if each == high else each for each in root]
        assert dedup.join(np.arange(count), pairs).tolist() == root
    chain = np.stack([np.arange(9999), np.arange(1, 10_000)], axis=1)
    assert not dedup.join(np.arange(10_000), np.random.default_rng(0).permutation(chain)).any()


LINES = DedupConfig(paragraphs="line", paragraph_min_bytes=9)


def test_paragraphs_of_earlier_documents_are_dropped_once():
    texts = ["boilerplate\nshort\nunique one\nunique one", "first line\nboilerplate\nshort\n", "版权所有\nunique two"]
    texts.append("版权所有\nboilerplate")
    parts = [dedup.paragraphs(text, LINES) for text in texts]
    assert parts[1] == ["first line", "boilerplate"] and parts[2] == ["版权所有", "unique two"]
    keys = np.frombuffer(b"".join(dedup.digest(part) for each in parts for part in each), "<u8").reshape(-1, 2)
    owners = np.repeat(np.arange(len(texts)), [len(each) for each in parts])
    dropped = np.split(dedup.repeated(keys, owners), np.cumsum([len(each) for each in parts])[:-1])
    kept = [dedup.drop_paragraphs(text, each, LINES) for text, each in zip(texts, dropped, strict=True)]
    assert kept == [texts[0], "first line\nshort\n", texts[2], ""]


def test_blank_lines_separate_paragraphs():
    config = DedupConfig(paragraphs="blank_line", paragraph_min_bytes=1)
    text = "\n\na\nb\n \n\u3000\nc\n\n\nd\n"
    assert dedup.paragraphs(text, config) == ["a\nb", "c", "d\n"]
    assert dedup.drop_paragraphs(text, [False] * 3, config) == text
    assert dedup.drop_paragraphs(text, [False, True, False], config) == "\n\na\nb\n\n\nd\n"
    assert dedup.drop_paragraphs("a\n\nb", [True, False], config) == "b"


def test_repeated_of_nothing():
    assert dedup.repeated(np.empty((0, 2), np.uint64), np.empty(0, np.int64)).tolist() == []
