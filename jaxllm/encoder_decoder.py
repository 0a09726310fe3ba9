"""An encoder-decoder as one object: a text in, its translation or summary out.

model = jaxllm.load("t5-small")
model.generate(["translate English to German: That is good."], num_beams=4)[0].text
"""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.data.tokenizers.text_pairs import PairTokenizer
from jaxllm.data.tokenizers.text_pieces import TextPieces
from jaxllm.inference.decode import Limits, Request
from jaxllm.inference.sampling import Sampler
from jaxllm.inference.search import Search
from jaxllm.inference.text import TextStream, finisher
from jaxllm.models.build import Params, token_rows
from jaxllm.models.config import ComputeConfig
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.trained import Generation, Trained

MAX_NEW_TOKENS = 256  # where a checkpoint does not say


class EncoderDecoder(Trained):
    """A model with its tokenizer.

    Args, others as of `Trained`:
      stop_ids: tokens that end a target.
      forced: tokens that every target begins with, behind the start token (BART: <s>).
      asked: what generation is asked for, in the words of generation_config.json; read when it is needed.

    Attributes:
      search, sampler: what `asked` says; others may be set.
      is_chat: False; a text is read as it is.
    """

    is_chat = False

    def __init__(
        self, config: Seq2SeqConfig, params: Params, tokenizer: PairTokenizer | TextPieces, *, stop_ids: Sequence[int],
        forced: Sequence[int] = (), asked: Mapping[str, Any] | None = None, compute: ComputeConfig | None = None,
    ):  # fmt: skip
        super().__init__(config, params, tokenizer, tokenizer.size, compute)
        self.stop_ids, self.forced, self.asked = tuple(stop_ids), tuple(forced), dict(asked or {})

    def logits(
        self, tokens: Int[Array, "B S"], mask: Bool[Array, "B S"] | None = None, *, targets: Int[Array, "B T"],
        target_mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:  # fmt: skip
        """Return the decoder's next-token logits, float32.

        Args:
          mask, target_mask: True = token, False = padding; logits at padding mean nothing.
          targets: what the decoder reads: `config.start_token`, then the target without its last token.
        """
        segments = lambda x, mask: jnp.ones(x.shape, jnp.int32) if mask is None else jnp.asarray(mask).astype(jnp.int32)
        config = self.config
        tokens = token_rows(tokens, config.vocab_size, config.encoder.max_seq_len)
        targets = token_rows(targets, config.vocab_size, config.max_seq_len)
        return self._logits(self.params, tokens, targets, segments(tokens, mask), segments(targets, target_mask))

    @cached_property
    def _logits(self) -> Callable[..., Array]:
        return self._program(lambda model, *rows: model(*rows))

    @cached_property
    def search(self) -> Search:
        """How wide a target is searched, and what it may not say.

        Raises:
          ValueError: the checkpoint asks for something that is not computed here.
        """
        return Search.read(self.asked)[0]

    @cached_property
    def sampler(self) -> Sampler:
        """How tokens are chosen, or, of beams, which repetition is disfavoured; errors as of `search`."""
        return Search.read(self.asked)[1]

    def generate(
        self, texts: str | Sequence[str], *, max_new_tokens: int | None = None, sampler: Sampler | None = None,
        num_samples: int = 1, num_beams: int | None = None, length_penalty: float | None = None,
        stop: Sequence[str] = (), truncate: bool = False, **unknown: Any,
    ) -> list[Generation]:  # fmt: skip
        """Return `num_samples` targets of each text, of a search the best; those of a text stand together.

        Args:
          max_new_tokens: without the tokens that are forced; default: the checkpoint's, else 256.
          sampler: default: the checkpoint's, which mostly is the likeliest token.
          num_beams: search for the likeliest target among so many; default: the checkpoint's, 1 if `sampler` draws.
          length_penalty: of the search; default: the checkpoint's. What else it does, `search` says.
          stop: a target ends before the first of these strings.
          truncate: read the beginning of a text that is too long, instead of an error.
        Raises:
          ValueError: no texts, a text that is too long, num_samples < 1 or more than a search finds, a search with a
            sampler that draws, or the checkpoint asks for what is not computed here.
        """
        self._check_options(self.generate, unknown)
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            raise ValueError("no texts; give at least one")
        search, sampler = self._how(sampler, num_beams, length_penalty)
        limits, begin = self._limits(search, max_new_tokens, stop), [self.config.start_token, *self.forced]
        encoded = self.tokenizer.encode(texts, self.config.encoder.max_seq_len, truncate=truncate)
        requests = [Request(begin, source=each.ids) for each in encoded]
        found = self.decoder.answer(requests, num_samples, sampler, limits, search, len(self.forced))
        return self._generations(found, stop)

    def stream(
        self, text: str, *, max_new_tokens: int | None = None, sampler: Sampler | None = None,
        num_beams: int | None = None, stop: Sequence[str] = (), **unknown: Any,
    ) -> Iterator[str]:  # fmt: skip
        """Yield a target piece by piece; joined they are the text of `generate`. A search has all of it at its end."""
        self._check_options(self.stream, unknown)
        search, sampler = self._how(sampler, num_beams, None)
        if search.num_beams > 1:
            same = {"max_new_tokens": max_new_tokens, "sampler": sampler, "num_beams": num_beams, "stop": stop}
            return iter([self.generate(text, **same)[0].text])
        request = Request([self.config.start_token, *self.forced], source=self.encode(text))
        return self._stream(request, sampler, self._limits(search, max_new_tokens, stop), stop)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a source, with its special tokens, of any length."""
        return self.tokenizer.encode([text], sys.maxsize)[0].ids

    def save(self, directory: str | Path) -> None:
        """Write a run directory that `load`, `sample` and `tune` read: recipe, tokenizer, one checkpoint."""
        said = {"stop_ids": list(self.stop_ids), "forced": list(self.forced), "asked": self.asked}
        self._save(directory, self.tokenizer.original or self.tokenizer, **said)

    def _how(
        self, sampler: Sampler | None, num_beams: int | None, length_penalty: float | None
    ) -> tuple[Search, Sampler]:
        """Return what a call does: what it says, and for the rest what the checkpoint says."""
        sampler = self.sampler if sampler is None else sampler
        if num_beams is None and sampler.temperature > 0:
            num_beams = 1
        said = {"num_beams": num_beams, "length_penalty": length_penalty}
        said = {name: value for name, value in said.items() if value is not None}
        return Search.model_validate(self.search.model_dump() | said), sampler

    def _limits(self, search: Search, max_new_tokens: int | None, stop: Sequence[str]) -> Limits:
        begun = len(self.forced)
        if max_new_tokens is None:
            max_new_tokens = MAX_NEW_TOKENS if search.max_new_tokens is None else search.max_new_tokens - begun
        finished = finisher(self.tokenizer.decode, stop)
        return Limits(max_new_tokens, self.stop_ids, finished, search.rules(self.stop_ids, begun))

    def _text(self, stop: Sequence[str]) -> TextStream:
        return TextStream(_Characters(self.tokenizer), stop)


class _Characters:
    """Whole characters of arriving ids, as `Tokenizer.stream` gives them, of a tokenizer that only decodes rows."""

    def __init__(self, tokenizer: PairTokenizer | TextPieces):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._said = ""

    def push(self, token: int) -> str:
        """Return the characters that are final now; the bytes of the last one may not all be there."""
        self._ids.append(token)
        return self._release(self._tokenizer.decode(self._ids).rstrip("\ufffd"))

    def flush(self) -> str:
        return self._release(self._tokenizer.decode(self._ids))

    def _release(self, text: str) -> str:
        new = text[len(self._said) :]
        self._said += new
        return new
