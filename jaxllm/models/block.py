"""One layer of the decoder: attention and feed-forward with their norms and residuals."""

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.layers.attention import Attention
from jaxllm.layers.cache import LayerCache
from jaxllm.layers.config import Experts
from jaxllm.layers.ffn import Ffn
from jaxllm.layers.kernels import Scores
from jaxllm.layers.masks import CausalMask, Mask
from jaxllm.layers.moe import Moe, RouterSums
from jaxllm.layers.norms import Norm
from jaxllm.models.config import ModelConfig


class Block(nnx.Module):
    """x += attention(norm(x)); x += ffn(norm(x)), with the norms where `config.norm_placement` has them.

    Post-norm is the one of them that normalises the stream itself: x = norm(x + attention(x)); x = norm(x + ffn(x)).
    Source: Vaswani et al. 2017, section 3.1.

    The two projections that write into the residual stream start smaller by 1 / sqrt(2 L), so that its variance does
    not grow with depth; post-norm keeps it. Source: Radford et al. 2019 (GPT-2), section 2.3.
    """

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig):
        d_model, std = config.d_model, config.init_std
        self.post = config.norm_placement == "post"
        out_std = std if self.post else std * (2 * config.n_layers) ** -0.5
        before, after = config.norm_placement in ("pre", "sandwich"), config.norm_placement != "pre"
        self.parallel = config.parallel
        self.attention_norm = Norm(config.norm, d_model) if before else None
        self.attention = Attention(
            rngs, d_model=d_model, heads=(config.n_heads, config.kv_heads, config.head_width), bias=config.bias,
            qk_norm=None if config.qk_norm == "none" else (config.qk_norm, config.norm),
            scores=Scores(config.scale, config.score_softcap), std=(std, out_std),
        )  # fmt: skip
        self.attention_out_norm = Norm(config.norm, d_model) if after else None
        self.ffn_norm = Norm(config.norm, d_model) if before else None
        shape = {"d_model": d_model, "d_ff": config.d_ff, "std": std, "out_std": out_std}
        if isinstance(config.ffn, Experts):
            self.ffn = Moe(rngs, config.ffn, **shape)
        else:
            self.ffn = Ffn(rngs, config.ffn, bias=config.bias is True, **shape)
        self.ffn_out_norm = Norm(config.norm, d_model) if after else None

    def __call__(
        self, x: Float[Array, "B T D"], mask: Mask, angles: tuple[Array, Array] | None = None,
        cache: LayerCache | None = None, positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, RouterSums | None]:  # fmt: skip
        """Return (x after the layer, its cache with the new keys and values, what its router did if it has one)."""
        apply = lambda norm, x: x if norm is None else norm(x)
        attended, cache = self.attention(apply(self.attention_norm, x), mask, angles, cache, positions)
        if self.post:
            x = self.attention_out_norm(x + attended)
            y, sums = self._feed_forward(x, mask)
            return self.ffn_out_norm(x + y), cache, sums
        attended = apply(self.attention_out_norm, attended)
        read = x if self.parallel else x + attended
        y, sums = self._feed_forward(apply(self.ffn_norm, read), mask)
        y = apply(self.ffn_out_norm, y)
        return (x + attended + y if self.parallel else read + y), cache, sums

    def _feed_forward(self, x: Float[Array, "B T D"], mask: Mask) -> tuple[Float[Array, "B T D"], RouterSums | None]:
        if not isinstance(self.ffn, Moe):
            return self.ffn(x), None
        segments = mask.segments if isinstance(mask, CausalMask) else None
        return self.ffn(x, None if segments is None else segments != 0)  # all tokens count but padding
