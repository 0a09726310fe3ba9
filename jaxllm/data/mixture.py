"""Order of the samples: index -> (source, row), by integer arithmetic, with no state and no tables.

Own arithmetic rather than a library's, because a library may change its shuffle between versions, and a resumed run
must not.
"""

from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

_MASK = (1 << 64) - 1
_ROUNDS = 4

Shares = tuple[Fraction, ...]  # of each source in the samples; they sum to 1


@dataclass(frozen=True)
class Mixture:
    """`mixture[i]` is (source, row) of global sample i.

    Attributes:
      sizes: rows of each source.
      stages: (first sample, shares) of each stage, the first from 0; none: the sources follow one another.
      n_samples: end of the order; None: endless.
      samples_per_epoch: samples until the first source (of the last stage) was used once.
    """

    sizes: tuple[int, ...]
    stages: tuple[tuple[int, Shares], ...]
    seed: int
    n_samples: int | None
    samples_per_epoch: int

    @classmethod
    def in_sequence(cls, sizes: list[int]) -> "Mixture":
        """Return every row of every source once, in the stored order."""
        return cls(tuple(sizes), (), 0, sum(sizes), sum(sizes))

    @classmethod
    def shuffled(
        cls, sizes: Sequence[int], stages: Sequence[tuple[int, Sequence[float]]], seed: int,
        epochs: Sequence[int | None] = (),
    ) -> "Mixture":  # fmt: skip
        """Mix by weights; each pass over a source has its own order.

        Args:
          stages: (first sample, weight of each source); the passes of a source go on from stage to stage.
          epochs: most passes over each source: the order ends where one would need more; None: no limit.
        """
        exact = [(start, [Fraction(str(weight)) for weight in weights]) for start, weights in stages]  # 0.15 is 3/20
        order = cls(
            tuple(sizes), tuple((start, tuple(each / sum(weights) for each in weights)) for start, weights in exact),
            seed, None, 0,
        )  # fmt: skip
        first = next(source for source, share in enumerate(order.stages[-1][1]) if share)
        ends = [order.needs(source, limit * sizes[source]) for source, limit in enumerate(epochs) if limit is not None]
        end = min((end for end in ends if end is not None), default=None)
        return cls(order.sizes, order.stages, seed, end, order.needs(first, sizes[first]))

    def __getitem__(self, sample: int) -> tuple[int, int]:
        if not self.stages:
            for source, size in enumerate(self.sizes):
                if sample < size:
                    return source, sample
                sample -= size
            raise IndexError(f"sample is past the end of {sum(self.sizes)} rows")
        stage = bisect(self._starts, sample) - 1
        source, number = interleave(self.stages[stage][1], sample - self._starts[stage])
        epoch, index = divmod(number + self._before[stage][source], self.sizes[source])
        return source, permute(index, self.sizes[source], (self.seed << 96) + (source << 64) + epoch)

    @cached_property
    def _starts(self) -> list[int]:
        return [start for start, _ in self.stages]

    @cached_property
    def _before(self) -> list[list[int]]:
        """What each source has given before each stage."""
        return [self.used(start) for start in self._starts]

    def used(self, samples: int) -> list[int]:
        """Return how many of the first `samples` samples are of each source."""
        total = [0] * len(self.sizes)
        ends = [*(start for start, _ in self.stages[1:]), samples]
        for (start, shares), end in zip(self.stages, ends, strict=True):
            for source, number in enumerate(divide(shares, max(0, min(end, samples) - start))):
                total[source] += number
        return total

    def needs(self, source: int, number: int) -> int | None:
        """Return after how many samples `source` has given `number`; None: never."""
        # Within a stage, the k-th is taken by n = ceil(k / share) or, where others come before, soon after.
        if not self.stages[-1][1][source] and self.used(self.stages[-1][0])[source] < number:
            return None
        low, high = 0, 1
        while self.used(high)[source] < number:
            low, high = high, 2 * high
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.used(middle)[source] >= number else (middle + 1, high)
        return low


def divide(shares: Shares, samples: int) -> list[int]:
    """Return how many of `samples` samples each source has; see `interleave`."""
    left, numbers = Fraction(1), []
    for share in shares:
        numerator, denominator = (share / left).as_integer_ratio() if left else (0, 1)
        numbers.append(samples * numerator // denominator)
        samples -= numbers[-1]
        left -= share
    return numbers


def interleave(shares: Shares, sample: int) -> tuple[int, int]:
    """Return (source, how many samples of that source come before) for a global sample.

    Source 0 takes a sample whenever floor(i * share) steps up, so after any i samples it had floor(i * share) of them;
    the rest is divided in the same way among the others. Exact at every length: no source is ever behind its share by
    more than one sample per source before it.

    Example: shares 1/4, 3/4 give sources 1 1 1 0 1 1 1 0 ...
    """
    left = Fraction(1)
    for source, share in enumerate(shares):
        if share:
            numerator, denominator = (share / left).as_integer_ratio()
            number = sample * numerator // denominator
            if (sample + 1) * numerator // denominator > number:
                return source, number
            sample -= number
            left -= share
    raise AssertionError("the last share is all that is left, so it takes every sample")


def permute(index: int, size: int, key: int) -> int:
    """Return the image of `index` under pseudo-random permutation number `key` of range(size).

    A Feistel network on the smallest even number of bits that holds `size`, walked until the result is in range: O(1)
    time and memory for any size.

    Source: Luby and Rackoff 1988 (four rounds); Black and Rogaway 2002, section 3 (cycle walking).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    keys = [_mix(key ^ _mix((key >> 64) + number)) for number in range(_ROUNDS)]
    while True:
        left, right = index >> half, index & mask
        for round_key in keys:
            left, right = right, left ^ (_mix(right ^ round_key) & mask)
        index = left << half | right
        if index < size:
            return index


def _mix(value: int) -> int:
    """SplitMix64: a cheap 64-bit hash (Steele, Lea and Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ value >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ value >> 27) * 0x94D049BB133111EB) & _MASK
    return value ^ value >> 31
