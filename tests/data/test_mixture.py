from collections import Counter
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxllm.data.mixture import Mixture, interleave, permute


@settings(max_examples=40, deadline=None)
@given(size=st.integers(1, 300), key=st.integers(0, 2**140))
def test_permute_is_a_permutation(size, key):
    assert sorted(permute(index, size, key) for index in range(size)) == list(range(size))


def test_permute_differs_by_key_and_is_uniform():
    orders = Counter(tuple(permute(index, 3, key) for index in range(3)) for key in range(3000))
    assert len(orders) == 6
    assert all(400 < count < 600 for count in orders.values())
    far = [permute(index, 10**12, 7) for index in range(4)]
    assert len(set(far)) == 4
    assert max(far) > 10**10


def test_permute_has_no_visible_order():
    image = [permute(index, 1000, 5) for index in range(1000)]
    fixed = sum(index == value for index, value in enumerate(image))
    neighbours = sum(abs(a - b) == 1 for a, b in pairwise(image))
    assert fixed < 8
    assert neighbours < 10


def test_permute_never_changes():
    # A changed shuffle would silently change the order of every resumed run: these values are for ever.
    assert [permute(index, 10, 0) for index in range(10)] == GOLDEN_10
    assert permute(123_456, 10**9, (3 << 96) + (1 << 64) + 2) == GOLDEN_LARGE


GOLDEN_10 = [0, 8, 2, 3, 6, 5, 4, 9, 7, 1]
GOLDEN_LARGE = 622511926


def test_interleave_example():
    shares = (Fraction(1, 4), Fraction(3, 4))
    assert [interleave(shares, sample) for sample in range(8)] == [
        (1, 0),
        (1, 1),
        (1, 2),
        (0, 0),
        (1, 3),
        (1, 4),
        (1, 5),
        (0, 1),
    ]


@settings(max_examples=25, deadline=None)
@given(weights=st.lists(st.integers(1, 20), min_size=1, max_size=5), stop=st.integers(1, 300))
def test_shares_are_exact_at_every_length(weights, stop):
    shares = tuple(Fraction(weight, sum(weights)) for weight in weights)
    counts = [0] * len(shares)
    for sample in range(stop):
        source, number = interleave(shares, sample)
        assert number == counts[source]  # numbers of a source are 0, 1, 2, ...
        counts[source] += 1
        assert all(abs(count - (sample + 1) * share) < len(shares) for count, share in zip(counts, shares, strict=True))


def test_decimal_weights_are_exact():
    mixture = Mixture.shuffled([100, 50], [(0, [0.85, 0.15])], seed=0)
    assert mixture.stages == ((0, (Fraction(17, 20), Fraction(3, 20))),)
    counts = Counter(mixture[sample][0] for sample in range(2000))
    assert counts == {0: 1700, 1: 300}


def test_epochs_cover_every_row_once_and_are_reshuffled():
    mixture = Mixture.shuffled([7], [(0, [1.0])], seed=3, epochs=[4])
    assert (mixture.samples_per_epoch, mixture.n_samples) == (7, 28)
    epochs = [[mixture[7 * epoch + index][1] for index in range(7)] for epoch in range(4)]
    assert all(sorted(order) == list(range(7)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 4


def test_an_epoch_ends_with_the_last_row_of_the_first_source():
    mixture = Mixture.shuffled([10, 4], [(0, [0.7, 0.3])], seed=0, epochs=[1])
    samples = [mixture[sample] for sample in range(mixture.n_samples)]
    assert sorted(row for source, row in samples if source == 0) == list(range(10))
    assert samples[-1][0] == 0
    assert mixture.n_samples == mixture.samples_per_epoch == 15


def test_sources_of_one_seed_are_shuffled_differently():
    mixture = Mixture.shuffled([50, 50], [(0, [1, 1])], seed=0)
    orders = ([], [])
    for sample in range(100):
        source, row = mixture[sample]
        orders[source].append(row)
    assert orders[0] != orders[1]


def test_in_sequence():
    mixture = Mixture.in_sequence([2, 0, 1])
    assert [mixture[sample] for sample in range(3)] == [(0, 0), (0, 1), (2, 0)]
    with pytest.raises(IndexError, match="past the end of 3 rows"):
        mixture[3]


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(
        st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(lambda each: each[0]), min_size=1, max_size=4
    ),
    length=st.integers(1, 40),
)
def test_stages_count_what_they_give(weights, length):
    stages = [(number * length, each) for number, each in enumerate(weights)]
    mixture = Mixture.shuffled([7, 5, 3], stages, seed=1)
    seen = [0, 0, 0]
    for sample in range(150):
        assert mixture.used(sample) == seen
        source, row = mixture[sample]
        assert 0 <= row < mixture.sizes[source]
        seen[source] += 1
        if not sample % 7:
            assert mixture.needs(source, seen[source]) == sample + 1
    assert mixture.samples_per_epoch == mixture.needs(0, 7)
