"""Multi-head attention with grouped key/value heads: the one attention of every family."""

from typing import Literal

import jax
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.layers import cache as kv
from jaxllm.layers.config import LayerNorm, RMSNorm
from jaxllm.layers.kernels import Scores, attend, attend_cache
from jaxllm.layers.linear import Projection, constant
from jaxllm.layers.masks import CacheMask, CrossMask, Mask
from jaxllm.layers.norms import Norm
from jaxllm.layers.positions import rotate
from jaxllm.sharding.rules import constrain


class Attention(nnx.Module):
    """y = concat_heads(softmax(q k^T / sqrt(H)) v) W_o, with q, k, v linear in x and K <= N key/value heads.

    Args:
      d_model: width of x and y.
      heads: (N, K, H): query heads, key/value heads and the width of a head; N must be a multiple of K.
      bias: on all four projections (GPT-2; True or "attention"), or on those of q, k and v ("qkv", Qwen2).
      qk_norm: the norm of queries and keys, over each head (Qwen3) or over all heads at once (OLMo-2); None: no norm.
      scores: how scores are made of products; None: divided by sqrt(H).
      sinks: the softmax has one more score, learned by head, whose weight goes to nothing.
      std: initial standard deviation of the projections of q, k and v, and of the output projection.
    Source: Vaswani et al. 2017; grouped heads: Ainslie et al. 2023.
    """

    def __init__(
        self, rngs: nnx.Rngs, *, d_model: int, heads: tuple[int, int, int],
        bias: bool | Literal["attention", "qkv"] = False,
        qk_norm: tuple[Literal["head", "width"], RMSNorm | LayerNorm] | None = None, scores: Scores | None = None,
        sinks: bool = False, std: tuple[float, float] = (0.02, 0.02),
    ):  # fmt: skip
        n_heads, n_kv_heads, head_dim = heads
        queries = {"heads": n_heads, "head_dim": head_dim}
        keys = {"kv_heads": n_kv_heads, "head_dim": head_dim}
        self.scores = scores
        self.q = Projection(rngs, {"embed": d_model}, queries, bias=bool(bias), std=std[0])
        self.k = Projection(rngs, {"embed": d_model}, keys, bias=bool(bias), std=std[0])
        self.v = Projection(rngs, {"embed": d_model}, keys, bias=bool(bias), std=std[0])
        self.o = Projection(rngs, queries, {"embed": d_model}, bias=bias in (True, "attention"), std=std[1])
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
            q, k, v = self.q(x), self.k(x), self.v(x)
            if self.q_norm is not None:
                q, k = _normalise(self.q_norm, q), _normalise(self.k_norm, k)
            if angles is not None:
                q, k = rotate(q, angles), rotate(k, angles)
            q = constrain(q, "batch", "length", "heads", None)
            k, v = (constrain(z, "batch", "length", "kv_heads", None) for z in (k, v))
            if cache is not None:
                cache = kv.update(cache, k, v, positions)
                if isinstance(mask, CacheMask):  # a causal mask with a cache is a prefill: x is all there is to see
                    return self.o(attend_cache(q, cache, mask, *self._how())), cache
            elif isinstance(mask, CacheMask):
                raise TypeError("CacheMask needs a cache; pass one, or a mask of whole rows")
            return self.o(attend(q, k, v, mask, *self._how())), cache

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
