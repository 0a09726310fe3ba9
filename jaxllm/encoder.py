"""An encoder as one object: texts in, vectors, labels or missing words out.

encoder = jaxllm.load("all-MiniLM-L6-v2")
encoder.embed(["a cat on a mat", "stock markets fell"])      # [2, 384], rows of length one
encoder.classify(["what a film"])[0].label
encoder.fill("Paris is the [MASK] of France.")[0].token
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxllm.data.tokenizers.text_pairs import PairTokenizer
from jaxllm.data.tokenizers.text_pieces import Encoded, Text
from jaxllm.inference.decode import padded
from jaxllm.models.build import Params, token_rows
from jaxllm.models.config import ComputeConfig
from jaxllm.models.encoder import TransformerEncoder
from jaxllm.models.encoder_config import Classes, Embeddings, EncoderConfig, MaskedLM
from jaxllm.models.heads import first_token
from jaxllm.trained import Trained

Pooling = Literal["mean", "first", "pooler"]
Tokens = Int[Array, "B T"]
Mask = Bool[Array, "B T"]


class Classification(NamedTuple):
    """The labels of one text.

    Attributes:
      label, probability: the likeliest. probabilities: of every label; they sum to one unless several may be right at
        once (`multi_label_classification`).
    """

    label: str
    probability: float
    probabilities: dict[str, float]


class Filling(NamedTuple):
    """A token for the place of the mask.

    Attributes:
      token: its text; id: its number. text: the whole text with it.
    """

    token: str
    probability: float
    id: int
    text: str


class Rows(NamedTuple):
    """A batch as the model takes it; segments are 1 for a token and 0 for padding."""

    tokens: Tokens
    segments: Tokens
    types: Tokens


class Encoder(Trained):
    """An encoder with its tokenizer; arguments as of `Trained`."""

    def __init__(
        self, config: EncoderConfig, params: Params, tokenizer: PairTokenizer, *, compute: ComputeConfig | None = None
    ):
        super().__init__(config, params, tokenizer, tokenizer.size, compute)

    def _kind(self) -> str:
        return f", {type(self.config.head).__name__}"

    def hidden(self, tokens: Tokens, mask: Mask | None = None, types: Tokens | None = None) -> Float[Array, "B T D"]:
        """Return hidden states after the last block.

        Args:
          mask: True = token, False = padding, on either side of a row; hidden states at padding mean nothing.
          types: which text of a pair a token belongs to; None: all to the first.
        Raises:
          ValueError: rows longer than max_seq_len, types that the model does not have.
        """
        return self._hidden(self.params, self._rows(tokens, mask, types))

    def logits(
        self, tokens: Tokens, mask: Mask | None = None, types: Tokens | None = None
    ) -> Float[Array, "B T V"] | Float[Array, "B C"]:
        """Return float32 logits: of the token at each place (masked LM), or of each label; arguments as of `hidden`.

        Raises:
          ValueError: the checkpoint has no such head, or as `hidden`.
        """
        if isinstance(self.config.head, Embeddings):
            raise ValueError("this checkpoint has no head that gives logits; use hidden or embed")
        return self._logits(self.params, self._rows(tokens, mask, types))

    def embed(
        self, texts: Text | Sequence[Text], *, pooling: Pooling = "mean", normalise: bool = True,
        truncate: bool = False, batch_size: int = 32,
    ) -> Float[np.ndarray, "N D"]:  # fmt: skip
        """Return one vector per text, float32.

        Args:
          texts: strings, or pairs of strings as tuples. What a text spells is text: "[SEP]" separates nothing.
          pooling: the mean of a text's hidden states, its first one, or what the checkpoint's pooler makes of that one.
          normalise: divide each vector by its length, so that products are cosines.
          truncate: read the beginning of a text that is too long, instead of an error.
          batch_size: most texts that are computed at one time.
        Raises:
          ValueError: no texts, a text that is too long, a pooling that the checkpoint does not have.
        """
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling={pooling!r}: known are {', '.join(get_args(Pooling))}")
        head = self.config.head
        if pooling == "pooler" and (isinstance(head, MaskedLM) or (isinstance(head, Embeddings) and not head.pooler)):
            raise ValueError("pooling='pooler': this checkpoint has no pooler; use 'mean' or 'first'")
        function = partial(self._pool, pooling=pooling)
        vectors = self._over(texts, function, truncate=truncate, batch_size=batch_size)
        if normalise:
            vectors /= np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)
        return vectors

    def classify(
        self, texts: Text | Sequence[Text], *, truncate: bool = False, batch_size: int = 32
    ) -> list[Classification]:
        """Return the labels of each text with their probabilities; arguments as of `embed`.

        Raises:
          ValueError: the checkpoint has no labels or gives plain values, or a text is too long.
        """
        head = self.config.head
        if not isinstance(head, Classes):
            other = "a masked language model: use fill, or embed" if isinstance(head, MaskedLM) else "without a head"
            raise ValueError(f"this checkpoint is {other}; classify needs one made for sequence classification")
        if head.problem == "regression":
            raise ValueError("this checkpoint gives values, not labels (problem_type regression); use logits")
        logits = self._over(texts, self._logits, truncate=truncate, batch_size=batch_size)
        several = head.problem == "multi_label_classification"
        found = []
        for row in np.asarray(jax.nn.sigmoid(logits) if several else jax.nn.softmax(logits, axis=-1)):
            best = int(row.argmax())
            probabilities = dict(zip(head.labels, row.tolist(), strict=True))
            found.append(Classification(head.labels[best], float(row[best]), probabilities))
        return found

    def fill(self, text: Text, *, top: int = 5) -> list[Filling]:
        """Return the likeliest tokens in the place of the mask, best first.

        Args:
          text: spells the tokenizer's mask (`tokenizer.mask`) once; other special tokens in it are special as well.
        Raises:
          ValueError: the checkpoint is no masked language model, the mask is not there once, the text is too long.
        """
        if not isinstance(self.config.head, MaskedLM):
            raise ValueError("this checkpoint is no masked language model; fill needs one")
        encoded = self.tokenizer.encode([text], self.config.max_seq_len, special=True)
        ids = encoded[0].ids
        places = [index for index, token in enumerate(ids) if token == self.tokenizer.mask_id]
        if len(places) != 1:
            raise ValueError(f"the text has the mask {self.tokenizer.mask!r} {len(places)} times; write it once")
        logits = self._logits(self.params, self._pad(encoded, 1))[0, places[0]]
        probabilities = np.asarray(jax.nn.softmax(logits))
        found = []
        for token in np.argsort(-probabilities[: self.tokenizer.size], kind="stable")[:top].tolist():
            word = self.tokenizer.decode([token], special=True).strip()
            whole = self.tokenizer.decode([*ids[: places[0]], token, *ids[places[0] + 1 :]]).strip()
            found.append(Filling(word, float(probabilities[token]), token, whole))
        return found

    def save(self, directory: str | Path) -> None:
        """Write a run directory that `load`, `tune` and `convert` read: recipe, tokenizer, one checkpoint."""
        self._save(directory, self.tokenizer.original or self.tokenizer)

    @cached_property
    def _hidden(self) -> Callable[[Params, Rows], Array]:
        return self._program(lambda model, rows: model.text_states(*rows))

    @cached_property
    def _logits(self) -> Callable[[Params, Rows], Array]:
        return self._program(lambda model, rows: model.logits(model.text_states(*rows), rows.segments))

    @cached_property
    def _pool(self) -> Callable[..., Array]:
        return self._program(_pooled, "pooling")

    def _rows(self, tokens: Array, mask: Array | None, types: Array | None) -> Rows:
        tokens = token_rows(tokens, self.config.stack.vocab_size, self.config.max_seq_len)
        segments = jnp.ones_like(tokens) if mask is None else jnp.asarray(mask, bool).astype(jnp.int32)
        types = jnp.zeros_like(tokens) if types is None else jnp.asarray(types, jnp.int32)
        if int(types.max()) >= self.config.n_types:
            raise ValueError(f"token type {int(types.max())}: the model has {self.config.n_types}, counted from 0")
        return Rows(tokens, segments, types)

    def _over(
        self, texts: Text | Sequence[Text], program: Callable[[Params, Rows], Array], *, truncate: bool, batch_size: int
    ) -> Float[np.ndarray, "N ..."]:
        """Run a program with one result per text over all texts, those of like length together."""
        texts = [texts] if isinstance(texts, str | tuple) else list(texts)
        if not texts or batch_size < 1:
            raise ValueError(f"{len(texts)} texts in batches of {batch_size}; give at least one text and one per batch")
        encoded = self.tokenizer.encode(texts, self.config.max_seq_len, truncate=truncate)
        results: dict[int, np.ndarray] = {}
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i].ids))  # long first: they need most memory
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            rows = self._pad([encoded[i] for i in indices], batch_size)
            found = np.asarray(program(self.params, rows), np.float32)
            results |= dict(zip(indices, found, strict=False))  # rows behind the last text are filling
        return np.stack([results[i] for i in range(len(texts))])

    def _pad(self, encoded: Sequence[Encoded], batch_size: int) -> Rows:
        """Return texts as one batch, in one of few shapes: each is a program of its own."""
        size, longest = min(batch_size, 1 << (len(encoded) - 1).bit_length()), self.config.max_seq_len
        tokens, segments = padded([each.ids for each in encoded], size, longest, self.tokenizer.pad_id)
        types, _ = padded([each.types for each in encoded], size, longest)
        # Some tokenizers count texts where the model has one type for all.
        return Rows(tokens, segments, types if self.config.n_types > 1 else np.zeros_like(types))


def _pooled(model: TransformerEncoder, rows: Rows, pooling: Pooling) -> Float[Array, "B D"]:
    """Return one vector per row, float32."""
    hidden = model.text_states(*rows)
    if pooling == "pooler":
        return model.pooled(hidden, rows.segments).astype(jnp.float32)
    if pooling == "first":
        return first_token(hidden, rows.segments)[:, 0].astype(jnp.float32)
    real = rows.segments.astype(jnp.float32)
    total = jnp.einsum("btd,bt->bd", hidden.astype(jnp.float32), real)
    return total / jnp.maximum(jnp.sum(real, axis=-1, keepdims=True), 1.0)
