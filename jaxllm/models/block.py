"""One layer of the decoder: attention and feed-forward, each normalised before and added after (pre-norm residual)."""

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.layers.attention import Attention
from jaxllm.layers.cache import LayerCache
from jaxllm.layers.ffn import Ffn
from jaxllm.layers.masks import Mask
from jaxllm.layers.norms import Norm
from jaxllm.models.config import ModelConfig


class Block(nnx.Module):
    """x += attention(norm(x)); x += ffn(norm(x)).

    The two projections that write into the residual stream start smaller by 1 / sqrt(2 L), so that its variance does
    not grow with depth. Source: Radford et al. 2019 (GPT-2), section 2.3.
    """

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig):
        d_model, std = config.d_model, config.init_std
        out_std = std * (2 * config.n_layers) ** -0.5
        heads = (config.n_heads, config.kv_heads, config.head_width)
        qk_norm = config.norm if config.qk_norm else None
        self.attention_norm = Norm(config.norm, d_model)
        self.attention = Attention(
            rngs, d_model=d_model, heads=heads, bias=config.bias, qk_norm=qk_norm, std=std, out_std=out_std
        )
        self.ffn_norm = Norm(config.norm, d_model)
        self.ffn = Ffn(rngs, config.ffn, d_model=d_model, d_ff=config.d_ff, bias=config.bias, std=std, out_std=out_std)

    def __call__(
        self, x: Float[Array, "B T D"], mask: Mask, angles: tuple[Array, Array] | None = None,
        cache: LayerCache | None = None, positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None]:  # fmt: skip
        """Return (x after the layer, the layer's cache with the new keys and values)."""
        attended, cache = self.attention(self.attention_norm(x), mask, angles, cache, positions)
        x = x + attended
        return x + self.ffn(self.ffn_norm(x)), cache
