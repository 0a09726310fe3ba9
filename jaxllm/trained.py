"""What trained models have in common as objects: parts, the texts of a decoder, saving; and what an answer is."""

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxllm.core import config as configs
from jaxllm.core import files
from jaxllm.core.bucket import here, named
from jaxllm.core.wording import count
from jaxllm.data.tokenizers.no_tokenizer import NoTokenizer
from jaxllm.inference.decode import Completion, Decoder, Limits, Request
from jaxllm.inference.sampling import Sampler
from jaxllm.inference.text import TextStream, cut
from jaxllm.models.build import AnyConfig, Params, bind, check_vocabulary, graph
from jaxllm.models.config import ComputeConfig
from jaxllm.models.encoder_config import EncoderConfig
from jaxllm.sharding.mesh import on_mesh_of

MAX_SHOWN = 300  # characters of an answer, where it is shown as an object


class Generation(NamedTuple):
    """One answer.

    Attributes:
      text: without special tokens, cut before a stop string.
      tokens: all new ids, with the stop token or those of the stop string; logprobs: of each, at temperature 1.
      finish_reason: "stop" (a stop token or string) or "length" (max_new_tokens, or the model's max_seq_len).
      prompt: index of its prompt; sample: which of the prompt's answers.
    """

    text: str
    tokens: list[int]
    logprobs: list[float]
    finish_reason: str
    prompt: int = 0
    sample: int = 0

    def __repr__(self) -> str:
        text = self.text if len(self.text) <= MAX_SHOWN else self.text[:MAX_SHOWN] + "..."
        return f"Generation({text!r}, {count(len(self.tokens), 'token')}, {self.finish_reason!r})"


class Trained:
    """Base of what `jaxllm.load` returns.

    Args:
      params: blocks stacked on L, as training leaves them.
      vocab_size: ids of the tokenizer.
      compute: precision; default: what suits this machine.
    Raises:
      ValueError: the tokenizer has more ids than the model.
    """

    def __init__(
        self, config: AnyConfig, params: Params, tokenizer: Any, vocab_size: int, compute: ComputeConfig | None
    ):
        check_vocabulary(vocab_size, config.vocab_size)
        self.config, self.params, self.tokenizer = config, params, tokenizer
        self._vocab_size = vocab_size
        self.compute = (compute or ComputeConfig()).resolve(jax.default_backend(), config.n_layers)

    def __repr__(self) -> str:
        leaves = jax.tree.leaves(self.params)
        size = sum(leaf.size for leaf in leaves)
        return f"{type(self).__name__}({size:,} parameters in {leaves[0].dtype}{self._kind()})"

    def _kind(self) -> str:
        """Say what else there is to know of the model."""
        return ""

    def _program(self, function: Callable[..., Any], *static: str, **how: Any) -> Callable[..., Any]:
        """Return `function` of the model and arrays as one of parameters and arrays, compiled once for each shape.

        Args:
          static: names of its options. how: as of `graph`.
        """
        graphdef, _ = graph(self.config, self.compute, **how)
        run = lambda params, *rows, **options: function(bind(graphdef, params), *rows, **options)
        return on_mesh_of(self.params, jax.jit(run, static_argnames=static))

    def _save(self, directory: str | Path, tokenizer: Any, **meta: Any) -> None:
        """Write a run directory: recipe, tokenizer, and one checkpoint with `meta`.

        Raises:
          ValueError: the directory is not empty.
        """
        from jaxllm.data.loader import DataConfig, Source
        from jaxllm.recipe import FILE_NAME, Recipe
        from jaxllm.training.checkpoint import Checkpoints

        directory = here(directory)
        files.check_empty(directory)
        tokenizer.save(directory / "tokenizer")
        data = DataConfig(sources=(Source(path="not-recorded"),))  # a recipe needs one; nothing reads it from here
        recipe = Recipe(out=named(directory), model=self.config, data=data)
        files.write_text(directory / FILE_NAME, configs.dump(recipe))
        with Checkpoints(directory) as checkpoints:
            checkpoints.save(self.params, {"step": 0, **meta})

    @cached_property
    def decoder(self) -> Decoder:
        """The same model for token ids; made at the first use.

        Raises:
          TypeError: it writes no text.
        """
        if isinstance(self.config, EncoderConfig):
            raise TypeError("an encoder writes no text: it has no decoder")
        return Decoder(self.config, self.params, self.compute, vocab_size=self._vocab_size)

    def _check_options(self, method: Callable[..., Any], unknown: Mapping[str, Any]) -> None:
        """Raise TypeError for options that `method` does not have; those of a sampler are given as one."""
        if own := ", ".join(f"{name}={value!r}" for name, value in unknown.items() if name in Sampler.model_fields):
            raise TypeError(f"{own.partition('=')[0]} is of the sampler; give sampler=jaxllm.Sampler({own})")
        if unknown:
            known = [name for name in inspect.signature(method).parameters if name != "unknown"]
            near = difflib.get_close_matches(next(iter(unknown)), known, n=1) or known
            raise TypeError(f"unknown option {next(iter(unknown))!r}; did you mean {' or '.join(near)}?")

    def _text(self, stop: Sequence[str]) -> TextStream:
        """Return what makes text of arriving tokens."""
        return TextStream(self.tokenizer.stream(), stop)

    def _generations(self, found: Sequence[Sequence[Completion]], stop: Sequence[str]) -> list[Generation]:
        """Return the answers of each prompt, cut after the token that completes a stop string.

        The decoder looks for those only now and then.
        """
        answers = []
        for prompt, completions in enumerate(found):
            for sample, (tokens, logprobs, reason) in enumerate(completions):
                if stop:
                    text, length = cut(tokens, self._text(stop))
                    if length is not None:
                        tokens, logprobs, reason = tokens[:length], logprobs[:length], "stop"
                else:
                    text = "" if isinstance(self.tokenizer, NoTokenizer) else self.tokenizer.decode(tokens)
                answers.append(Generation(text, tokens, logprobs, reason, prompt, sample))
        return answers

    def _stream(self, request: Request, sampler: Sampler, limits: Limits, stop: Sequence[str]) -> Iterator[str]:
        """Yield an answer piece by piece."""
        text = self._text(stop)
        for completion in self.decoder.stream(request, sampler, limits._replace(finished=None)):
            if piece := text.push(completion.tokens[0]):
                yield piece
            if text.stopped:
                return
        if piece := text.flush():
            yield piece
