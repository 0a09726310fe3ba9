"""Continue token rows with a key/value cache: token ids in, token ids out, text unknown.

A prompt is padded on the right to a bucket and written into a static cache in one pass (`_start`); then `decode_step`
adds one token per row and step. The jitted loop and the Python stream run the same step over the same `State`. Shapes
come in buckets (1, 1.5, 2, 3, 4, 6, 8 ... and rows in powers of two), so that few programs exist and all are reused.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt

from jaxllm.inference.sampling import Sampler, Settings, choose, row_key, settings
from jaxllm.layers.cache import Cache, init_cache
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.models.decoder import Params, Transformer, bind, graph, unstack

MIN_LENGTH = 32  # tokens; smaller buckets save nothing
CHECK_EVERY = 16  # tokens between two calls of `Limits.finished`, which runs on the host


class Request(NamedTuple):
    """One row to continue: prompt ids, and which of its several answers this is (0, 1, ...)."""

    prompt: Sequence[int]
    sample: int = 0


class Limits(NamedTuple):
    """When a row ends.

    Attributes:
      max_new_tokens: most tokens added; fewer where the model's max_seq_len comes first.
      stop_ids: a row ends with the first of these tokens.
      finished: called with a row's new tokens now and then; True ends the row (stop strings).
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    finished: Callable[[list[int]], bool] | None = None


class Completion(NamedTuple):
    """New tokens of one row (with the stop token), their log-probabilities, and "stop" or "length"."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str


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
    """

    prompts: Int[Array, "B T"]
    lengths: Int[Array, "B"]
    limits: Int[Array, "B"]
    keys: UInt[Array, "B 2"]
    stop_ids: Int[Array, "I"]
    vocab_size: Int[Array, ""]
    settings: Settings


def decode_step(model: Transformer, state: State) -> State:
    """Put the newest token of each row into the cache and choose the next one."""
    hidden, cache = model.decode(state.token[:, None], state.position[:, None], state.cache)
    return _accept(state._replace(cache=cache), model.logits(hidden)[:, 0])


def _accept(state: State, logits: Float[Array, "B V"]) -> State:
    """Choose a token per row and record it; what a row that is done gets is never read."""
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


def prefill(model: Transformer, rows: Rows, slots: int, new_slots: int) -> State:
    """Write the prompts into a fresh cache of `slots` positions and choose the first token of each row.

    Padding needs no mask: it stands after the prompt, where the prompt cannot see it, and each of its cache slots is
    overwritten before the first query that may see the slot.
    """
    config = model.config
    batch, length = rows.prompts.shape
    shape = (batch, slots, config.kv_heads, config.head_width)
    cache = init_cache(config.n_layers, shape, jnp.dtype(model.compute.dtype))
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    hidden, cache = model.prefill(rows.prompts, positions, cache)
    last = jnp.take_along_axis(hidden, (rows.lengths - 1)[:, None, None], axis=1)
    seen = None
    if rows.settings.repetition_penalty is not None:
        real = jnp.where(positions < rows.lengths[:, None], rows.prompts, config.vocab_size)  # out of range is dropped
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


