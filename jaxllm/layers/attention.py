"""Multi-head attention with grouped key/value heads: the one attention of every family."""

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.layers import cache as kv
from jaxllm.layers.config import LayerNorm, RMSNorm
from jaxllm.layers.kernels import attend, attend_cache
from jaxllm.layers.linear import Projection
from jaxllm.layers.masks import CacheMask, CausalMask, Mask
from jaxllm.layers.norms import Norm
from jaxllm.layers.positions import rotate
from jaxllm.sharding.rules import constrain


class Attention(nnx.Module):
    """y = concat_heads(softmax(q k^T / sqrt(H)) v) W_o, with q, k, v linear in x and K <= N key/value heads.

    Args:
      d_model: width of x and y.
      heads: (N, K, H): query heads, key/value heads and the width of a head; N must be a multiple of K.
      bias: on all four projections (GPT-2).
      qk_norm: a norm over each head's query and key (Qwen3, OLMo-2), or None.
      std, out_std: initial standard deviation of the projections of q, k and v, and of the output projection.
    Source: Vaswani et al. 2017; grouped heads: Ainslie et al. 2023.
    """

    def __init__(
        self, rngs: nnx.Rngs, *, d_model: int, heads: tuple[int, int, int], bias: bool = False,
        qk_norm: RMSNorm | LayerNorm | None = None, std: float = 0.02, out_std: float = 0.02,
    ):  # fmt: skip
        n_heads, n_kv_heads, head_dim = heads
        queries = {"heads": n_heads, "head_dim": head_dim}
        keys = {"kv_heads": n_kv_heads, "head_dim": head_dim}
        self.q = Projection(rngs, {"embed": d_model}, queries, bias=bias, std=std)
        self.k = Projection(rngs, {"embed": d_model}, keys, bias=bias, std=std)
        self.v = Projection(rngs, {"embed": d_model}, keys, bias=bias, std=std)
        self.o = Projection(rngs, queries, {"embed": d_model}, bias=bias, std=out_std)
        self.q_norm = Norm(qk_norm, head_dim) if qk_norm else None
        self.k_norm = Norm(qk_norm, head_dim) if qk_norm else None

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
                q, k = self.q_norm(q), self.k_norm(k)
            if angles is not None:
                q, k = rotate(q, angles), rotate(k, angles)
            q = constrain(q, "batch", "length", "heads", None)
            k, v = (constrain(z, "batch", "length", "kv_heads", None) for z in (k, v))
            if cache is not None:
                cache = kv.update(cache, k, v, positions)
                if isinstance(mask, CacheMask):  # a causal mask with a cache is a prefill: x is all there is to see
                    return self.o(attend_cache(q, cache, mask)), cache
            elif not isinstance(mask, CausalMask):
                raise TypeError(f"{type(mask).__name__} needs a cache; pass one, or a CausalMask")
            return self.o(attend(q, k, v, mask)), cache
