"""The inner product of attention: softmax(c q k) v under a mask, written for XLA.

Kernels take grouped heads, never repeat keys, and reduce in float32.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float

from jaxllm.layers import choice, context, cudnn, stream
from jaxllm.layers.cache import LayerCache
from jaxllm.layers.config import Kernel
from jaxllm.layers.masks import HIDDEN, CacheMask, CausalMask, CrossMask, LayerWindow, RowMask, Rule, segment_ids
from jaxllm.sharding import shards

# Rows are cut into about four blocks of queries of 64 to 128 rows; long rows get at most 16 blocks, so that the
# program does not grow with the sequence. Measured on CPU.
MIN_BLOCK, MAX_BLOCK, BLOCKS, MAX_BLOCKS = 64, 128, 4, 16
LONG = 4096  # from here on, the weights that the backward pass would keep are too many: see `stream`


class Scores(NamedTuple):
    """How scores are made of q k^T: times `scale`, then bent to below `softcap` if there is one; `kernel`: by what."""

    scale: float
    softcap: float | None = None
    kernel: Kernel = "auto"

    def of(self, products: Float[Array, "*B T S"]) -> Float[Array, "*B T S"]:
        """Return the scores of q k^T, float32."""
        return soft_cap(products * self.scale, self.softcap)


def soft_cap(x: Float[Array, "*B"], cap: float | None) -> Float[Array, "*B"]:
    """Return c tanh(x / c): x bent to stay between -c and c; x itself if there is no cap. Source: Gemma 2."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K U"], mask: RowMask,
    scores: Scores | None = None, sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N U"]:  # fmt: skip
    """Return the attention output of whole rows; values may have a width U of their own.

    Args:
      scores: None: q k^T / sqrt(H).
      sinks: a score per head that takes part in the softmax and has no value, so that weights sum to less than one.
        Source: OpenAI 2025 (gpt-oss); Xiao et al. 2023 (StreamingLLM), section 3.3.
    Raises:
      ValueError: `scores.kernel` cannot compute this.
    """
    scores = scores or Scores(q.shape[-1] ** -0.5)
    parts = context.parts(q.shape[1], k.shape[1])
    asked = choice.Asked(
        shards.platform(), q.dtype.name, max(q.shape[1], k.shape[1]), q.shape[3], v.shape[3],
        isinstance(mask, CrossMask) or mask.segments is not None, scores.softcap is not None, sinks is not None,
        getattr(mask, "bias", None) is not None, parts,
    )  # fmt: skip
    kernel = choice.choose(scores.kernel, asked)
    short = max(q.shape[1], k.shape[1]) <= LONG or asked.bias
    if kernel == "xla" and parts == 1 and short:
        return _attend_blocks(q, k, v, mask, scores, sinks)
    window = getattr(mask, "window", None)
    if isinstance(window, LayerWindow):
        attended = lambda window: attend(q, k, v, mask._replace(window=window), scores, sinks)
        return jax.lax.cond(window.on, lambda: attended(window.size), lambda: attended(None))
    rule = Rule(scores.scale, scores.softcap, isinstance(mask, CausalMask), window)
    function = _function(kernel, rule, parts)
    function = function if parts == 1 else functools.partial(context.attend, function)
    return _on_shards(function, parts, (q, k, v, *(segment_ids(mask) or (None, None)), sinks))


def _function(kernel: Kernel, rule: Rule, parts: int) -> Callable[..., Array]:
    """Return the attention of (q, k, v, segments, sinks), and of a device's share if `parts` of them share rows."""
    match kernel:
        case "cudnn":
            return lambda q, k, v, segments, _: cudnn.attend(q, k, v, segments, rule)
        case "splash":
            from jaxllm.layers import splash  # half a second, for TPUs alone

            return lambda *arrays: splash.attend(*arrays[:5], rule, *arrays[5:])
    return functools.partial(stream.attend if parts == 1 else context.attend_xla, rule=rule)