class Decoder:
    """A model ready to decode: parameters cut into layers, and its compiled programs.

    Args:
      params: stacked on L, as everywhere else; a cast copy is kept where the compute dtype is not float32.
      compute: resolved for the platform.
      max_rows: rows decoded at one time; more requests are taken in turns.
      vocab_size: ids of the tokenizer, where the model's table is larger.
    """

    def __init__(
        self, config: ModelConfig, params: Params, compute: ComputeConfig, *, max_rows: int = 64,
        vocab_size: int | None = None,
    ):  # fmt: skip
        self.config = config
        self.vocab_size = config.vocab_size if vocab_size is None else vocab_size
        self.max_rows = max_rows
        self.params = jax.jit(partial(_decode_params, dtype=jnp.dtype(compute.dtype)))(params)
        self._prefill, self._step, self._advance = _programs(config, compute)

    def generate(self, requests: Sequence[Request], sampler: Sampler, limits: Limits) -> list[Completion]:
        """Answer every request, in order.

        Raises:
          ValueError: a prompt is empty, too long for the model, or has an id outside the vocabulary.
        """
        self._check(requests, limits)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))  # similar lengths share a batch
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), self.max_rows):
            chosen = order[start : start + self.max_rows]
            answers = self._generate_batch([requests[i] for i in chosen], sampler, limits)
            completions.update(zip(chosen, answers, strict=True))
        return [completions[i] for i in range(len(requests))]

    def stream(self, request: Request, sampler: Sampler, limits: Limits) -> Iterator[Completion]:
        """Yield the answer token by token: completions of one token each, whose last has a finish_reason (else "")."""
        self._check([request], limits)
        state = self._begin([request], sampler, limits)
        tokens: list[int] = []
        while True:
            done, count = bool(state.done[0]), int(state.counts[0])
            tokens.append(int(state.token[0]))
            logprob = float(state.logprobs[0, count - 1])
            done = done or (limits.finished is not None and limits.finished(tokens))
            yield Completion(tokens[-1:], [logprob], self._reason(request, tokens, limits) if done else "")
            if done:
                return
            state = self._step(self.params, state)

    def _generate_batch(self, requests: Sequence[Request], sampler: Sampler, limits: Limits) -> list[Completion]:
        """Answer at most `max_rows` requests, in one batch."""
        state = self._begin(requests, sampler, limits)
        if limits.finished is None:
            state = self._advance(self.params, state, np.int32(limits.max_new_tokens))
        ended = np.asarray(state.done)
        while not ended.all():
            state = self._advance(self.params, state, state.step + CHECK_EVERY)
            rows = _answers(state)[: len(requests)]
            ended = np.asarray(state.done).copy()
            ended[: len(rows)] |= [limits.finished(tokens) for tokens, _ in rows]
            state = state._replace(done=jnp.asarray(ended))
        answers = zip(requests, _answers(state), strict=False)  # the state may have unused rows
        return [Completion(t, p, self._reason(request, t, limits)) for request, (t, p) in answers]

    def _begin(self, requests: Sequence[Request], sampler: Sampler, limits: Limits) -> State:
        """Pad `requests` to buckets and prefill them."""
        lengths = [len(request.prompt) for request in requests]
        room = [self._room(length, limits) for length in lengths]
        longest = self.config.max_seq_len
        prompt_slots = bucket(max(lengths), longest)
        slots = max(prompt_slots, bucket(max(map(sum, zip(lengths, room, strict=True))), longest))
        batch = 1 << (len(requests) - 1).bit_length()
        prompts = np.zeros((batch, prompt_slots), np.int32)
        keys = np.zeros((batch, 2), np.uint32)
        for i, request in enumerate(requests):
            prompts[i, : lengths[i]] = request.prompt
            keys[i] = row_key(sampler.seed, request.prompt, request.sample)
        spare = batch - len(requests)
        n_ids = 4 * -(-max(len(limits.stop_ids), 1) // 4)
        stop_ids = np.full(n_ids, -1, np.int32)
        stop_ids[: len(limits.stop_ids)] = limits.stop_ids
        rows = Rows(
            prompts, np.asarray(lengths + [1] * spare, np.int32), np.asarray(room + [0] * spare, np.int32),
            keys, stop_ids, np.int32(self.vocab_size), settings(sampler),
        )  # fmt: skip
        return self._prefill(self.params, rows, slots=slots, new_slots=bucket(max(room), longest))

    def _room(self, prompt_length: int, limits: Limits) -> int:
        """Most new tokens a prompt of this length can get."""
        return min(limits.max_new_tokens, self.config.max_seq_len - prompt_length)

    def _reason(self, request: Request, tokens: list[int], limits: Limits) -> str:
        """Return "stop" for an answer that ended by itself, "length" for one that was cut."""
        if tokens[-1] in limits.stop_ids or (limits.finished is not None and limits.finished(tokens)):
            return "stop"
        return "length"

    def _check(self, requests: Sequence[Request], limits: Limits) -> None:
        """Refuse what cannot be decoded, before anything is compiled."""
        if limits.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={limits.max_new_tokens} must be at least 1")
        vocab_size, longest = self.config.vocab_size, self.config.max_seq_len
        for i, (prompt, _) in enumerate(requests):
            if not 0 < len(prompt) < longest:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens; the model takes 1 to {longest - 1}, max_seq_len - 1"
                )
            if not 0 <= min(prompt) <= max(prompt) < vocab_size:
                raise ValueError(
                    f"prompt {i} has ids {min(prompt)} to {max(prompt)}, the vocabulary ends at {vocab_size - 1}; "
                    "encode it with the model's own tokenizer"
                )


def bucket(length: int, longest: int) -> int:
    """Round `length` up to 32, 48, 64, 96, 128, 192, ... tokens, at most `longest`.

    Example, longest = 1000: 5 -> 32, 33 -> 48, 200 -> 256, 900 -> 1000
    """
    power = max(MIN_LENGTH, 1 << (length - 1).bit_length())
    shorter = power * 3 // 4
    return min(longest, shorter if max(length, MIN_LENGTH + 1) <= shorter else power)


def _answers(state: State) -> list[tuple[list[int], list[float]]]:
    """Read (tokens, logprobs) of every row from the device."""
    tokens, logprobs, counts = jax.device_get((state.tokens, state.logprobs, state.counts))
    return [(tokens[i, :n].tolist(), logprobs[i, :n].tolist()) for i, n in enumerate(counts)]


def _decode_params(params: Params, dtype: jnp.dtype) -> Params:
    """Unstack the blocks and cast matrices to the compute dtype once, as each use would; norms are float32 and stay."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim > 1 else leaf, unstack(params))


@cache
def _programs(config: ModelConfig, compute: ComputeConfig) -> tuple[Callable, Callable, Callable]:
    """Return the jitted (prefill, step, loop) of a model; decoders of one process share what was compiled."""
    graphdef, _ = graph(config, compute, stacked=False)

    def run_prefill(params: Params, rows: Rows, slots: int, new_slots: int) -> State:
        return prefill(bind(graphdef, params), rows, slots, new_slots)

    def run_step(params: Params, state: State) -> State:
        return decode_step(bind(graphdef, params), state)

    def run_loop(params: Params, state: State, until: Int[Array, ""]) -> State:
        """Step until all rows are done or `until` tokens are written."""
        model = bind(graphdef, params)
        unfinished = lambda state: (state.step < until) & ~jnp.all(state.done)
        return jax.lax.while_loop(unfinished, lambda state: decode_step(model, state), state)

    return (
        jax.jit(run_prefill, static_argnames=("slots", "new_slots")),
        jax.jit(run_step, donate_argnums=1),
        jax.jit(run_loop, donate_argnums=1),
    )
