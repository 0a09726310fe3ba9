"""Continue token rows with a key/value cache: token ids in, token ids out, text unknown.

A prompt is padded on the right to a bucket and written into a static cache in one pass; then each step adds one token
per row. The jitted loop and the Python stream run the same step over the same `State`. Shapes come in buckets (1, 1.5,
2, 3, 4, 6, 8 ... and rows in powers of two), so that few programs exist and all are reused.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxllm.inference.beam import Ranking, beam_search
from jaxllm.inference.layout import Layout, choose_layout, join, prepare
from jaxllm.inference.rules import Rules
from jaxllm.inference.sampling import Sampler, row_key, settings
from jaxllm.inference.search import Search
from jaxllm.inference.steps import Rows, State, decode_step, prefill
from jaxllm.models.accounting import param_count
from jaxllm.models.build import Params, bind, graph
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.sharding.config import MeshConfig
from jaxllm.sharding.mesh import make_mesh, on_mesh_of

MIN_LENGTH = 32  # tokens; smaller buckets save nothing
MIN_SPLIT_PARAMS = 8_000_000  # a smaller model is read faster than its parts are joined
PADDING_FLOPS, MAX_PADDING = 1e11, 1024  # that a stream reads, and tokens, rather than that another program is compiled
Found = TypeVar("Found")
CHECK_EVERY = 16  # tokens between two calls of `Limits.finished`, which runs on the host


class Request(NamedTuple):
    """One row to continue.

    Attributes:
      prompt: ids, for an encoder-decoder those of the target's beginning.
      sample: which of its several answers this is (0, 1, ...).
      source: ids that an encoder reads, for an encoder-decoder alone; or the latent of a VAE.
    """

    prompt: Sequence[int]
    sample: int = 0
    source: Sequence[int] | Sequence[float] = ()


class Limits(NamedTuple):
    """When a row ends.

    Attributes:
      max_new_tokens: most tokens added; fewer where the model's max_seq_len comes first, or, with the two sets of
        factors of LongRoPE, the end of the first set.
      stop_ids: a row ends with the first of these tokens.
      finished: called with a row's new tokens now and then; True ends the row (stop strings).
      rules: what no row may say.
    """

    max_new_tokens: int
    stop_ids: tuple[int, ...] = ()
    finished: Callable[[list[int]], bool] | None = None
    rules: Rules = Rules()

    def reason(self, tokens: list[int]) -> str:
        """Return "stop" for an answer that ended by itself, "length" for one that was cut."""
        if self.rules.ends is not None and len(tokens) >= self.max_new_tokens:
            return "length"
        ended = tokens[-1] in self.stop_ids or (self.finished is not None and self.finished(tokens))
        return "stop" if ended else "length"


class Completion(NamedTuple):
    """New tokens of one row (with the stop token), their log-probabilities, and "stop" or "length"."""

    tokens: list[int]
    logprobs: list[float]
    finish_reason: str


class Decoder:
    """A model ready to decode: parameters cut into layers, and its compiled programs.

    Args:
      params: stacked on L, as everywhere else; how they are held to decode, `layout.prepare` says.
      compute: resolved for the platform.
      max_rows: rows decoded at one time; more requests are taken in turns.
      vocab_size: ids of the tokenizer, where the model's table is larger.
    """

    def __init__(
        self, config: ModelConfig | Seq2SeqConfig, params: Params, compute: ComputeConfig, *, max_rows: int = 64,
        vocab_size: int | None = None,
    ):  # fmt: skip
        self.config = config
        self.vocab_size = config.vocab_size if vocab_size is None else vocab_size
        self.max_rows = max_rows
        n_params = sum(leaf.size for leaf in jax.tree.leaves(params))
        self._shortest = min(MAX_PADDING, int(PADDING_FLOPS / (2 * n_params)))  # a token takes two per parameter
        self._latent = config.latent.size if isinstance(config, ModelConfig) and config.latent else 0
        layout = choose_layout(params, compute)
        on_mesh = (on_mesh_of(params, program) for program in programs(config, compute, layout))
        self._prefill, self._step, self._advance, self._search = on_mesh
        self.params = on_mesh_of(params, prepare)(params, layout, compute.dtype)
        if layout.joined:
            apart = layout._replace(joined=False)
            self.params = join(bind(graph(config, compute, **apart._asdict())[0], self.params))

    def generate(self, requests: Sequence[Request], sampler: Sampler, limits: Limits) -> list[Completion]:
        """Answer every request, in order; impossible ones are refused as by `check`."""
        run = lambda batch: self._generate_batch(batch, sampler, limits)
        return self._in_turns(requests, limits, run, self.max_rows)

    def answer(
        self, requests: Sequence[Request], count: int, sampler: Sampler, limits: Limits, search: Search, begun: int = 0
    ) -> list[list[Completion]]:
        """Return `count` answers of each request: drawn, or of a search the best, the best first (`beam_search`).

        Args:
          sampler: of a search only its repetition penalty counts. limits: a search does not call `finished`.
          begun: tokens of each prompt that a search counts among the answer's.
        Raises:
          ValueError: as of `check`; count < 1 or more than a search finds; a search with a sampler that draws.
        """
        wide = search.num_beams > 1
        if count < 1 or (wide and count > search.num_beams):
            most = f" and at most num_beams={search.num_beams}" if wide else ""
            raise ValueError(f"num_samples={count} must be at least 1{most}")
        if wide and sampler.temperature > 0:
            raise ValueError(
                f"num_beams={search.num_beams} looks for the likeliest answer, and temperature={sampler.temperature} "
                "draws one; choose temperature 0, or 1 beam"
            )
        self.check(requests, limits)  # names prompts by the caller's own numbers
        if wide:
            run = lambda batch: self._search_batch(batch, sampler, limits, search, begun)
            found = self._in_turns(requests, limits, run, max(self.max_rows // search.num_beams, 1))
            return [answers[:count] for answers in found]
        each = [request._replace(sample=sample) for request in requests for sample in range(count)]
        drawn = self.generate(each, sampler, limits)
        return [drawn[i : i + count] for i in range(0, len(drawn), count)]

    def _in_turns(
        self, requests: Sequence[Request], limits: Limits, run: Callable[[list[Request]], list[Found]], at_once: int
    ) -> list[Found]:
        """Check requests and run them in batches; return what was found in their order."""
        self.check(requests, limits)
        # Similar lengths share a batch.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].prompt), len(requests[i].source)))
        found: dict[int, Found] = {}
        for start in range(0, len(order), at_once):
            chosen = order[start : start + at_once]
            found.update(zip(chosen, run([requests[i] for i in chosen]), strict=True))
        return [found[i] for i in range(len(requests))]

    def stream(self, request: Request, sampler: Sampler, limits: Limits) -> Iterator[Completion]:
        """Yield the answer token by token: completions of one token each, whose last has a finish_reason (else "").

        Shapes are coarser than those of `generate`: a conversation grows, and each of its answers is a stream.
        """
        self.check([request], limits)
        state = self._begin([request], sampler, limits, self._shortest)
        tokens: list[int] = []
        while True:
            done, count = bool(state.done[0]), int(state.counts[0])
            tokens.append(int(state.token[0]))
            logprob = float(state.logprobs[0, count - 1])
            done = done or (limits.finished is not None and limits.finished(tokens))
            yield Completion(tokens[-1:], [logprob], limits.reason(tokens) if done else "")
            if done:
                return
            state = self._step(self.params, state)

    def _generate_batch(self, requests: Sequence[Request], sampler: Sampler, limits: Limits) -> list[Completion]:
        """Answer at most `max_rows` requests, in one batch."""
        state = self._begin(requests, sampler, limits)
        if limits.finished is None:
            state = self._advance(self.params, state, np.int32(min(limits.max_new_tokens, self.config.max_seq_len)))
        ended = np.asarray(state.done)
        while not ended.all():
            state = self._advance(self.params, state, state.step + CHECK_EVERY)
            rows = _answers(state)[: len(requests)]
            ended = np.asarray(state.done).copy()
            ended[: len(rows)] |= [limits.finished(tokens) for tokens, _ in rows]
            state = state._replace(done=jnp.asarray(ended))
        answers = _answers(state)[: len(requests)]  # the state may have unused rows
        return [Completion(tokens, logprobs, limits.reason(tokens)) for tokens, logprobs in answers]

    def _search_batch(
        self, requests: Sequence[Request], sampler: Sampler, limits: Limits, search: Search, begun: int
    ) -> list[list[Completion]]:
        """Search in one batch."""
        prompts, lengths, rows, sources, slots, new_slots = self._padded(requests, sampler, limits)
        hurry, patient = search.early_stopping is True, search.early_stopping == "never" and search.length_penalty > 0
        norms = np.maximum(np.arange(new_slots + 1) + begun, 1.0) ** search.length_penalty
        ranking = Ranking(norms.astype(np.float32), *map(np.bool_, (hurry, patient, search.renormalize_logits)))
        sizes = (search.num_beams, slots, new_slots)
        found = jax.device_get(self._search(self.params, prompts, lengths, rows, ranking, sources, sizes=sizes))
        result = []
        for i, length in enumerate(lengths[: len(requests)]):
            lines = zip(found.history[i, :, length:].tolist(), found.logprobs[i].tolist(), found.counts[i], strict=True)
            lines = [(tokens[:n], logprobs[:n]) for tokens, logprobs, n in lines if n]
            result.append([Completion(*line, limits.reason(line[0])) for line in lines])
        return result

    def _begin(self, requests: Sequence[Request], sampler: Sampler, limits: Limits, shortest: int = 0) -> State:
        """Prefill `requests`; arguments as of `_padded`."""
        *inputs, slots, new_slots = self._padded(requests, sampler, limits, shortest)
        return self._prefill(self.params, *inputs, slots=slots, new_slots=new_slots)

    def _padded(self, requests: Sequence[Request], sampler: Sampler, limits: Limits, shortest: int = 0) -> tuple:
        """Return `requests` padded to buckets: prompts, their lengths, rows, sources, slots of cache and of answers.

        Args:
          shortest: > 0 asks for few shapes, powers of two from this length on.
        """
        lengths = [len(request.prompt) for request in requests]
        room = [min(limits.max_new_tokens, self.config.room(length)) for length in lengths]
        longest = self.config.max_seq_len
        sizes = list(zip(lengths, room, strict=True))
        if shortest:
            sizes = [(1 << (max(shortest, *lengths) - 1).bit_length(), limits.max_new_tokens)]
        prompt_slots = bucket(max(size for size, _ in sizes), longest)
        slots = max(prompt_slots, bucket(max(map(sum, sizes)), longest))
        batch = 1 << (len(requests) - 1).bit_length()
        prompts = np.zeros((batch, prompt_slots), np.int32)
        keys = np.zeros((batch, 2), np.uint32)
        for i, request in enumerate(requests):
            prompts[i, : lengths[i]] = request.prompt
            source = np.asarray(request.source, np.float32).view(np.int32) if self._latent else request.source
            keys[i] = row_key(sampler.seed, [*source, *request.prompt], request.sample)
        spare = batch - len(requests)
        n_ids = 4 * -(-max(len(limits.stop_ids), 1) // 4)
        stop_ids = np.full(n_ids, -1, np.int32)
        stop_ids[: len(limits.stop_ids)] = limits.stop_ids
        sources = self._sources(requests, batch)
        limit = np.asarray(room + [0] * spare, np.int32)
        rows = Rows(limit, stop_ids, np.int32(self.vocab_size), keys, settings(sampler), limits.rules)
        new_slots, lengths = bucket(max(new for _, new in sizes), longest), np.asarray(lengths + [1] * spare, np.int32)
        return prompts, lengths, rows, sources, slots, new_slots

    def _sources(self, requests: Sequence[Request], batch: int) -> tuple[np.ndarray, ...] | None:
        """Return what an encoder reads, padded, and 1 for tokens and 0 for padding; or latents; None: nothing."""
        if self._latent:
            latents = np.zeros((batch, self._latent), np.float32)
            latents[: len(requests)] = [request.source for request in requests]
            return (latents,)
        if not isinstance(self.config, Seq2SeqConfig):
            return None
        return padded([request.source for request in requests], batch, 1 << 30)

    def check(self, requests: Sequence[Request], limits: Limits) -> None:
        """Refuse what cannot be decoded, before anything is compiled.

        Raises:
          ValueError: a prompt is empty, too long for the model, or has an id outside the vocabulary.
        """
        if limits.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={limits.max_new_tokens} must be at least 1")
        vocab_size, longest = self.config.vocab_size, self.config.max_seq_len
        for i, (prompt, _, source) in enumerate(requests):
            if isinstance(self.config, Seq2SeqConfig):
                self._check_source(i, source)
            if self._latent and np.shape(source) != (self._latent,):
                raise ValueError(f"latent {i} has shape {np.shape(source)}; the model's are of {self._latent} numbers")
            if not 0 < len(prompt) < longest:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens; the model takes 1 to {longest - 1}, max_seq_len - 1"
                )
            if not 0 <= min(prompt) <= max(prompt) < vocab_size:
                raise ValueError(
                    f"prompt {i} has ids {min(prompt)} to {max(prompt)}, the vocabulary ends at {vocab_size - 1}; "
                    "encode it with the model's own tokenizer"
                )

    def _check_source(self, index: int, source: Sequence[int]) -> None:
        vocab_size, longest = self.config.vocab_size, self.config.encoder.max_seq_len
        if not 0 < len(source) <= longest or not 0 <= min(source) <= max(source) < vocab_size:
            raise ValueError(
                f"source {index} has {len(source)} tokens, ids {min(source, default=0)} to {max(source, default=0)}; "
                f"the encoder takes 1 to {longest} (max_seq_len) of ids below {vocab_size}"
            )


def tensor_mesh(config: ModelConfig) -> jax.sharding.Mesh | None:
    """Return a mesh of all devices that splits every product, or None: one device, or a small model."""
    if jax.device_count() == 1 or param_count(config) < MIN_SPLIT_PARAMS:
        return None
    return make_mesh(MeshConfig(data=1, tensor=-1))


def bucket(length: int, longest: int) -> int:
    """Round `length` up to 32, 48, 64, 96, 128, 192, ... tokens, at most `longest`.

    Example, longest = 1000: 5 -> 32, 33 -> 48, 200 -> 256, 900 -> 1000
    """
    power = max(MIN_LENGTH, 1 << (length - 1).bit_length())
    shorter = power * 3 // 4
    return min(longest, shorter if max(length, MIN_LENGTH + 1) <= shorter else power)


def padded(
    rows: Sequence[Sequence[int]], batch: int, longest: int, fill: int = 0
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Return `batch` rows, the last of which may be empty, filled up to a `bucket`; and 1 for tokens, 0 for padding."""
    tokens = np.full((batch, bucket(max(map(len, rows)), longest)), fill, np.int32)
    segments = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    return tokens, segments


