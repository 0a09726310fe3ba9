"""The golden fingerprint of a converted model: logits of a fixed prompt, kept beside it and checked at each load."""

from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Float

from jaxllm.core import files
from jaxllm.core.bucket import here
from jaxllm.models.config import ComputeConfig
from jaxllm.models.encoder_config import Embeddings, EncoderConfig
from jaxllm.models.seq2seq_config import Seq2SeqConfig

if TYPE_CHECKING:
    from jaxllm.huggingface import AnyLanguageModel

FILE_NAME = "golden.json"
KEPT = 256  # logits of the last token, evenly over the vocabulary
ROUNDING, ELSEWHERE = 1e-5, 1e-4  # of the largest logit: the same program twice, or on another machine


def logits(lm: "AnyLanguageModel") -> Float[np.ndarray, "V"]:
    """Return the logits after a fixed prompt of at most 16 tokens, in float32 whatever the model computes in.

    Of an encoder they are those of the last token, or of the labels; without a head, the last hidden state stands in.
    """
    config = lm.config
    pairs = isinstance(config, Seq2SeqConfig)
    ends = {"stop_ids": lm.stop_ids} if pairs else {}
    exact = type(lm)(config, lm.params, lm.tokenizer, compute=ComputeConfig(dtype="float32"), **ends)
    tokens = np.arange(1, 1 + min(16, config.max_seq_len, config.vocab_size - 1))[None]
    bare = isinstance(config, EncoderConfig) and isinstance(config.head, Embeddings)
    with jax.default_matmul_precision("highest"):
        said = (exact.hidden if bare else exact.logits)(tokens, **({"targets": tokens} if pairs else {}))
    return np.asarray(said).reshape(-1, said.shape[-1])[-1]


def compare(expected: Float[np.ndarray, "V"], other: "AnyLanguageModel") -> float:
    """Return how far the `logits` of another model, which may lack the last ids, are from the expected ones.

    Raises:
      ValueError: further than rounding can explain.
    """
    what = "what was written computes something else; this is a bug, please report it with the config.json"
    found = logits(other)
    return _distance(expected[: len(found)], found, ROUNDING, what)


def write(expected: Float[np.ndarray, "V"], directory: str | Path) -> None:
    """Keep the fingerprint of a model, some of its `logits`, in its directory."""
    files.write_json(here(directory) / FILE_NAME, {"logits": _sample(expected).tolist()})


def check(lm: "AnyLanguageModel", directory: str | Path) -> None:
    """Compare a model with the fingerprint in its directory, if there is one.

    Raises:
      ValueError: they differ by more than rounding can explain.
    """
    path = here(directory) / FILE_NAME
    if path.is_file():
        kept = np.asarray(files.read_json(path)["logits"], np.float32)
        what = f"{path}: the model no longer computes what it did when it was converted; convert it again"
        _distance(kept, _sample(logits(lm)), ELSEWHERE, what)


def _sample(logits: Float[np.ndarray, "V"]) -> Float[np.ndarray, "K"]:
    return logits[np.linspace(0, len(logits) - 1, min(KEPT, len(logits))).astype(int)]


def _distance(one: np.ndarray, other: np.ndarray, tolerance: float, what: str) -> float:
    difference = float(np.abs(one - other).max()) if one.shape == other.shape else np.inf
    if not difference <= tolerance * np.abs(one).max():
        raise ValueError(f"{what} (logits differ by up to {difference:.2e})")
    return difference
