"""What the next token may not be: rules of generation_config.json, for one step of all rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class Rules(NamedTuple):
    """Rules as inputs of a compiled program; None = there is no such rule in that program.

    Attributes:
      ngram: a run of so many tokens may not occur twice.
      words: sequences that may not occur, on the right of rows that are padded with -1.
      shortest: tokens of an answer, without its end.
      ends: tokens that an answer may have as its last if it reaches its limit.
    """

    ngram: Int[Array, ""] | None = None
    words: Int[Array, "W L"] | None = None
    shortest: Int[Array, ""] | None = None
    ends: Int[Array, "I"] | None = None


class Text(NamedTuple):
    """The rows so far, which end at `position`; R = rows.

    Attributes:
      history: prompt and answer; what it holds behind `position` means nothing.
      counts: tokens of the answer. last: whether the next token is the last that the row may have.
    """

    history: Int[Array, "R S"]
    position: Int[Array, "R"]
    counts: Int[Array, "R"]
    last: Bool[Array, "R"]


def seen(text: Text, vocab_size: int) -> Bool[Array, "R V"]:
    """Return which tokens the rows have."""
    return _marks(text.history, jnp.arange(text.history.shape[1])[None, :] <= text.position[:, None], vocab_size)


def banned(rules: Rules, text: Text, stop_ids: Int[Array, "I"], vocab_size: int) -> Bool[Array, "R V"]:
    """Return which tokens may not come next.

    Example, rules.ngram = 2: behind "a b c a" comes no b.
    """
    history, position, counts, last = text
    result = jnp.zeros((len(history), vocab_size), bool)
    among = lambda ids: jnp.any(jnp.arange(vocab_size)[:, None] == ids[None, :], axis=-1)
    if rules.ngram is not None:
        places = jnp.arange(history.shape[1])[None, :]
        tail = lambda back: jnp.take_along_axis(history, (position + 1 - back)[:, None], axis=1)
        same = lambda back, found: found & (jnp.roll(history, back, axis=1) == tail(back))  # so many tokens before it
        start = (places >= rules.ngram - 1) & (places <= position[:, None])
        result |= _marks(history, jax.lax.fori_loop(1, rules.ngram, same, start), vocab_size)
    if rules.words is not None:
        before, end = rules.words[:, :-1], rules.words[:, -1]
        places = position[:, None] + 1 + jnp.arange(-before.shape[1], 0)[None, :]
        tail = jnp.where(places < 0, -2, jnp.take_along_axis(history, jnp.maximum(places, 0), axis=1))
        found = jnp.all((before == -1)[None] | (before[None] == tail[:, None, :]), axis=-1)
        result |= _marks(jnp.broadcast_to(end[None, :], found.shape), found, vocab_size)
    if rules.shortest is not None:
        result |= (counts < rules.shortest)[:, None] & among(stop_ids)[None, :]
    if rules.ends is not None:  # above all others
        result = jnp.where(last[:, None], ~among(rules.ends)[None, :], result)
    return result


def _marks(ids: Int[Array, "R X"], chosen: Bool[Array, "R X"], vocab_size: int) -> Bool[Array, "R V"]:
    """Return which ids are chosen, by row."""
    ids = jnp.where(chosen, ids, vocab_size)  # out of range is dropped
    return jnp.zeros((len(ids), vocab_size), bool).at[jnp.arange(len(ids))[:, None], ids].set(True, mode="drop")