def _on_shards(function: Callable[..., Array], parts: int, arrays: tuple[Array | None, ...]) -> Array:
    """Run a kernel on each device's rows, heads and, if `parts` devices share rows, part of them."""
    q, k, v, *rest = arrays
    if shards.spec(("heads",), q.shape[2:3]) != shards.spec(("kv_heads",), k.shape[2:3]):  # too few to be split
        k, v = (jnp.repeat(x, q.shape[2] // k.shape[2], axis=2) for x in (k, v))
    length = "length" if parts > 1 else None
    axes = [("batch", length, heads, None) for heads in ("heads", "kv_heads", "kv_heads")]
    pack = lambda q, k, v, own, others, sinks: function(q, k, v, None if own is None else (own, others), sinks)
    return shards.on_shards(pack, (q, k, v, *rest), (*axes, ("batch", None), ("batch", None), ("heads",)))


def _attend_blocks(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K U"], mask: RowMask, scores: Scores,
    sinks: Float[Array, "N"] | None,
) -> Float[Array, "B T N U"]:  # fmt: skip
    """Return the attention output of rows that are not long.

    Each block of queries only meets the keys that the mask lets it see; under a causal mask these are those from its
    window's start up to its own end: at most half of the work of a full square, and exactly the same sums for what is
    visible.
    """
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(1, k.shape[2], -1, 1, 1)
    q = rearrange(q, "B T (K G) H -> B K G T H", K=k.shape[2])
    k, v = (rearrange(x, "B S K H -> B K S H") for x in (k, v))
    bias = getattr(mask, "bias", None)
    bias = None if bias is None else rearrange(bias, "(K G) T S -> K G T S", K=k.shape[1])
    outputs = []
    for start, stop in query_blocks(q.shape[3]):
        seen = mask.keys(slice(start, stop)) if isinstance(mask, CausalMask) else slice(0, k.shape[2])
        visible = mask.dense(slice(start, stop), seen)
        near = None if bias is None else bias[:, :, start:stop, seen]
        part = q[:, :, :, start:stop], k[:, :, seen], v[:, :, seen]
        outputs.append(_attend_block(*part, visible, near, sinks, scores))
    return rearrange(jnp.concatenate(outputs, axis=3), "B K G T H -> B T (K G) H")


def query_blocks(length: int) -> list[tuple[int, int]]:
    """Return (start, stop) of each block of queries: 300 -> (0, 75), (75, 150), (150, 225), (225, 300)."""
    block = max(min(max(length // BLOCKS, MIN_BLOCK), MAX_BLOCK), -(-length // MAX_BLOCKS))
    return [(start, min(start + block, length)) for start in range(0, length, block)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _attend_block(
    q: Array, k: Array, v: Array, visible: Array, bias: Array | None, sinks: Array | None, scores: Scores
) -> Array:
    """Attention of one block; q is [B, K, G, T, H], k and v are [B, K, S, H], `visible` is bool [B or 1, T, S].

    `bias`, float32 [K, G, T, S], is added to the scores; `sinks` are float32 [1, K, G, 1, 1].

    With s = c q k^T, e = exp(s - max), r = 1 / sum_s e and o = r (e v), the gradient is, for p = r e,
    dv = p^T do and ds = p (do v^T - sum_h(do o)): the softmax's sum over the keys becomes one over the H values of a
    head. That of a sink is the same for a value of zero. Source: Dao et al. 2022 (FlashAttention), appendix B.2.
    """
    return _block_forward(q, k, v, visible, bias, sinks, scores)[0]


def _exponentials(s: Float[Array, "*B S"], sinks: Array | None) -> tuple[Array, Array, Array | None]:
    """Return (e = exp(s - max), its sum over the keys and the sink, the sink's part of it)."""
    top = jnp.max(s, axis=-1, keepdims=True)
    top = top if sinks is None else jnp.maximum(top, sinks)
    weights = jnp.exp(s - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sinks is None:
        return weights, total, None
    sunk = jnp.exp(sinks - top)
    return weights, total + sunk, sunk


def _block_forward(
    q: Array, k: Array, v: Array, visible: Array, bias: Array | None, sinks: Array | None, scores: Scores
) -> tuple[Array, tuple[Array | None, ...]]:
    s = scores.of(jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32))
    bend = None if scores.softcap is None else (1.0 - (s / scores.softcap) ** 2).astype(v.dtype)  # tanh' = 1 - tanh^2
    s = s if bias is None else s + bias[None]
    s = jnp.where(visible[:, None, None, :, :], s, HIDDEN)
    weights, total, sunk = _exponentials(s, sinks)
    r = 1.0 / total
    weights = weights.astype(v.dtype)
    y = (jnp.einsum("bkgts,bksh->bkgth", weights, v, preferred_element_type=jnp.float32) * r).astype(v.dtype)
    return y, (q, k, v, weights, r, y, bend, bias, sunk)


def _block_backward(scores: Scores, residuals: tuple[Array | None, ...], dy: Array) -> tuple[Array | None, ...]:
    q, k, v, weights, r, y, bend, bias, sunk = residuals
    dy = (dy.astype(jnp.float32) * r).astype(v.dtype)
    inner = jnp.einsum("bkgth,bkgth->bkgt", dy, y, preferred_element_type=jnp.float32)[..., None]
    dv = jnp.einsum("bkgts,bkgth->bksh", weights, dy)
    dscores = jnp.einsum("bkgth,bksh->bkgts", dy, v, preferred_element_type=jnp.float32)
    dscores = weights * (dscores - inner)
    dbias = None if bias is None else jnp.sum(dscores, axis=0).astype(bias.dtype)
    dsinks = None if sunk is None else -jnp.sum(sunk * inner, axis=(0, 3), keepdims=True)
    dscores = dscores * scores.scale
    dscores = (dscores if bend is None else dscores * bend).astype(q.dtype)
    dq = jnp.einsum("bkgts,bksh->bkgth", dscores, k)
    return dq, jnp.einsum("bkgts,bkgth->bksh", dscores, q), dv, None, dbias, dsinks


_attend_block.defvjp(_block_forward, _block_backward)


def attend_cache(
    q: Float[Array, "B T N H"], cache: LayerCache, mask: CacheMask | CrossMask, scores: Scores | None = None,
    sinks: Float[Array, "N"] | None = None,
) -> Float[Array, "B T N H"]:  # fmt: skip
    """Return the attention output of new tokens over all that `cache` holds; `scores` and `sinks` as in `attend`.

    Latents are their own values: the output then has their width.
    """
    scores = scores or Scores(q.shape[-1] ** -0.5)
    batch, length, n_heads, head_dim = q.shape
    rows, slots, _ = cache.keys.shape
    shape = (batch, length, rows // batch, n_heads * batch // rows, head_dim)
    q = jnp.swapaxes(q.reshape(shape), 1, 2).reshape(rows, -1, head_dim)  # [R, T * G, H]
    keys, values = (x.astype(q.dtype) for x in (cache.keys, cache.keys if cache.values is None else cache.values))
    s = scores.of(jnp.einsum("rqh,rsh->rqs", q, keys, preferred_element_type=jnp.float32))
    s = s.reshape(batch, shape[2], length, shape[3], slots)
    if isinstance(mask, CacheMask) and mask.bias is not None:
        s = s + rearrange(mask.bias, "B (K G) T S -> B K T G S", K=shape[2])
    visible = mask.dense(slice(0, length), slice(0, slots))[:, None, :, None, :]
    sinks = None if sinks is None else sinks.astype(jnp.float32).reshape(1, shape[2], 1, -1, 1)
    weights, total, _ = _exponentials(jnp.where(visible, s, HIDDEN), sinks)
    probs = (weights / total).astype(q.dtype).reshape(rows, -1, slots)
    # The order of the operands is the layout of the product; jnp.einsum would swap them and transpose the cache.
    y = jax.lax.dot_general(probs, values, (((2,), (1,)), ((0,), (0,))))
    y = jnp.swapaxes(y.reshape(batch, shape[2], length, shape[3], head_dim), 1, 2)
    return y.reshape(batch, length, n_heads, head_dim)
