import time
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.packing import ChatPlan, PackingConfig, TextPlan, best_fit, plan
from jaxllm.data.shards import Dataset


def rows(made):
    return [made.row(index) for index in range(len(made))]


def as_lists(batch):
    return {name: getattr(batch, name).tolist() for name in batch._fields}


def test_text_rows_as_literals(text_dataset):
    # Documents 1 a b 2 (103 104 ...: byte + 6) and 1 b 2.
    made = TextPlan(Dataset.open(text_dataset([2, 1])), 4)
    a, b = 103, 104
    assert [as_lists(row) for row in rows(made)] == [
        {
            "tokens": [1, a, b, 1],
            "targets": [a, b, 2, b],
            "weights": [1] * 4,
            "segments": [1, 1, 1, 2],
            "positions": [0, 1, 2, 0],
        },
        {
            "tokens": [b, 0, 0, 0],
            "targets": [2, 0, 0, 0],
            "weights": [1, 0, 0, 0],
            "segments": [1, 0, 0, 0],
            "positions": [0] * 4,
        },
    ]
    assert made.waste == 3 / 8
    assert [made.documents(index).tolist() for index in range(2)] == [[0, 1], [1]]


def test_chat_rows_as_literals(chat_dataset):
    # Sizes 4 2 3 at T = 6: the longest with the shortest that still fits, nothing cut; prompts have weight 0.
    made = ChatPlan(Dataset.open(chat_dataset([(3, 2), (1, 2), (2, 2)])), PackingConfig(seq_len=6))
    assert [as_lists(row) for row in rows(made)] == [
        {
            "tokens": [1, 10, 10, 20, 1, 21],
            "targets": [10, 10, 20, 2, 21, 2],
            "weights": [0, 0, 1, 1, 1, 1],
            "segments": [1, 1, 1, 1, 2, 2],
            "positions": [0, 1, 2, 3, 0, 1],
        },
        {
            "tokens": [1, 12, 22, 0, 0, 0],
            "targets": [12, 22, 2, 0, 0, 0],
            "weights": [0, 1, 1, 0, 0, 0],
            "segments": [1, 1, 1, 0, 0, 0],
            "positions": [0, 1, 2, 0, 0, 0],
        },
    ]
    assert made.waste == 3 / 12


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=30), seq_len=st.integers(2, 33), shard=st.integers(1, 100)
)
def test_every_token_is_a_target_once(tmp_path_factory, byte, sizes, seq_len, shard):
    from jaxllm.data.shard_writer import DatasetWriter, Encoded, text_tokens

    directory = tmp_path_factory.mktemp("any") / "data"
    rng = np.random.default_rng(len(sizes))
    documents = [rng.integers(6, 262, size).tolist() for size in sizes]
    with DatasetWriter(directory, byte, "text", shard_tokens=shard) as writer:
        for ids in documents:
            writer.add("train", text_tokens(byte, Encoded("s", "l", ids, [], len(ids))))
    made = TextPlan(Dataset.open(directory), seq_len)
    pairs = []
    for row in rows(made):
        real = row.segments > 0
        assert (row.weights == real).all()
        assert not row.tokens[~real].any()
        pairs += zip(row.tokens[real].tolist(), row.targets[real].tolist(), strict=True)
        starts = np.flatnonzero(np.diff(row.segments, prepend=0) * real)
        assert (row.positions[starts] == 0).all()
        assert (np.diff(row.positions)[(np.diff(row.segments) == 0) & real[1:]] == 1).all()
    whole = [[1, *ids, 2] for ids in documents]
    assert pairs == [pair for ids in whole for pair in pairwise(ids)]


def test_chat_packing_never_mixes_or_cuts(chat_dataset):
    rng = np.random.default_rng(0)
    sizes = [(int(p), int(a)) for p, a in zip(rng.integers(1, 20, 200), rng.integers(2, 12, 200), strict=True)]
    dataset = Dataset.open(chat_dataset(sizes))
    made = ChatPlan(dataset, PackingConfig(seq_len=32))
    seen = []
    for index, row in enumerate(rows(made)):
        for segment, document in enumerate(made.documents(index).tolist(), start=1):
            here = row.segments == segment
            assert row.tokens[here].tolist() == dataset.tokens(document)[:-1].tolist()
            assert row.targets[here].tolist() == dataset.tokens(document)[1:].tolist()
            assert row.weights[here].tolist() == dataset.trained(document)[1:].tolist()
            assert row.positions[here].tolist() == list(range(here.sum()))
            seen.append(document)
    assert sorted(seen) == list(range(200))
    assert sum(row.weights.sum() for row in rows(made)) == dataset.n_trained
    assert made.waste < 0.05


def test_plan_follows_the_kind_and_is_deterministic(text_dataset, chat_dataset):
    text, chat = Dataset.open(text_dataset([9, 9])), Dataset.open(chat_dataset([(3, 4), (2, 3)]))
    config = PackingConfig(seq_len=8)
    assert isinstance(plan(text, config), TextPlan)
    for dataset in (text, chat):
        for first, second in zip(rows(plan(dataset, config)), rows(plan(dataset, config)), strict=True):
            assert as_lists(first) == as_lists(second)


def test_long_conversations_stop_or_are_dropped_but_never_cut(chat_dataset):
    dataset = Dataset.open(chat_dataset([(3, 4), (20, 13), (9, 9)]))
    with pytest.raises(
        ValueError, match=r"2 of 3 train conversations .* seq_len=16; the longest needs 32; raise seq_len"
    ):
        plan(dataset, PackingConfig(seq_len=16))
    made = plan(dataset, PackingConfig(seq_len=16, long="drop"))
    assert (made.dropped, len(made)) == (2, 1)
    with pytest.raises(ValueError, match="no conversation fits into seq_len=3"):
        plan(dataset, PackingConfig(seq_len=3, long="drop"))


def test_best_fit_example():
    assert best_fit([4, 3, 2, 1], 5) == [0, 1, 1, 0]
    assert best_fit([], 5) == []
    assert best_fit([5, 5], 5) == [0, 1]


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 50), max_size=80))
def test_best_fit_never_overfills_and_is_near_the_bound(sizes):
    sizes = sorted(sizes, reverse=True)
    used = np.bincount(best_fit(sizes, 50), sizes) if sizes else np.zeros(0)
    assert (used <= 50).all()
    # Johnson et al. 1974: best-fit decreasing needs at most 11/9 of the optimum + 4 rows.
    assert len(used) <= 11 / 9 * -(-sum(sizes) // 50) + 4 or max(sizes) > 25


def test_best_fit_is_fast_and_tight():
    sizes = sorted(np.random.default_rng(0).integers(20, 400, 100_000).tolist(), reverse=True)
    start = time.process_time()
    used = max(best_fit(sizes, 2048)) + 1
    assert time.process_time() - start < 2  # a million in a few seconds
    assert 1 - sum(sizes) / (used * 2048) < 0.001


def test_whole_texts_are_cut_nowhere(text_dataset):
    dataset = Dataset.open(text_dataset([2, 1, 1, 7]))
    made = plan(dataset, PackingConfig(seq_len=5, whole=True, long="drop"))
    assert [row.segments.tolist() for row in rows(made)] == [[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]]
    assert [row.weights.sum() for row in rows(made)] == [5, 2]
    assert (made.texts_per_row, made.dropped, made.what) == (2, 1, "text")
    with pytest.raises(ValueError, match=r"1 of 4 train texts do not fit into seq_len=5"):
        plan(dataset, PackingConfig(seq_len=5, whole=True))
