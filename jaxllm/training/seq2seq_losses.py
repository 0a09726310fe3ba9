"""The loss of an encoder-decoder, as a sum over weighted tokens: divide after summing over microbatches and devices."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxllm.models.build import Params, bind, graph
from jaxllm.models.config import ComputeConfig
from jaxllm.models.seq2seq import Seq2Seq
from jaxllm.models.seq2seq_config import Seq2SeqConfig
from jaxllm.training.losses import Sums, chunks


class TextPairs(NamedTuple):
    """Sources and their targets, which may be packed: a target reads the source of its segment's number.

    Attributes:
      sources: int32 [B, S]; source_segments: 1, 2, ... per text, 0 = padding.
      inputs: int32 [B, T], what the decoder reads: the start token, then the target without its last token.
      targets: int32 [B, T], the token that follows each of `inputs`; weights: float32, 0 = not trained (padding).
      segments: int32 [B, T], of `inputs`.
    """

    sources: Int[Array, "B S"]
    source_segments: Int[Array, "B S"]
    inputs: Int[Array, "B T"]
    targets: Int[Array, "B T"]
    weights: Float[Array, "B T"]
    segments: Int[Array, "B T"]


def target_sums(
    params: Params, batch: TextPairs, config: Seq2SeqConfig, compute: ComputeConfig, smoothing: float = 0.0
) -> Sums:
    """Return (loss, nats) summed over the weighted tokens of the targets.

    nats = -sum_bt w_bt log p_bt[target_bt], and loss = (1 - e) nats - e / V sum_btv w_bt log p_bt[v] for a smoothing e:
    the cross-entropy with a target that is right with 1 - e and spreads e over the vocabulary. Only `loss` is trained.

    Only the logits of `compute.loss_chunk` positions exist at a time; the backward pass computes them again.
    Source: Szegedy et al. 2016, section 7; Vaswani et al. 2017, section 5.4 (e = 0.1).

    Raises:
      ValueError: smoothing is not in [0, 1).
    """
    if not 0.0 <= smoothing < 1.0:
        raise ValueError(f"smoothing={smoothing} must be at least 0 and below 1")
    model: Seq2Seq = bind(graph(config, compute)[0], params)
    hidden = model.states(batch.sources, batch.inputs, batch.source_segments, batch.segments)

    @jax.checkpoint
    def part(hidden: Array, targets: Array, weights: Array) -> Sums:
        log_probs = jax.nn.log_softmax(model.logits(hidden), axis=-1)
        chosen = jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        nats = -jnp.sum(weights * chosen)
        spread = -jnp.sum(weights * jnp.mean(log_probs, axis=-1)) if smoothing else 0.0
        return (1.0 - smoothing) * nats + smoothing * spread, nats

    def add(sums: Sums, inputs: tuple[Array, ...]) -> tuple[Sums, None]:
        loss, nats = part(*inputs)
        return (sums[0] + loss, sums[1] + nats), None

    with jax.named_scope("loss"):
        start = (jnp.zeros(()), jnp.zeros(()))
        return jax.lax.scan(add, start, chunks((hidden, batch.targets, batch.weights), compute.loss_chunk))[0]
