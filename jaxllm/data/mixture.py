"""Order of the samples: index -> (source, row), by integer arithmetic, with no state and no tables.

Own arithmetic rather than a library's, because a library may change its shuffle between versions, and a resumed run
must not.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

_MASK = (1 << 64) - 1
_ROUNDS = 4


@dataclass(frozen=True)
class Mixture:
    """`mixture[i]` is (source, row) of global sample i.

    Attributes:
      sizes: rows of each source.
      shares: exact share of each source in the samples; sums to 1. None: the sources follow one another.
      n_samples: end of the order; None: endless.
      samples_per_epoch: samples until the first source was used once.
    """

    sizes: tuple[int, ...]
    shares: tuple[Fraction, ...] | None
    seed: int
    n_samples: int | None
    samples_per_epoch: int

    @classmethod
    def in_sequence(cls, sizes: list[int]) -> "Mixture":
        """Return every row of every source once, in the stored order."""
        return cls(tuple(sizes), None, 0, sum(sizes), sum(sizes))

    @classmethod
    def shuffled(cls, sizes: list[int], weights: list[float], seed: int, epochs: int | None) -> "Mixture":
        """Mix by `weights`; each pass over a source has its own order.

        Args:
          epochs: passes over the first source; None: endless.
        """
        exact = [Fraction(str(weight)) for weight in weights]  # 0.15 is 3/20, not its nearest binary fraction
        shares = tuple(weight / sum(exact) for weight in exact)
        # Sample i is the first source's sample number floor(i * share) exactly when floor((i + 1) * share) is larger,
        # so its k-th sample is taken by i = ceil(k / share) - 1.
        per_epoch = ceil(sizes[0] / shares[0])
        return cls(tuple(sizes), shares, seed, epochs and ceil(epochs * sizes[0] / shares[0]), per_epoch)

    def __getitem__(self, sample: int) -> tuple[int, int]:
        if self.shares is None:
            for source, size in enumerate(self.sizes):
                if sample < size:
                    return source, sample
                sample -= size
            raise IndexError(f"sample is past the end of {sum(self.sizes)} rows")
        source, number = interleave(self.shares, sample)
        epoch, index = divmod(number, self.sizes[source])
        return source, permute(index, self.sizes[source], (self.seed << 96) + (source << 64) + epoch)


def interleave(shares: tuple[Fraction, ...], sample: int) -> tuple[int, int]:
    """Return (source, how many samples of that source come before) for a global sample.

    Source 0 takes a sample whenever floor(i * share) steps up, so after any i samples it had floor(i * share) of them;
    the rest is divided in the same way among the others. Exact at every length: no source is ever behind its share by
    more than one sample per source before it.

    Example: shares 1/4, 3/4 give sources 1 1 1 0 1 1 1 0 ...
    """
    left = Fraction(1)
    for source, share in enumerate(shares):
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
