"""From logits to a token: penalty, temperature and filters, in this order, then one draw per row.

    repetition penalty -> what is banned -> temperature -> top-k -> top-p -> min-p -> Gumbel-max draw

(the order of Hugging Face and vLLM: top-p sees what top-k has left, renormalised). A filter that is off is absent from
the compiled program; the value of one that is on is an ordinary input, so that changing it never compiles again.

Nothing is sorted: a sort of 8k logits takes longer than the forward pass of a small model on a CPU. The thresholds are
found by bisection over the float32 numbers, which is exact after 32 halvings.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt
from pydantic import Field

from jaxllm.core.config import Config

MIN_TEMPERATURE = 1e-6  # below, the draw is greedy but for rounding errors of logits, and a division may overflow
_LOWEST, _HIGHEST = -(2**31) + 1, 2**31 - 1


class Sampler(Config):
    """How the next token is chosen from the model's distribution."""

    temperature: float = Field(0.8, ge=0, description="divides the logits; 0 = always the most likely token (greedy)")
    top_k: int | None = Field(None, ge=1, description="keep the k most likely tokens; none = all")
    top_p: float | None = Field(None, gt=0, le=1, description="keep the best tokens that sum to this probability")
    min_p: float | None = Field(None, ge=0, le=1, description="drop tokens below this share of the best probability")
    repetition_penalty: float = Field(1.0, gt=0, description="> 1 disfavours tokens of prompt and answer so far")
    seed: int = Field(0, description="same seed, prompt and sample number: same answer")


class Settings(NamedTuple):
    """A `Sampler` as inputs of a compiled program; None = the step does not exist in that program.

    Attributes:
      temperature: None = greedy, and the filters are dropped too (the most likely token passes all of them).
    """

    temperature: Float[Array, ""] | None = None
    top_k: Int[Array, ""] | None = None
    top_p: Float[Array, ""] | None = None
    min_p: Float[Array, ""] | None = None
    repetition_penalty: Float[Array, ""] | None = None


def settings(sampler: Sampler) -> Settings:
    """Turn `sampler` into program inputs, leaving out whatever does nothing."""
    penalty = None if sampler.repetition_penalty == 1 else np.float32(sampler.repetition_penalty)
    if sampler.temperature < MIN_TEMPERATURE:
        return Settings(repetition_penalty=penalty)
    return Settings(
        temperature=np.float32(sampler.temperature),
        top_k=None if sampler.top_k is None else np.int32(min(sampler.top_k, _HIGHEST)),
        top_p=None if sampler.top_p in (None, 1) else np.float32(sampler.top_p),
        min_p=None if sampler.min_p in (None, 0) else np.float32(sampler.min_p),
        repetition_penalty=penalty,
    )


def row_key(seed: int, prompt: Sequence[int], sample: int) -> UInt[np.ndarray, "2"]:
    """Return the raw key of one answer: the first 64 bits of SHA-256(seed, sample, prompt).

    It knows nothing of the batch, so an answer can be repeated alone; and two prompts of a batch never share noise.
    """
    digest = hashlib.sha256(f"{seed} {sample} ".encode() + np.asarray(prompt, np.int64).tobytes()).digest()
    return np.frombuffer(digest[:8], np.uint32).copy()


