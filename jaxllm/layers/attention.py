"""Multi-head attention with grouped key/value heads: the one attention of every family."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.layers import cache as kv
from jaxllm.layers.config import LatentAttention, LayerNorm, RMSNorm
from jaxllm.layers.kernels import Scores, attend, attend_cache
from jaxllm.layers.linear import Projection, constant
from jaxllm.layers.masks import CacheMask, CrossMask, Mask
from jaxllm.layers.norms import Norm
from jaxllm.layers.positions import rotate
from jaxllm.sharding.rules import constrain


class Heads(NamedTuple):
    """What the heads of an attention are.

    Attributes:
      number, groups: of queries, and of keys and values. width: of one head, of queries and keys.
      latent: how keys and values come from a latent, if they do.
      interleaved: `config.Rope.interleaved`.
    """

    number: int
    groups: int
    width: int
    latent: LatentAttention | None = None
    interleaved: bool = False


class Compression(nnx.Module):
    """(norm(c), rest) with [c, rest] = x W + b: a narrow vector, and what goes with it as it is."""

    def __init__(self, rngs: nnx.Rngs, d_model: int, widths: tuple[int, int], *, bias: bool, std: float):
        self.down = Projection(rngs, {"embed": d_model}, {"latent": sum(widths)}, bias=bias, std=std)
        self.norm = Norm(RMSNorm(), widths[0])

    def __call__(self, x: Float[Array, "B T D"]) -> tuple[Float[Array, "B T C"], Float[Array, "B T rest"]]:
        narrow, rest = jnp.split(self.down(x), [self.norm.scale.shape[-1]], axis=-1)
        return self.norm(narrow), rest


class Attention(nnx.Module):
    """y = concat_heads(softmax(q k^T / sqrt(H)) v) W_o, with q, k, v linear in x and K <= N key/value heads.

    Args:
      d_model: width of x and y.
      heads: of `Heads`, or the first of its fields: (N, K, H); N must be a multiple of K.
      bias: on all four projections (GPT-2; True or "attention"), or on those of q, k and v ("qkv", Qwen2). With a
        latent, which is what is read of x, it has the bias in their place.
      qk_norm: the norm of queries and keys, over each head (Qwen3) or over all heads at once (OLMo-2); None: no norm.
      scores: how scores are made of products; None: divided by sqrt(H).
      sinks: the softmax has one more score, learned by head, whose weight goes to nothing.
      std: initial standard deviation of the projections of q, k and v, and of the output projection.
    Source: Vaswani et al. 2017; grouped heads: Ainslie et al. 2023.
    """

    def __init__(
        self, rngs: nnx.Rngs, *, d_model: int, heads: Heads | tuple[int, int, int],
        bias: bool | Literal["attention", "qkv"] = False,
        qk_norm: tuple[Literal["head", "width"], RMSNorm | LayerNorm] | None = None, scores: Scores | None = None,
        sinks: bool = False, std: tuple[float, float] = (0.02, 0.02),
    ):  # fmt: skip
        self.heads = Heads(*heads)
        n_heads, n_kv_heads, head_dim, latent, _ = self.heads
        self.scores = scores or Scores(head_dim**-0.5)
        q_latent = kv_latent = None
        kv_reads, key_dim, value_dim = {"embed": d_model}, head_dim, head_dim
        if latent is not None:
            compress = lambda *widths: Compression(rngs, d_model, widths, bias=bool(bias), std=std[0])
            kv_latent, kv_reads = compress(latent.rank, latent.rotated), {"latent": latent.rank}
            key_dim, value_dim = head_dim - latent.rotated, latent.value_dim
            if latent.query_rank is not None:
                q_latent = compress(latent.query_rank, 0)
        self.q_latent, self.kv_latent = q_latent, kv_latent
        make = lambda *axes: Projection(rngs, *axes, bias=bool(bias) and latent is None, std=std[0])
        queries = {"heads": n_heads, "head_dim": head_dim}
        self.q = None if q_latent else make({"embed": d_model}, queries)
        self.q_up = make({"latent": latent.query_rank}, queries) if q_latent else None
        self.k = make(kv_reads, {"kv_heads": n_kv_heads, "head_dim": key_dim})
        self.v = make(kv_reads, {"kv_heads": n_kv_heads, "head_dim": value_dim})
        values = {"heads": n_heads, "head_dim": value_dim}
        self.o = Projection(rngs, values, {"embed": d_model}, bias=bias in (True, "attention"), std=std[1])
        self.sinks = constant((n_heads,), ("heads",), 0.0) if sinks else None
        over, norm = qk_norm or (None, None)
        self.q_norm = Norm(norm, head_dim if over == "head" else n_heads * head_dim) if norm else None
        self.k_norm = Norm(norm, head_dim if over == "head" else n_kv_heads * head_dim) if norm else None

    def __call__(
        self, x: Float[Array, "B T D"], mask: Mask, angles: tuple[Array, Array] | None = None,
        cache: kv.LayerCache | None = None, positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], kv.LayerCache | None]:  # fmt: skip
        """Attend within x (no cache), or write x into `cache` at `positions` and attend to what the cache holds.

        Args:
          angles: (cos, sin) of `rope_angles`, or None for models without rotary positions.
        Returns:
          (output, cache with the new keys and values).
        """
        with jax.named_scope("attention"):
            q, *stored = self._project(x, angles) if self.kv_latent is None else self._compress(x, angles)
            if cache is not None:
                cache = kv.update(cache, *stored, positions)
                if isinstance(mask, CacheMask):  # a causal mask with a cache is a prefill: x is all there is to see
                    read = attend_cache if self.kv_latent is None else self._attend_latents
                    return self.o(read(q, cache, mask, *self._how())), cache
            elif isinstance(mask, CacheMask):
                raise TypeError("CacheMask needs a cache; pass one, or a mask of whole rows")
            k, v = stored if self.kv_latent is None else self._expand(stored[0])
            # Split by heads up to here: the output may be split by rows.
            return self.o(constrain(attend(q, k, v, mask, *self._how()), "batch", "length", "heads", None)), cache

    def join(self) -> None:
        """Hold k and v in q, as one projection."""
        if self.kv_latent is None:
            self.q.join(self.k, self.v)
            self.k = self.v = None

    def _project(self, x: Float[Array, "B T D"], angles: tuple[Array, Array] | None) -> tuple[Array, Array, Array]:
        """Return queries, keys and values."""
        if self.k is None:
            n_heads, n_kv_heads, head_dim, *_ = self.heads
            joined = rearrange(self.q(x), "B T (N H) -> B T N H", H=head_dim)
            q, k, v = jnp.split(joined, [n_heads, n_heads + n_kv_heads], axis=2)
        else:
            q, k, v = self.q(x), self.k(x), self.v(x)
        if self.q_norm is not None:
            q, k = _normalise(self.q_norm, q), _normalise(self.k_norm, k)
        if angles is not None:
            q, k = (rotate(z, angles, interleaved=self.heads.interleaved) for z in (q, k))
        q = constrain(q, "batch", "length", "heads", None)
        return q, *(constrain(z, "batch", "length", "kv_heads", None) for z in (k, v))

    def _compress(self, x: Float[Array, "B T D"], angles: tuple[Array, Array] | None) -> tuple[Array, Array, None]:
        """Return queries, latents [B, T, 1, C] with the rotated part of keys as their end, and no values."""
        latent, rotated = self.kv_latent(x)
        plain, turned = self._cut(self.q(x) if self.q_latent is None else self.q_up(self.q_latent(x)[0]))
        latent, rotated = latent[:, :, None], rotated[:, :, None]
        if angles is not None:
            turned, rotated = (rotate(z, angles, interleaved=self.heads.interleaved) for z in (turned, rotated))
        q = constrain(jnp.concatenate([plain, turned], axis=-1), "batch", "length", "heads", None)
        return q, constrain(jnp.concatenate([latent, rotated], axis=-1), "batch", "length", None, None), None

    def _cut(self, x: Float[Array, "B T N H"]) -> list[Array]:
        """Cut queries, or latents, into what comes first and the rotated part."""
        return jnp.split(x, [x.shape[-1] - self.heads.latent.rotated], axis=-1)

    def _expand(self, latents: Float[Array, "B T 1 C"]) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N U"]]:
        """Return the keys and values of latents."""
        latent, rotated = self._cut(latents)
        k, v = self.k(latent[:, :, 0]), self.v(latent[:, :, 0])
        k = jnp.concatenate([k, jnp.broadcast_to(rotated, (*k.shape[:3], rotated.shape[-1]))], axis=-1)
        return tuple(constrain(z, "batch", "length", "kv_heads", None) for z in (k, v))

    def _attend_latents(
        self, q: Float[Array, "B T N H"], cache: kv.LayerCache, mask: CacheMask, *how: Scores | Array | None
    ) -> Float[Array, "B T N U"]:
        """Return what `attend` does of expanded latents, without expanding them.

        q (c W_k)^T = (q W_k^T) c^T and p (c W_v) = (p c) W_v: all heads attend to the one latent as key and value.
        Source: DeepSeek-V2, 2024, section 2.1.2.
        """
        plain, rotated = self._cut(q)
        k, v = (each.kernel[...].astype(q.dtype) for each in (self.k, self.v))
        q = jnp.concatenate([jnp.einsum("btnh,cnh->btnc", plain, k), rotated], axis=-1)
        latent = self._cut(attend_cache(q, cache, mask, *how))[0]  # the rest is the sum of keys' rotated parts
        return jnp.einsum("btnc,cnu->btnu", latent, v)

    def read(self, x: Float[Array, "B T D"], memory: kv.Memory) -> Float[Array, "B T D"]:
        """Attend from x to the source in `memory`."""
        with jax.named_scope("cross_attention"):
            q, mask = self.q(x), CrossMask(memory.segments, memory.targets)
            if isinstance(memory.states, kv.LayerCache):
                return self.o(attend_cache(q, memory.states, mask, *self._how()))
            return self.o(attend(q, self.k(memory.states), self.v(memory.states), mask, *self._how()))

    def _how(self) -> tuple[Scores | None, Array | None]:
        return self.scores, None if self.sinks is None else self.sinks[...]

    def remember(self, memory: kv.Memory) -> kv.Memory:
        """Return the source as the keys and values that this layer reads."""
        rows = lambda x: rearrange(x, "B S K H -> (B K) S H")
        states = kv.LayerCache(rows(self.k(memory.states)), rows(self.v(memory.states)))
        return memory._replace(states=states)


def _normalise(norm: Norm, x: Float[Array, "B T N H"]) -> Float[Array, "B T N H"]:
    """Apply a norm over each head or over all heads at once, whichever its width is."""
    if norm.scale.shape[-1] == x.shape[-1]:
        return norm(x)
    return norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
