"""The pure functions of decoding: `prefill` makes a `State` of padded prompts, `decode_step` adds a token per row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxllm.inference.rules import Rules, Text, banned, seen
from jaxllm.inference.sampling import Settings, choose
from jaxllm.layers.cache import Cache
from jaxllm.models.build import AnyModel
from jaxllm.sharding.rules import constrain


class Rows(NamedTuple):
    """What is asked for the rows of one batch, and never changes; an unused row has limit 0.

    Attributes:
      limits: most tokens of each answer.
      stop_ids: padded with -1. vocab_size: ids from here on are padding of the embedding table, and never chosen.
      keys, settings: of sampling. rules: what may not be chosen.
    """

    limits: Int[Array, "B"]
    stop_ids: Int[Array, "I"]
    vocab_size: Int[Array, ""]
    keys: UInt[Array, "B 2"]
    settings: Settings
    rules: Rules


class State(NamedTuple):
    """Everything a decode step reads and writes; S = slots of the cache, M = bucket of the new tokens.

    Attributes:
      step: tokens written so far, for every row.
      token, position: the newest token of each row, not yet in the cache, and its place in the row.
      done: the row takes no more tokens; `counts`, the tokens of its answer, stands still.
      history: prompt and answer, which ends at `position`. logprobs: of the answer.
    """

    rows: Rows
    step: Int[Array, ""]
    token: Int[Array, "B"]
    position: Int[Array, "B"]
    done: Bool[Array, "B"]
    counts: Int[Array, "B"]
    cache: Cache
    history: Int[Array, "B S"]
    logprobs: Float[Array, "B M"]


def decode_step(model: AnyModel, state: State) -> State:
    """Put the newest token of each row into the cache and choose the next one."""
    hidden, cache = model.decoder.decode(state.token[:, None], state.position[:, None], state.cache)
    return _accept(state._replace(cache=cache), model.logits(hidden)[:, 0])


def _accept(state: State, logits: Float[Array, "B V"]) -> State:
    """Choose a token per row and record it; what a row that is done gets is never read."""
    rows, vocab_size = state.rows, logits.shape[-1]
    # Gathered once, because each reduction over a split vocabulary would wait for all devices.
    logits = constrain(logits, "batch", None)
    logits = jnp.where(jnp.arange(vocab_size)[None, :] < rows.vocab_size, logits, -jnp.inf)
    counts = state.counts + ~state.done
    text = Text(state.history, state.position, state.counts, counts >= rows.limits)
    repeated = None if rows.settings.repetition_penalty is None else seen(text, vocab_size)
    barred = banned(rows.rules, text, rows.stop_ids, vocab_size) if jax.tree.leaves(rows.rules) else None
    tokens, logprobs = choose(logits, repeated, rows.keys, state.step, rows.settings, barred)
    stopped = jnp.any(tokens[:, None] == rows.stop_ids[None, :], axis=-1)
    position = state.position + ~state.done
    newest = jnp.arange(state.history.shape[1])[None, :] == jnp.where(state.done, -1, position)[:, None]
    return state._replace(
        step=state.step + 1,
        token=tokens,
        position=position,
        done=state.done | stopped | (counts >= rows.limits),
        counts=counts,
        history=jnp.where(newest, tokens[:, None], state.history),
        logprobs=jax.lax.dynamic_update_slice(state.logprobs, logprobs[:, None], (0, state.step)),
    )


def read_prompts(
    model: AnyModel, prompts: Int[Array, "B T"], lengths: Int[Array, "B"], sources: tuple[Array, ...] | None, slots: int
) -> tuple[Cache, Int[Array, "B S"], Float[Array, "B V"]]:
    """Write the prompts into a fresh cache of `slots` positions.

    Padding needs no mask: it stands after the prompt, where the prompt cannot see it, and each of its cache slots is
    overwritten before the first query that may see the slot.

    Args:
      prompts: padded on the right; lengths: without the padding, >= 1.
      sources: what an encoder reads [B, S], and which of it are tokens (1); or latents [B, Z]; None: decoder-only.
    Returns:
      (cache, prompts with room for the answers, logits of the first new token of each row).
    """
    batch, length = prompts.shape
    cache = model.empty_cache(batch, slots) if sources is None else model.begin(*sources, slots)
    positions = jnp.minimum(jnp.arange(length, dtype=jnp.int32)[None, :], lengths[:, None] - 1)
    hidden, cache = model.decoder.prefill(prompts, positions, cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return cache, jnp.pad(prompts, ((0, 0), (0, slots - length))), model.logits(last)[:, 0]


def prefill(
    model: AnyModel, prompts: Int[Array, "B T"], lengths: Int[Array, "B"], rows: Rows,
    sources: tuple[Array, ...] | None, slots: int, new_slots: int,
) -> State:  # fmt: skip
    """Choose the first token of each row; arguments as of `read_prompts`."""
    cache, history, logits = read_prompts(model, prompts, lengths, sources, slots)
    zeros = jnp.zeros(len(prompts), jnp.int32)
    state = State(
        rows=rows, step=jnp.int32(0), token=zeros, position=lengths - 1, done=rows.limits == 0, counts=zeros,
        cache=cache, history=history, logprobs=jnp.zeros((len(prompts), new_slots), jnp.float32),
    )  # fmt: skip
    return _accept(state, logits)