def choose(
    logits: Float[Array, "B V"], seen: Bool[Array, "B V"] | None, keys: UInt[Array, "B 2"], step: Int[Array, ""],
    settings: Settings, banned: Bool[Array, "B V"] | None = None,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:  # fmt: skip
    """Choose one token per row: argmax_v(filtered_v + Gumbel noise_v), which draws from softmax(filtered).

    Gumbel-max instead of a search in the cumulative distribution, because it is stable: a rounding error of 1e-7 in the
    logits (another batch size) changes one draw in a million, against one in a thousand.

    Args:
      logits: float32, as the model gives them.
      seen: tokens of the prompt and of the answer so far; only read by the repetition penalty.
      banned: tokens that may not be chosen.
      keys: of `row_key`; `step` is the index of the new token in the answer.
    Returns:
      (tokens int32, log-probabilities of these tokens under the unmodified model, temperature 1).
    Source: Gumbel 1954; Maddison et al. 2014, A* sampling, section 2.
    """
    scores = logits
    if settings.repetition_penalty is not None:
        scores = penalise(scores, seen, settings.repetition_penalty)
    if banned is not None:
        scores = jnp.where(banned, -jnp.inf, scores)
    if settings.temperature is not None:
        scores = filtered(scores / settings.temperature, settings)
        steps = jax.vmap(lambda key: jax.random.fold_in(jax.random.wrap_key_data(key), step))(keys)
        scores = scores + jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(steps)
    tokens = _first_best(scores)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    return tokens, chosen - jax.nn.logsumexp(logits, axis=-1)


def _first_best(scores: Float[Array, "B V"]) -> Int[Array, "B"]:
    """Return the argmax, of two plain reductions: XLA on a CPU makes one of pairs number by number."""
    ids = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    best = scores == jnp.max(scores, axis=-1, keepdims=True)
    return jnp.min(jnp.where(best, ids, ids[-1]), axis=-1)


def penalise(logits: Float[Array, "B V"], seen: Bool[Array, "B V"], penalty: Float[Array, ""]) -> Float[Array, "B V"]:
    """Divide positive and multiply negative logits of `seen` tokens by `penalty`.

    Source: Keskar et al. 2019 (CTRL), section 4.1, with the sign rule of Hugging Face: dividing a negative logit, as
    the paper's formula does, would favour the token.
    """
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered(logits: Float[Array, "B V"], settings: Settings) -> Float[Array, "B V"]:
    """Apply top-k, top-p and min-p; a dropped token gets -inf. The best token always stays; ties stay together.

    top-k keeps the k largest logits (Fan et al. 2018). top-p keeps the smallest set of most likely tokens whose
    probability reaches p (Holtzman et al. 2020). min-p keeps p_v >= min_p * max p (Nguyen et al. 2024).
    """
    if settings.top_k is not None:
        logits = _keep(logits, _ordered(logits), lambda kept: jnp.sum(kept, axis=-1) >= settings.top_k)
    if settings.top_p is not None:
        probs = jax.nn.softmax(logits, axis=-1)
        mass = lambda kept: jnp.sum(jnp.where(kept, probs, 0), axis=-1)
        logits = _keep(logits, _ordered(probs), lambda kept: mass(kept) >= settings.top_p)
    if settings.min_p is not None:
        best = jnp.max(logits, axis=-1, keepdims=True)
        logits = jnp.where(logits >= best + jnp.log(settings.min_p), logits, -jnp.inf)
    return logits


def _ordered(values: Float[Array, "B V"]) -> Int[Array, "B V"]:
    """Map float32 to int32 so that integers compare as the floats do (the IEEE 754 bit trick)."""
    bits = jax.lax.bitcast_convert_type(values.astype(jnp.float32), jnp.int32)
    return jnp.where(bits < 0, bits ^ _HIGHEST, bits)


def _keep(logits: Array, ranks: Int[Array, "B V"], enough: Callable[[Bool[Array, "B V"]], Bool[Array, "B"]]) -> Array:
    """Keep the smallest set {ranks >= threshold} that is `enough` (all, if none is); the rest becomes -inf."""

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low >> 1) + (high >> 1) + (low & high & 1)  # the mean without overflow
        good = enough(ranks >= middle[:, None])
        return jnp.where(good, middle, low), jnp.where(good, high, middle)

    start = (jnp.full(ranks.shape[:1], _LOWEST, jnp.int32), jnp.full(ranks.shape[:1], _HIGHEST, jnp.int32))
    threshold = jax.lax.fori_loop(0, 32, halve, start)[0]
    return jnp.where(ranks >= threshold[:, None], logits, -jnp.inf)
