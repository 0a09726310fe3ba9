"""The pure functions of decoding: `prefill` makes a `State` of padded prompts, `decode_step` adds a token per row."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxllm.inference.sampling import Settings, choose
from jaxllm.layers.cache import Cache, init_cache
from jaxllm.models.decoder import Transformer
from jaxllm.models.seq2seq import Seq2Seq
from jaxllm.sharding.rules import constrain


class State(NamedTuple):
    """Everything a decode step reads and writes; M = bucket of the new tokens.

    Attributes:
      step: tokens written so far, for every row.
      token, position: the newest token of each row, not yet in the cache, and its place in the row.
      done: the row takes no more tokens; `counts` stands still.
      counts, limits: tokens of the answer, and their maximum.
      stop_ids: padded with -1. vocab_size: ids from here on are padding of the embedding table, and never chosen.
      keys, settings: of sampling. seen: bool [B, V], or None without repetition penalty.
      tokens, logprobs: [B, M], the answers.
    """

    step: Int[Array, ""]
    token: Int[Array, "B"]
    position: Int[Array, "B"]
    done: Bool[Array, "B"]
    counts: Int[Array, "B"]
    limits: Int[Array, "B"]
    stop_ids: Int[Array, "I"]
    vocab_size: Int[Array, ""]
    keys: UInt[Array, "B 2"]
    settings: Settings
    seen: Bool[Array, "B V"] | None
    cache: Cache
    tokens: Int[Array, "B M"]
    logprobs: Float[Array, "B M"]


class Rows(NamedTuple):
    """Padded requests of one batch, as the prefill takes them; an unused row has limit 0.

    Attributes:
      prompts: int32 [B, T], padded on the right. lengths: int32 [B], >= 1.
      sources, segments: int32 [B, S], what an encoder reads, and which of it are tokens (1); None: decoder-only.
    """

    prompts: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    limits: Int[Array, "B"]
    keys: UInt[Array, "B 2"]
    stop_ids: Int[Array, "I"]
    vocab_size: Int[Array, ""]
    settings: Settings
    sources: Int[Array, "B S"] | None = None
    segments: Int[Array, "B S"] | None = None


def decode_step(model: Transformer | Seq2Seq, state: State) -> State:
    """Put the newest token of each row into the cache and choose the next one."""
    hidden, cache = model.decode(state.token[:, None], state.position[:, None], state.cache)
    return _accept(state._replace(cache=cache), model.logits(hidden)[:, 0])


def _accept(state: State, logits: Float[Array, "B V"]) -> State:
    """Choose a token per row and record it; what a row that is done gets is never read."""
    # Gathered once, because each reduction over a split vocabulary would wait for all devices.
    logits = constrain(logits, "batch", None)
    logits = jnp.where(jnp.arange(logits.shape[-1])[None, :] < state.vocab_size, logits, -jnp.inf)
    tokens, logprobs = choose(logits, state.seen, state.keys, state.step, state.settings)
    counts = state.counts + ~state.done
    stopped = jnp.any(tokens[:, None] == state.stop_ids[None, :], axis=-1)
    seen = state.seen
    if seen is not None:
        seen = seen | (jnp.arange(seen.shape[1])[None, :] == tokens[:, None])
    return state._replace(
        step=state.step + 1,
        token=tokens,
        position=state.position + ~state.done,
        done=state.done | stopped | (counts >= state.limits),
        counts=counts,
        seen=seen,
        tokens=jax.lax.dynamic_update_slice(state.tokens, tokens[:, None], (0, state.step)),
        logprobs=jax.lax.dynamic_update_slice(state.logprobs, logprobs[:, None], (0, state.step)),
    )


def prefill(model: Transformer | Seq2Seq, rows: Rows, slots: int, new_slots: int) -> State:
    """Write the prompts into a fresh cache of `slots` positions and choose the first token of each row.

    Padding needs no mask: it stands after the prompt, where the prompt cannot see it, and each of its cache slots is
    overwritten before the first query that may see the slot.
    """
    config = model.config
    batch, length = rows.prompts.shape
    if rows.sources is None:
        shape = (batch, slots, config.kv_heads, config.head_width)
        cache = init_cache(config.n_layers, shape, jnp.dtype(model.compute.dtype))
    else:
        cache = model.begin(rows.sources, rows.segments, slots)
    positions = jnp.minimum(jnp.arange(length, dtype=jnp.int32)[None, :], rows.lengths[:, None] - 1)
    hidden, cache = model.prefill(rows.prompts, positions, cache)
    last = jnp.take_along_axis(hidden, (rows.lengths - 1)[:, None, None], axis=1)
    seen = None
    if rows.settings.repetition_penalty is not None:
        real = jnp.arange(length)[None, :] < rows.lengths[:, None]
        real = jnp.where(real, rows.prompts, config.vocab_size)  # out of range is dropped
        empty = jnp.zeros((batch, config.vocab_size), bool)
        seen = jax.vmap(lambda row, ids: row.at[ids].set(True, mode="drop"))(empty, real)
    zeros = jnp.zeros(batch, jnp.int32)
    state = State(
        step=jnp.int32(0), token=zeros, position=rows.lengths - 1, done=rows.limits == 0, counts=zeros,
        limits=rows.limits, stop_ids=rows.stop_ids, vocab_size=rows.vocab_size, keys=rows.keys,
        settings=rows.settings, seen=seen, cache=cache,
        tokens=jnp.zeros((batch, new_slots), jnp.int32), logprobs=jnp.zeros((batch, new_slots), jnp.float32),
    )  # fmt: skip
    return _accept(state, model.logits(last)[:, 0])