def _answers(state: State) -> list[tuple[list[int], list[float]]]:
    """Read (tokens, logprobs) of every row from the device."""
    history, logprobs, counts, ends = jax.device_get((state.history, state.logprobs, state.counts, state.position + 1))
    rows = zip(history, logprobs, counts, ends, strict=True)
    return [(tokens[end - n : end].tolist(), logprobs[:n].tolist()) for tokens, logprobs, n, end in rows]


@cache
def programs(
    config: ModelConfig | Seq2SeqConfig, compute: ComputeConfig, layout: Layout
) -> tuple[Callable, Callable, Callable, Callable]:
    """Return (prefill, step, loop, beam search) of a model, compiled once; all decoders of one process share them."""
    graphdef, _ = graph(config, compute, **layout._asdict())

    def run_loop(params: Params, state: State, until: Int[Array, ""]) -> State:
        """Step until all rows are done or `until` tokens are written."""
        model = bind(graphdef, params)
        unfinished = lambda state: (state.step < until) & ~jnp.all(state.done)
        return jax.lax.while_loop(unfinished, lambda state: decode_step(model, state), state)

    run_prefill = lambda params, *rest, **sizes: prefill(bind(graphdef, params), *rest, **sizes)
    run_step = lambda params, state: decode_step(bind(graphdef, params), state)
    run_search = lambda params, *rest, sizes: beam_search(bind(graphdef, params), *rest, sizes)
    return (
        jax.jit(run_prefill, static_argnames=("slots", "new_slots")), jax.jit(run_step, donate_argnums=1),
        jax.jit(run_loop, donate_argnums=1), jax.jit(run_search, static_argnames="sizes"),
    )  # fmt: skip
