"""The pure functions of decoding: `prefill` makes a `State` of padded prompts, `decode_step` adds a token per row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxllm.inference.sampling import Settings, choose
from jaxllm.layers.cache import Cache
from jaxllm.models.build import AnyModel
from jaxllm.sharding.rules import constrain


class Rows(NamedTuple):
    """What is asked for the rows of one batch, and never changes; an unused row has limit 0.

    Attributes:
      limits: most tokens of each answer.
      stop_ids: padded with -1. vocab_size: ids from here on are padding of the embedding table, and never chosen.
      keys, settings: of sampling.
    """

    limits: Int[Array, "B"]
    stop_ids: Int[Array, "I"]
    vocab_size: Int[Array, ""]
    keys: UInt[Array, "B 2"]
    settings: Settings


class State(NamedTuple):
    """Everything a decode step reads and writes; M = bucket of the new tokens.

    Attributes:
      step: tokens written so far, for every row.
      token, position: the newest token of each row, not yet in the cache, and its place in the row.
      done: the row takes no more tokens; `counts`, the tokens of its answer, stands still.
      seen: tokens of prompt and answer, bool [B, V]; None without repetition penalty.
      tokens, logprobs: [B, M], the answers.
    """

    rows: Rows
    step: Int[Array, ""]
    token: Int[Array, "B"]
    position: Int[Array, "B"]
    done: Bool[Array, "B"]
    counts: Int[Array, "B"]
    seen: Bool[Array, "B V"] | None
    cache: Cache
    tokens: Int[Array, "B M"]
    logprobs: Float[Array, "B M"]


def decode_step(model: AnyModel, state: State) -> State:
    """Put the newest token of each row into the cache and choose the next one."""
    hidden, cache = model.decode(state.token[:, None], state.position[:, None], state.cache)
    return _accept(state._replace(cache=cache), model.logits(hidden)[:, 0])


def _accept(state: State, logits: Float[Array, "B V"]) -> State:
    """Choose a token per row and record it; what a row that is done gets is never read."""
    rows, seen = state.rows, state.seen
    # Gathered once, because each reduction over a split vocabulary would wait for all devices.
    logits = constrain(logits, "batch", None)
    logits = jnp.where(jnp.arange(logits.shape[-1])[None, :] < rows.vocab_size, logits, -jnp.inf)
    tokens, logprobs = choose(logits, seen, rows.keys, state.step, rows.settings)
    counts = state.counts + ~state.done
    stopped = jnp.any(tokens[:, None] == rows.stop_ids[None, :], axis=-1)
    if seen is not None:
        seen = seen | (jnp.arange(seen.shape[1])[None, :] == tokens[:, None])
    return state._replace(
        step=state.step + 1,
        token=tokens,
        position=state.position + ~state.done,
        done=state.done | stopped | (counts >= rows.limits),
        counts=counts,
        seen=seen,
        tokens=jax.lax.dynamic_update_slice(state.tokens, tokens[:, None], (0, state.step)),
        logprobs=jax.lax.dynamic_update_slice(state.logprobs, logprobs[:, None], (0, state.step)),
    )


def prefill(
    model: AnyModel, prompts: Int[Array, "B T"], lengths: Int[Array, "B"], rows: Rows,
    sources: tuple[Array, ...] | None, slots: int, new_slots: int,
) -> State:  # fmt: skip
    """Write the prompts into a fresh cache of `slots` positions and choose the first token of each row.

    Padding needs no mask: it stands after the prompt, where the prompt cannot see it, and each of its cache slots is
    overwritten before the first query that may see the slot.

    Args:
      prompts: padded on the right; lengths: without the padding, >= 1.
      sources: what an encoder reads [B, S], and which of it are tokens (1); or latents [B, Z]; None: decoder-only.
    """
    config = model.config
    batch, length = prompts.shape
    cache = model.empty_cache(batch, slots) if sources is None else model.begin(*sources, slots)
    positions = jnp.minimum(jnp.arange(length, dtype=jnp.int32)[None, :], lengths[:, None] - 1)
    hidden, cache = model.prefill(prompts, positions, cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    seen = None
    if rows.settings.repetition_penalty is not None:
        real = jnp.arange(length)[None, :] < lengths[:, None]
        real = jnp.where(real, prompts, config.vocab_size)  # out of range is dropped
        empty = jnp.zeros((batch, config.vocab_size), bool)
        seen = jax.vmap(lambda row, ids: row.at[ids].set(True, mode="drop"))(empty, real)
    zeros = jnp.zeros(batch, jnp.int32)
    state = State(
        rows=rows, step=jnp.int32(0), token=zeros, position=lengths - 1, done=rows.limits == 0, counts=zeros, seen=seen,
        cache=cache, tokens=jnp.zeros((batch, new_slots), jnp.int32),
        logprobs=jnp.zeros((batch, new_slots), jnp.float32),
    )  # fmt: skip
    return _accept(state, model.logits(last)[:, 0])
