"""How probable a model finds text: nats per token, perplexity, and bits per byte, which compares across tokenizers.

What sums the nats of a batch is given as a function (`training.objectives.eval_step` with its parameters), so that the
loss here is the one that was trained.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, NamedTuple

from jaxllm.core.batch import Batch


class Likelihood(NamedTuple):
    """A mean over the weighted tokens of a text.

    Attributes:
      perplexity: exp(nats_per_token); infinite where that is too large for a float.
      tokens: how many were counted.
    """

    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    tokens: float


def bits_per_byte(nats: float, n_bytes: float) -> float:
    """Return nats / (ln 2 * n_bytes): the size a perfect compressor with this model would reach, in bits per byte.

    Example: a model that knows nothing of bytes, ln 256 nats for each, has 8.
    """
    return nats / (math.log(2) * n_bytes)


def evaluate_loss(
    batches: Iterable[Batch], sums: Callable[[Batch], Mapping[str, Any]], bytes_per_token: float,
    max_batches: int | None = None,
) -> tuple[Likelihood, list[Mapping[str, Any]]]:  # fmt: skip
    """Average over `batches`: all sums are added before the one division, so batches of any fill count alike.

    Args:
      batches: such as a `data.loader.Loader` of the validation split.
      sums: the "nats" and "tokens" (sum of weights) of a batch, scalars of any kind that float() takes.
      bytes_per_token: UTF-8 bytes per weighted token, as the loader knows it.
    Returns:
      (the mean, the sums of each batch).
    Raises:
      ValueError: no token has a weight.
    """
    nats, tokens, all_sums = 0.0, 0.0, []
    for batch in islice(batches, max_batches):
        all_sums.append(found := sums(batch))
        nats, tokens = nats + float(found["nats"]), tokens + float(found["tokens"])
    if not tokens:
        raise ValueError("there is no token to evaluate; give a validation split with text, and max_batches >= 1")
    mean = nats / tokens
    # math.exp raises above 709 nats, which a diverged model reaches
    perplexity = math.exp(mean) if mean < 700 else math.inf
    return Likelihood(mean, perplexity, bits_per_byte(nats, tokens * bytes_per_token), tokens), all_sums
