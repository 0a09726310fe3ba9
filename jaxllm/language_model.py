"""A trained model as one object: text in, text out, with logits and parameters in reach.

lm = jaxllm.load("runs/quickstart")
lm.generate("Once upon a time", max_new_tokens=64)
lm.chat("Where is the ball?").text
lm.chat([{"role": "user", "content": "Where is the ball?"}], sampler=jaxllm.Sampler(temperature=0, seed=1)).text
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm import golden
from jaxllm.core.tree import named_leaves
from jaxllm.data.chat import encode_chat
from jaxllm.data.documents import Message
from jaxllm.data.tokenizers import text_pairs
from jaxllm.data.tokenizers import tokenizer as tokenizers
from jaxllm.data.tokenizers.tokenizer import Tokenizer
from jaxllm.inference.decode import Limits, Request
from jaxllm.inference.layout import choose_layout
from jaxllm.inference.sampling import Sampler
from jaxllm.inference.search import Search
from jaxllm.inference.text import finisher
from jaxllm.locate import is_huggingface, locate
from jaxllm.models.build import AnyConfig, Params, token_rows
from jaxllm.models.config import ComputeConfig, ModelConfig, is_vae
from jaxllm.models.decoder import Transformer
from jaxllm.models.encoder_config import EncoderConfig, MaskedLM
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.trained import Generation, Trained

if TYPE_CHECKING:
    from jaxllm.huggingface import AnyLanguageModel, Described
    from jaxllm.vae import VAE

Messages = Sequence[Mapping[str, str]]  # {"role": "system" | "user" | "assistant", "content": text}
Prompt = str | Messages | Sequence[int]


class LanguageModel(Trained):
    """A model with its tokenizer.

    Args, others as of `Trained`:
      chat: the model was taught to answer in the tokenizer's chat template; decides what `respond` does.
      stop_ids: tokens that end an answer, beside the tokenizer's eos.
      imported: it came with this vocabulary; else rows behind the tokenizer's are padding, which `export` leaves out.
    """

    def __init__(
        self, config: ModelConfig, params: Params, tokenizer: Tokenizer, *, chat: bool = False,
        compute: ComputeConfig | None = None, stop_ids: Sequence[int] = (), imported: bool = False,
    ):  # fmt: skip
        super().__init__(config, params, tokenizer, tokenizer.vocab_size, compute)
        self.is_chat, self.imported = chat, imported
        self.stop_ids = tuple(dict.fromkeys(each for each in (tokenizer.eos_id, *stop_ids) if each is not None))

    def logits(self, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"] | None = None) -> Float[Array, "B T V"]:
        """Return next-token logits, float32.

        Args:
          mask: True = token, False = padding, on either side of a row; logits at padding mean nothing.
        Raises:
          ValueError: no rows of one length, too long ones, ids that the model does not have.
        """
        tokens = token_rows(tokens, self.config.vocab_size, self.config.max_seq_len)
        mask = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask, bool)
        packed = choose_layout(self.params, self.compute).packed
        return self._logits(self.decoder.params if packed else self.params, tokens, mask)

    @cached_property
    def _logits(self) -> Callable[[Params, Array, Array], Array]:
        def logits(model: Transformer, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]) -> Float[Array, "B T V"]:
            segments = mask.astype(jnp.int32)
            return model(tokens, segments, jnp.maximum(jnp.cumsum(segments, axis=-1) - 1, 0))

        layout = choose_layout(self.params, self.compute)
        return self._program(logits, **(layout._asdict() if layout.packed else {}))

    def generate(
        self, prompts: Prompt | Sequence[Prompt], *, max_new_tokens: int = 256, sampler: Sampler = Sampler(),  # noqa: B008
        num_samples: int = 1, stop: Sequence[str] = (), num_beams: int = 1, length_penalty: float = 1.0, **unknown: Any,
    ) -> list[Generation]:  # fmt: skip
        """Continue or answer each prompt `num_samples` times; the answers of a prompt stand together, in its place.

        Args:
          prompts: a string is continued ("" is where a text begins), and so are ids, as they are; messages are answered
            in the chat template.
          sampler: temperature, top_k, seed ...: `jaxllm.Sampler(temperature=0)` always takes the likeliest token.
          stop: an answer ends before the first of these strings.
          num_beams, length_penalty: > 1 searches for the likeliest answers (`Search`), with a sampler of temperature 0.
        Raises:
          ValueError: a prompt that is neither text nor messages nor ids, or has no token or too many; num_samples < 1
            or more than a search finds, an empty stop string, a search with a sampler that draws; a damaged model.
        """
        self._check_options(self.generate, unknown)
        one = isinstance(prompts, str | Mapping) or not hasattr(prompts, "__len__")
        one = one or (len(prompts) > 0 and isinstance(prompts[0], Mapping | int | np.integer))
        rows = [self.encode(prompt) for prompt in ([prompts] if one else prompts)]
        limits = self._limits(max_new_tokens, stop)
        search = Search(num_beams=num_beams, length_penalty=length_penalty)
        found = self.decoder.answer([Request(row) for row in rows], num_samples, sampler, limits, search)
        if any(math.isnan(value) for completions in found for each in completions for value in each.logprobs):
            finite = lambda leaf: bool(jnp.isfinite(leaf).all())
            damaged = [name for name, leaf in named_leaves(self.params).items() if not finite(leaf)]
            why = (
                f"NaN or Inf in {', '.join(damaged[:4])}" if damaged else "numbers overflow; try compute.dtype=float32"
            )
            raise ValueError(f"the model's probabilities are NaN: {why}")
        return self._generations(found, stop)

    def chat(self, messages: Prompt, **options: Any) -> Generation:
        """Answer a conversation whose last message is the user's; a string is one message of theirs.

        Args:
          options: as of `generate`: max_new_tokens, sampler, stop ...
        """
        asked = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self.generate([asked], **options)[0]

    def respond(self, prompt: str, **options: Any) -> Generation:
        """Answer `prompt` as a user's message if the model was taught to (`is_chat`), else continue it as text."""
        return self.chat(prompt, **options) if self.is_chat else self.generate([prompt], **options)[0]

    def stream(
        self, prompt: Prompt, *, max_new_tokens: int = 256, sampler: Sampler = Sampler(), stop: Sequence[str] = (),  # noqa: B008
        **unknown: Any,
    ) -> Iterator[str]:  # fmt: skip
        """Yield the answer piece by piece: a string is continued, a list of messages is answered.

        The pieces joined are the text of `generate` or `chat`; characters and stop strings are never split.
        """
        self._check_options(self.stream, unknown)
        limits = self._limits(max_new_tokens, stop)
        return self._stream(Request(self.encode(prompt)), sampler, limits, stop)

    def nearest(self, text: str, count: int = 10) -> list[tuple[str, float]]:
        """Return the pieces whose embeddings point the same way as that of `text`, best first.

        Args:
          text: a word; of more than one token, the mean of their embeddings.
        Returns:
          (piece, cosine) of `count` pieces that are not of `text` themselves; special tokens have no piece.
        Raises:
          ValueError: no token in `text`, or count < 1.
        """
        ids = self.tokenizer.encode(text)
        if not ids or count < 1:
            raise ValueError(f"text={text!r} has {len(ids)} tokens, and count={count}; each must be at least 1")
        table = np.asarray(self.params["embed"]["table"], np.float32)[: self.tokenizer.vocab_size]
        table = table / np.maximum(np.linalg.norm(table, axis=-1, keepdims=True), 1e-30)
        cosines = table @ (center := table[ids].mean(axis=0)) / max(np.linalg.norm(center), 1e-30)
        # The pieces are read in order of their cosines, because only then it shows which are special or the text's own.
        found = ((self.tokenizer.token_bytes(i), cosines[i]) for i in np.argsort(-cosines).tolist() if i not in ids)
        pieces = ((piece.decode("utf-8", errors="replace"), float(cosine)) for piece, cosine in found if piece)
        return list(islice(pieces, count))

    def save(self, directory: str | Path) -> None:
        """Write a run directory that `load`, `sample` and `tune` read: recipe, tokenizer, one checkpoint."""
        said = {"chat": self.is_chat, "stop_ids": list(self.stop_ids), "imported": self.imported}
        self._save(directory, self.tokenizer, **said)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the ids that come before the answer: bos and the text, or the conversation in the template, or ids."""
        if isinstance(prompt, str):
            return [*self.tokenizer.prefix, *self.tokenizer.encode(prompt)]
        if isinstance(prompt, Sequence) and prompt and all(isinstance(each, int | np.integer) for each in prompt):
            return token_rows([prompt], self.config.vocab_size, self.config.max_seq_len)[0].tolist()
        if not isinstance(prompt, Sequence) or not all(isinstance(each, Mapping | Message) for each in prompt):
            messages = '[{"role": "user", "content": text}]'
            raise ValueError(f"a prompt is text, messages {messages} or ids, and not {str(prompt)[:60]!r}")
        if not prompt:
            raise ValueError("no messages; give at least one from the user")
        return encode_chat(self.tokenizer, prompt, add_generation_prompt=True)[0]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        return self.tokenizer.decode(tokens)

    def _kind(self) -> str:
        return ", chat" if self.is_chat else ", no chat"

    def _limits(self, max_new_tokens: int, stop: Sequence[str]) -> Limits:
        return Limits(max_new_tokens, self.stop_ids, finisher(self.tokenizer.decode, stop))


def load(
    model: "str | Path | Described", *, compute: ComputeConfig | None = None, mesh: jax.sharding.Mesh | None = None,
    text: bool = False,
) -> "AnyLanguageModel | VAE":  # fmt: skip
    """Load a run directory, one of its checkpoints (RUN/checkpoints/STEP), a directory whose run.json names the run, a
    Hugging Face directory, which may be that of an encoder, or a GGUF file.

    Args:
      model: a path, or what `locate.look` found there.
      mesh: devices to spread the parameters over, as in training; None: one device holds them all.
      text: whether a model without a tokenizer, which answers ids alone, is an error before its weights are read.
    Raises:
      ValueError: it is none of these; the message says what was looked for.
    """
    if not isinstance(model, str | os.PathLike | tuple):
        raise ValueError(f"model={model!r} is no path; give a run directory, a Hugging Face directory or a GGUF file")
    if isinstance(model, tuple) or is_huggingface(model):
        from jaxllm import huggingface

        return huggingface.load(model, compute=compute, mesh=mesh, text=text)
    from jaxllm.recipe import FILE_NAME, load_recipe
    from jaxllm.training.checkpoint import load_params
    from jaxllm.training.state import param_shardings

    run_dir, step = locate(model)
    recipe = load_recipe(run_dir / FILE_NAME)
    shardings = None if mesh is None else param_shardings(recipe.model, mesh)
    params, meta = load_params(run_dir, recipe.model, step=step, shardings=shardings)
    lm = of_run(recipe.model, params, run_dir / "tokenizer", meta, compute=compute or recipe.compute.elsewhere())
    if not is_vae(recipe.model):
        golden.check(lm, run_dir)
    return lm


def of_run(
    config: AnyConfig, params: Params, tokenizer: Path, meta: Mapping[str, Any], *, compute: ComputeConfig | None = None
) -> "AnyLanguageModel | VAE":
    """Return what a run has trained as the object that texts are asked of.

    Args:
      tokenizer: directory of it. meta: of a checkpoint; of it chat, stop_ids, imported, forced and asked are read.
    """
    from jaxllm.encoder import Encoder
    from jaxllm.encoder_decoder import EncoderDecoder
    from jaxllm.vae import VAE

    match config:
        case EncoderConfig():
            reader = text_pairs.load(tokenizer, mask=isinstance(config.head, MaskedLM))
            return Encoder(config, params, reader, compute=compute)
        case Seq2SeqConfig():
            reader = text_pairs.load_for_pairs(tokenizer)
            said = {name: meta[name] for name in ("forced", "asked") if name in meta}
            ends = meta.get("stop_ids") or [reader.eos_id]
            return EncoderDecoder(config, params, reader, stop_ids=ends, **said, compute=compute)
    pieces = tokenizers.load(tokenizer)
    if is_vae(config):
        return VAE(config, params, pieces, compute=compute)
    said = {"chat": bool(meta.get("chat")), "imported": bool(meta.get("imported"))}
    return LanguageModel(config, params, pieces, **said, compute=compute, stop_ids=meta.get("stop_ids", ()))
