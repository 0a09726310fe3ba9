"""One layer of the decoder: attention and feed-forward with their norms and residuals."""

from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.layers.attention import Attention, Heads
from jaxllm.layers.cache import LayerCache, Memory
from jaxllm.layers.config import Experts, Kernel, Rope
from jaxllm.layers.dropout import Drop
from jaxllm.layers.ffn import Ffn
from jaxllm.layers.kernels import Scores
from jaxllm.layers.linear import constant
from jaxllm.layers.masks import CausalMask, Mask
from jaxllm.layers.moe import Moe, RouterSums
from jaxllm.layers.norms import Norm
from jaxllm.layers.tpu import rows_in_order
from jaxllm.models.config import ModelConfig
from jaxllm.sharding.rules import constrain


class Block(nnx.Module):
    """x += attention(norm(x)); x += ffn(norm(x)), with the norms where `config.norm_placement` has them.

    Post-norm is the one of them that normalises the stream itself: x = norm(x + attention(x)); x = norm(x + ffn(x)).
    Source: Vaswani et al. 2017, section 3.1. With `config.residual_gate`, what is added to x is first multiplied by a
    learned number that starts at zero. Source: Bachlechner et al. 2020 (ReZero).

    The two projections that write into the residual stream start smaller by 1 / sqrt(2 L), so that its variance does
    not grow with depth; post-norm keeps it. Source: Radford et al. 2019 (GPT-2), section 2.3.

    Devices that split the products of a layer (mesh axis "tensor") split the rows of x between them: each normalises
    its part of a row, the parts are gathered for a product and what it puts out is summed and scattered in one, which
    moves as much as the sum alone. Source: Korthikanti et al. 2022, section 4.2.2.

    Args:
      kernel: `ComputeConfig.kernel`.
      cross: between the two, attend to a source (the decoder of an encoder-decoder).
    """

    def __init__(self, rngs: nnx.Rngs, config: ModelConfig, *, kernel: Kernel = "auto", cross: bool = False):
        std = config.init_std
        self.post = config.norm_placement == "post"
        out_std = std if self.post else std * (2 * config.n_layers) ** -0.5
        before = config.norm_placement in ("pre", "sandwich")
        after = config.norm_placement in ("out", "sandwich", "post")
        norm = lambda wanted: Norm(config.norm, config.d_model) if wanted else None
        gate = lambda: constant((1,), ("norm",), 0.0) if config.residual_gate else None
        self.parallel = config.parallel
        self.attention_norm = norm(before)
        self.attention = _attention(rngs, config, kernel, out_std)
        self.attention_out_norm, self.attention_gate = norm(after), gate()
        self.cross = cross
        if cross:
            self.cross_norm = norm(before)
            self.cross_attention = _attention(rngs, config, kernel, out_std)
            self.cross_out_norm, self.cross_gate = norm(after), gate()
        self.ffn_norm = norm(before)
        shape = {"d_model": config.d_model, "d_ff": config.d_ff, "bias": config.bias is True}
        kind = Moe if isinstance(config.ffn, Experts) else Ffn
        self.ffn = kind(rngs, config.ffn, **shape, std=std, out_std=out_std)
        self.ffn_out_norm, self.ffn_gate = norm(after), gate()

    def join(self) -> None:
        """Hold together what is multiplied by one input: fewer and larger matrices, for decoding."""
        self.attention.join()
        if isinstance(self.ffn, Ffn):
            self.ffn.join()

    def __call__(
        self, x: Float[Array, "B T D"], mask: Mask, angles: tuple[Array, Array] | None = None,
        cache: LayerCache | None = None, positions: Int[Array, "B T"] | None = None, memory: Memory | None = None,
        drop: Drop | None = None,
    ) -> tuple[Float[Array, "B T D"], LayerCache | None, RouterSums | None]:  # fmt: skip
        """Return (x after the layer, its cache with the new keys and values, what its router did if it has one).

        Args:
          memory: the source, for a layer that attends to one; the memory of `cache`, where there is a cache.
          drop: dropout of what each part of the layer adds to the stream.
        """
        drops = [None if drop is None else drop.at(part) for part in range(3)]
        attended, cache = self.attention(_whole(self.attention_norm, x), mask, angles, cache, positions)
        joined = self._join(x, attended, self.attention_out_norm, self.attention_gate, drops[0])
        if self.cross:
            read = self.cross_attention.read(_whole(self.cross_norm, joined), memory if cache is None else cache.memory)
            joined = self._join(joined, read, self.cross_out_norm, self.cross_gate, drops[1])
        y, sums = self._feed_forward(_whole(self.ffn_norm, x if self.parallel else joined), mask)
        return self._join(joined, y, self.ffn_out_norm, self.ffn_gate, drops[2]), cache, sums

    def _join(self, x: Array, y: Array, norm: Norm | None, gate: nnx.Param | None, drop: Drop | None) -> Array:
        """Add what a part of the layer puts out to the stream."""
        stream = ("batch", "stream", None)
        y = constrain(y, *stream)
        y = y if gate is None else y * gate[0].astype(y.dtype)
        y = y if self.post else _apply(norm, y)
        y = y if drop is None else drop(y)
        return rows_in_order(norm(x + y) if self.post else x + y, stream)

    def _feed_forward(self, x: Array, mask: Mask) -> tuple[Array, RouterSums | None]:
        if not isinstance(self.ffn, Moe):
            return self.ffn(x), None
        segments = mask.segments if isinstance(mask, CausalMask) else None
        return self.ffn(x, None if segments is None else segments != 0)  # all tokens count but padding


def _apply(norm: Norm | None, x: Array) -> Array:
    return x if norm is None else norm(x)


def _whole(norm: Norm | None, x: Array) -> Array:
    """Return what a part of the layer reads: normalised in parts of rows, then gathered once for all its products."""
    return constrain(_apply(norm, x), "batch", "length", None)


def _attention(rngs: nnx.Rngs, config: ModelConfig, kernel: Kernel, out_std: float) -> Attention:
    interleaved = isinstance(config.positions, Rope) and config.positions.interleaved
    heads = Heads(config.n_heads, config.kv_heads, config.head_width, config.mla, interleaved)
    return Attention(
        rngs, d_model=config.d_model, heads=heads, bias=config.bias,
        qk_norm=None if config.qk_norm == "none" else (config.qk_norm, config.norm),
        scores=Scores(config.scale, config.score_softcap, kernel), sinks=config.sinks, std=(config.init_std, out_std),
    )  # fmt: skip
