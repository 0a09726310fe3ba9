"""Beam search: of all beginnings of a row's answer the n likeliest are continued, in one program of static shapes.

A row's beams are its own, so an answer does not depend on the batch. What ends, when, and how it is scored is as in
Hugging Face transformers, whose answers these are.

Source: Sutskever et al. 2014, section 3.2; Wu et al. 2016, section 7 (the penalty of lengths, here length ** penalty).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.inference.rules import Text, banned, seen
from jaxllm.inference.sampling import penalise
from jaxllm.inference.steps import Rows, read_prompts
from jaxllm.layers.cache import Cache
from jaxllm.models.build import AnyModel
from jaxllm.sharding.rules import constrain

NEVER = -1e9  # log-probability of a beam that is not there, so that the first step continues one alone


class Ranking(NamedTuple):
    """How answers are compared, and when a row has enough of them.

    Attributes:
      norms: what the log-probability of an answer of so many tokens is divided by.
      hurry: end with n answers, whatever the others may become.
      patient: judge the others by the norm of the longest answer, not by that of their length now.
      renormalise: probabilities are those of the tokens that are not banned.
    """

    norms: Float[Array, "M1"]
    hurry: Bool[Array, ""]
    patient: Bool[Array, ""]
    renormalise: Bool[Array, ""]


class Lines(NamedTuple):
    """Prompts with answers, n a row, the best first; S = slots of the cache, M = bucket of the new tokens.

    Attributes:
      scores: log-probability, of whole answers divided by their norm; -inf: there is none.
      counts: tokens of the answer. logprobs: of each, as the model gives them.
    """

    scores: Float[Array, "B n"]
    counts: Int[Array, "B n"]
    history: Int[Array, "B n S"]
    logprobs: Float[Array, "B n M"]


class Beams(NamedTuple):
    """Everything a step reads and writes.

    Attributes:
      step: tokens written so far. position: place of the newest one. done: the row's answers are final.
      open: what is continued. ended: the best answers.
    """

    step: Int[Array, ""]
    position: Int[Array, "B"]
    done: Bool[Array, "B"]
    open: Lines
    ended: Lines
    cache: Cache


def beam_search(
    model: AnyModel, prompts: Int[Array, "B T"], lengths: Int[Array, "B"], rows: Rows, ranking: Ranking,
    sources: tuple[Array, ...] | None, sizes: tuple[int, int, int],
) -> Lines:  # fmt: skip
    """Return the n best answers of each row; arguments as of `read_prompts`.

    Args:
      sizes: n, slots of the cache, bucket of the new tokens.
    """
    n, slots, new_slots = sizes
    cache, history, logits = read_prompts(model, prompts, lengths, sources, slots)
    batch = len(prompts)
    zeros = jnp.zeros((batch, n), jnp.int32)
    alone = jnp.where(jnp.arange(n)[None, :] == 0, zeros, NEVER)
    lines = Lines(alone, zeros, jnp.repeat(history[:, None], n, axis=1), jnp.zeros((batch, n, new_slots), jnp.float32))
    nothing = lines._replace(scores=jnp.full((batch, n), -jnp.inf))
    each = jnp.repeat(jnp.arange(batch), n)
    cache = jax.tree.map(lambda z: _pick(z, batch, each), cache)
    start = Beams(jnp.int32(0), lengths - 1, rows.limits == 0, lines, nothing, cache)

    def step(beams: Beams) -> Beams:
        places = jnp.repeat(beams.position, n)
        token = jnp.take_along_axis(beams.open.history.reshape(batch * n, -1), places[:, None], axis=1)
        hidden, cache = model.decoder.decode(token, places[:, None], beams.cache)
        return _extend(beams._replace(cache=cache), model.logits(hidden)[:, 0], rows, ranking)

    start = _extend(start, jnp.repeat(logits, n, axis=0), rows, ranking)
    return jax.lax.while_loop(lambda beams: ~jnp.all(beams.done), step, start).ended


def _extend(beams: Beams, logits: Float[Array, "R V"], rows: Rows, ranking: Ranking) -> Beams:
    """Continue each beam by its likeliest tokens; keep the best that go on and the best that ended."""
    batch, n = beams.open.scores.shape
    vocab_size, count = logits.shape[-1], beams.step + 1
    at_limit = count >= rows.limits
    logprobs = jax.nn.log_softmax(constrain(logits, "batch", None), axis=-1)
    scores = _scores(logprobs, beams, rows, ranking, at_limit).reshape(batch, n, vocab_size)
    totals = (beams.open.scores[:, :, None] + scores).reshape(batch, -1)
    # So many, because each beam can end with each of the stop tokens and n must be left to go on.
    best, index = jax.lax.top_k(totals, min(n * (1 + len(rows.stop_ids)), n * vocab_size))
    beam, token = index // vocab_size, index % vocab_size

    taken = _take(beams.open, beam)
    written = jnp.arange(taken.history.shape[-1])[None, None, :] == (beams.position + 1)[:, None, None]
    newest = jnp.arange(taken.logprobs.shape[-1])[None, None, :] == beams.step
    chosen = jnp.take_along_axis(logprobs.reshape(batch, -1), index, axis=1)
    taken = Lines(
        best, jnp.full_like(beam, count), jnp.where(written, token[..., None], taken.history),
        jnp.where(newest, chosen[..., None], taken.logprobs),
    )  # fmt: skip
    ends = jnp.any(token[..., None] == rows.stop_ids[None, None, :], axis=-1) | at_limit[:, None]
    # An end counts where it is among the n best, and as long as the row is not done.
    counts = ends & (jnp.arange(ends.shape[1]) < n)[None, :] & ~beams.done[:, None]
    whole = taken._replace(scores=jnp.where(counts, best / ranking.norms[count], -jnp.inf))
    ended = jax.tree.map(lambda *both: jnp.concatenate(both, axis=1), beams.ended, whole)
    ended = _take(ended, jax.lax.top_k(ended.scores, n)[1])
    goes_on, order = jax.lax.top_k(jnp.where(ends, -jnp.inf, best), n)

    worst = ended.scores[:, -1]  # -inf as long as there are fewer than n
    norm = ranking.norms[jnp.where(ranking.patient, rows.limits, count)]
    enough = (worst > -jnp.inf) & (ranking.hurry | (goes_on[:, 0] / norm <= worst))
    parents = (jnp.take_along_axis(beam, order, axis=1) + jnp.arange(batch)[:, None] * n).reshape(-1)
    pick = lambda z: None if z is None else _pick(z, batch * n, parents)
    return Beams(
        count, beams.position + ~beams.done, beams.done | at_limit | enough,
        _take(taken, order)._replace(scores=goes_on), ended,
        # What a source is remembered by is the same for all beams of a row.
        tuple(layer._replace(keys=pick(layer.keys), values=pick(layer.values)) for layer in beams.cache),
    )  # fmt: skip


def _scores(
    logprobs: Float[Array, "R V"], beams: Beams, rows: Rows, ranking: Ranking, last: Bool[Array, "B"]
) -> Float[Array, "R V"]:
    """Return what each token adds to the score of a beam; -inf: it may not come next."""
    batch, n = beams.open.scores.shape
    vocab_size = logprobs.shape[-1]
    each = lambda z: jnp.repeat(z, n)
    history = beams.open.history.reshape(batch * n, -1)
    text = Text(history, each(beams.position), beams.open.counts.reshape(-1), each(last))
    scores = logprobs
    if rows.settings.repetition_penalty is not None:
        scores = penalise(scores, seen(text, vocab_size), rows.settings.repetition_penalty)
    barred = banned(rows.rules, text, rows.stop_ids, vocab_size) | (jnp.arange(vocab_size) >= rows.vocab_size)[None, :]
    scores = jnp.where(barred, -jnp.inf, scores)
    if rows.rules.ends is not None:  # a forced end costs nothing
        scores = jnp.where(text.last[:, None] & ~barred, 0.0, scores)
    return jnp.where(ranking.renormalise, jax.nn.log_softmax(scores, axis=-1), scores)


def _take(lines: Lines, index: Int[Array, "B K"]) -> Lines:
    """Return the lines that `index` names in each row."""
    return jax.tree.map(lambda z: jax.vmap(lambda row, chosen: row[chosen])(z, index), lines)


def _pick(part: Float[Array, "X ..."], rows: int, index: Int[Array, "R"]) -> Float[Array, "Y ..."]:
    """Return a part of the cache for other rows; each row has one or more matrices in it, which lie together."""
    return part.reshape(rows, -1, *part.shape[1:])[index].reshape(-1, *part.shape[1:])
