"""Next-token cross-entropy without the logits of a whole batch, as a sum over weighted tokens."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxllm.models.decoder import soft_cap
from jaxllm.sharding import shards
from jaxllm.sharding.rules import constrain

Sums = tuple[Float[Array, ""], Float[Array, ""]]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def cross_entropy(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], targets: Int[Array, "B T"],
    weights: Float[Array, "B T"], z: float, chunk: int, cap: float | None = None, smoothing: float = 0.0,
) -> Sums:  # fmt: skip
    """Return (loss, nats), both summed over tokens: divide after summing over microbatches and devices, never before.

    nats = sum_bt w_bt (log_z_bt - logits_bt[target_bt]),
    loss = (1 - e) nats + e / V sum_btv w_bt (log_z_bt - logits_bt[v]) + z sum_bt w_bt log_z_bt^2, for a smoothing e,
    with logits = hidden table^T, bent by `soft_cap` if there is a cap, and log_z = logsumexp over V.

    Only the logits of `chunk` positions exist at a time. The gradient is taken in the forward pass, while a chunk's
    logits are there: three products of logit size in all, where recomputing them in the backward pass takes four.
    Only `loss` is differentiable; `nats` is for reporting.

    Args:
      hidden, table: any float dtype; logits are reduced in float32, because bfloat16 cannot sum a 100k-way softmax.
      weights: >= 0; zero drops the token (padding, prompt, last of its segment).
      z: weight of the squared log-partition term. Source: PaLM, Chowdhery et al. 2022, section 5 (1e-4).
      chunk: most positions of a row per chunk; a row is cut into equal chunks.
      smoothing: share of the right answer that is spread over the vocabulary, in [0, 1). Source: Szegedy et al. 2016,
        section 7; Vaswani et al. 2017, section 5.4 (0.1).
    """
    table = _gathered(table, hidden)

    def body(sums: Sums, inputs: tuple) -> tuple[Sums, None]:
        hidden, targets, weights = inputs
        logits, log_z = _logits(hidden, table, cap)
        return _add(sums, logits, log_z, targets, weights, z, smoothing), None

    return jax.lax.scan(body, _zeros(), chunks((hidden, targets, weights), chunk))[0]


def token_nats(
    hidden: Float[Array, "B T D"], table: Float[Array, "V D"], targets: Int[Array, "B T"], chunk: int,
    cap: float | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:  # fmt: skip
    """Return -ln p of each target, what `cross_entropy` sums, and whether it is the likeliest token; its arguments."""

    table = _gathered(table, hidden)

    def body(_: None, inputs: tuple) -> tuple[None, tuple[Array, Array]]:
        logits, log_z = _logits(inputs[0], table, cap)
        return None, (log_z - _chosen(logits, inputs[1]), jnp.argmax(logits, axis=-1) == inputs[1])

    found = jax.lax.scan(body, None, chunks((hidden, targets), chunk))[1]
    return jax.tree.map(lambda x: whole(x, targets.shape[1]), found)


def _forward(hidden, table, targets, weights, z, chunk, cap, smoothing):
    """The sums, with the gradients of `loss` as residuals."""
    full_table = _gathered(table, hidden)
    rows, parts = shards.pieces("rows", hidden.shape[0]), shards.pieces("length", hidden.shape[1])
    own = lambda x: x.reshape(rows, -1, parts, x.shape[1] // parts, x.shape[2])  # what each device has of a chunk

    def body(carry: tuple, inputs: tuple) -> tuple[tuple, Array]:
        sums, table_gradient = carry
        hidden, targets, weights = inputs
        logits, log_z = _logits(hidden, full_table, cap)
        sums = _add(sums, logits, log_z, targets, weights, z, smoothing)
        probs = jnp.exp(logits - log_z[..., None])
        hit = jnp.arange(logits.shape[-1])[None, None, :] == targets[..., None]
        slope = weights * (1.0 + 2.0 * z * log_z)
        gradient = probs * slope[..., None] - jnp.where(hit, (1.0 - smoothing) * weights[..., None], 0.0)
        if smoothing:
            gradient -= smoothing / logits.shape[-1] * weights[..., None]
        if cap is not None:
            gradient *= 1.0 - (logits / cap) ** 2
        gradient = gradient.astype(hidden.dtype)
        # Each device sums what it has; all of them are summed once, after the last chunk. As [D, V], turned once: for
        # "vd", XLA on a CPU computes `gradient` a second time, in transposed order.
        part = jnp.einsum("pbctd,pbctv->pcdv", own(hidden), own(gradient), preferred_element_type=jnp.float32)
        table_gradient = constrain(table_gradient + part, "rows", "length", None, "vocab")
        return (sums, table_gradient), jnp.einsum("btv,vd->btd", gradient, full_table)

    start = (_zeros(), jnp.zeros((rows, parts, *table.shape[::-1]), jnp.float32))
    (sums, table_gradient), hidden_gradient = jax.lax.scan(body, start, chunks((hidden, targets, weights), chunk))
    table_gradient = constrain(jnp.sum(jnp.swapaxes(table_gradient, 2, 3), axis=(0, 1)), "vocab", "embed")
    return sums, (whole(hidden_gradient, hidden.shape[1]), table_gradient.astype(table.dtype))


def _backward(z, chunk, cap, smoothing, gradients, cotangents):
    hidden, table = (gradient * cotangents[0].astype(gradient.dtype) for gradient in gradients)
    return hidden, table, None, None


cross_entropy.defvjp(_forward, _backward)


def _zeros() -> Sums:
    return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)


def chunks(arrays: tuple[Array, ...], chunk: int) -> tuple[Array, ...]:
    """Cut [B, T, ...] to [n, B, c, ...], n = ceil(T / chunk) and c = ceil(T / n); B stays where it is sharded.

    What is missing at the end, fewer than n positions, is filled with zeros: tokens of weight 0.

    Of rows that devices share, each chunk has as many positions of every device's part.

    Example, chunk = 4: T = 8 -> 2 chunks of 4, T = 9 -> 3 of 3, T = 7 -> 2 of 4 with one position of padding
    """
    parts = shards.pieces("length", arrays[0].shape[1])
    length = arrays[0].shape[1] // parts
    count = -(-length // chunk)
    size = -(-length // count)

    def cut(x: Array) -> Array:
        rest = x.shape[2:]
        x = x.reshape(-1, length, *rest)  # [B * parts, T / parts]: a part is a row of its own
        if missing := count * size - length:
            x = jnp.pad(x, ((0, 0), (0, missing), *((0, 0),) * len(rest)))
        x = jnp.swapaxes(x.reshape(-1, count, size, *rest), 0, 1).reshape(count, -1, parts * size, *rest)
        return constrain(x, None, "rows", "length", *(None,) * len(rest))

    return tuple(cut(x) for x in arrays)


def whole(chunked: Float[Array, "n B c *D"], length: int) -> Float[Array, "B T *D"]:
    """Put together what was made of `chunks` of rows of a length."""
    parts, (count, batch, size, *rest) = shards.pieces("length", length), chunked.shape
    x = jnp.swapaxes(chunked.reshape(count, batch * parts, size // parts, *rest), 0, 1)
    return x.reshape(batch * parts, -1, *rest)[:, : length // parts].reshape(batch, length, *rest)


def _gathered(table: Float[Array, "V D"], hidden: Array) -> Float[Array, "V D"]:
    """Return the table in the type of what it is multiplied by, gathered once and not once per chunk."""
    return constrain(table.astype(hidden.dtype), "vocab", None)


def _logits(hidden: Float[Array, "B C D"], table: Float[Array, "V D"], cap: float | None) -> tuple[Array, Array]:
    logits = jnp.einsum("bcd,vd->bcv", hidden, table, preferred_element_type=jnp.float32)
    logits = soft_cap(logits, cap)
    return logits, jax.nn.logsumexp(logits, axis=-1)


def _add(sums: Sums, logits: Array, log_z: Array, targets: Array, weights: Array, z: float, smoothing: float) -> Sums:
    loss = nats = jnp.sum(weights * (log_z - _chosen(logits, targets)))
    if smoothing:
        loss = (1.0 - smoothing) * nats + smoothing * jnp.sum(weights * (log_z - jnp.mean(logits, axis=-1)))
    return sums[0] + loss + z * jnp.sum(weights * log_z**2), sums[1] + nats


def _chosen(logits: Array, targets: Array) -> Array:
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
