"""Hiding tokens that a masked language model is to guess, as a function of the seed and the number of the sample."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

STREAM = 0x6D61736B  # "mask": no other stream of random numbers with the same seed begins alike


class MaskRule(NamedTuple):
    """Which tokens are guessed, and what stands in their place. Source: Devlin et al. 2019 (BERT), section 3.1.

    Attributes:
      mask_id: of the mask token. vocab_size: random tokens are drawn from 0 ... vocab_size - 1.
      rate: share of tokens that are guessed. hidden, random: shares of these that become the mask, or any token; the
        rest stays, so that the model cannot tell which tokens it may trust.
    """

    mask_id: int
    vocab_size: int
    rate: float = 0.15
    hidden: float = 0.8
    random: float = 0.1


class Masked(NamedTuple):
    """A row to train on: `tokens` are the model's inputs, `targets` what was there, `weights` 1 where it is guessed."""

    tokens: Int[np.ndarray, "T"]
    targets: Int[np.ndarray, "T"]
    weights: Float[np.ndarray, "T"]


def mask_tokens(
    tokens: Int[np.ndarray, "T"], maskable: Bool[np.ndarray, "T"], rule: MaskRule, seed: int, sample: int
) -> Masked:
    """Hide some tokens of a row; the same seed and sample always hide the same ones.

    Args:
      maskable: True where a token may be guessed: not padding, not a special token.
      sample: number of the row in the run, counted from 0 over all epochs, so that no two epochs hide alike.

    Example, mask_id = 4:

        tokens    2 17 25 31 12  3
        maskable  0  1  1  1  1  0
        ->        2 17  4 31 12  3    targets: tokens as they were    weights 0 0 1 0 0 0
    """
    tokens = np.asarray(tokens)
    generator = np.random.default_rng((STREAM, seed, sample))
    chosen, kind = generator.random(tokens.shape), generator.random(tokens.shape)
    anything = generator.integers(0, rule.vocab_size, tokens.shape, tokens.dtype)
    guessed = maskable & (chosen < rule.rate)
    shown = np.where(kind < rule.hidden, rule.mask_id, np.where(kind < rule.hidden + rule.random, anything, tokens))
    return Masked(np.where(guessed, shown, tokens).astype(tokens.dtype), tokens, guessed.astype(np.float32))
