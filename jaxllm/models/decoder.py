"""The decoder-only Transformer: one class for Llama-type and GPT-type models, in training and in decoding.

Blocks are stacked on a leading L axis: one parameter layout in memory, on disk and in conversion tables. Decoding works
on the same parameters cut into layers (`unstack`), because a loop over a stacked array copies the weights per token.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.core import rng
from jaxllm.layers.cache import Cache
from jaxllm.layers.config import Learned
from jaxllm.layers.kernels import soft_cap
from jaxllm.layers.linear import PRODUCT, Embed, param
from jaxllm.layers.masks import CacheMask, CausalMask, Mask
from jaxllm.layers.moe import RouterSums
from jaxllm.layers.norms import Norm
from jaxllm.models.block import Block
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.models.views import Traits, Views, layer_traits
from jaxllm.sharding.rules import constrain

Params = dict[str, Any]  # nested plain dict of arrays, float32, blocks stacked on L
REMAT = {
    # By name: a policy for products does not see those inside of functions with gradients of their own.
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Transformer(nnx.Module):
    """Decoder-only Transformer. `stacked=False` holds the blocks one by one, for decoding."""

    def __init__(self, config: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs, *, stacked: bool = True):
        self.config = config
        self.compute = compute
        self.embed = Embed(rngs, config.vocab_size, config.d_model, std=config.init_std)
        learned = isinstance(config.positions, Learned)
        self.position_embed = (
            Embed(rngs, config.max_seq_len, config.d_model, axis="length", std=config.init_std) if learned else None
        )
        if stacked:
            build = nnx.vmap(
                lambda rngs: Block(rngs, config), transform_metadata={nnx.PARTITION_NAME: None, "axes": "layers"}
            )
            self.blocks = nnx.split_rngs(splits=config.n_layers)(build)(rngs)
        else:
            self.blocks = nnx.List([Block(rngs, config) for _ in range(config.n_layers)])
        self.final_norm = None if config.norm_placement == "post" else Norm(config.norm, config.d_model)
        table_shape = (config.vocab_size, config.d_model)
        self.head = None if config.tie_embeddings else param(rngs, table_shape, ("vocab", "embed"), config.init_std)

    def hidden(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], mask: Mask, cache: Cache | None = None
    ) -> tuple[Float[Array, "B T D"], Cache | None, RouterSums | None]:
        """Return (hidden states after the final norm, the cache with the new tokens, what the routers did without)."""
        dtype = jnp.dtype(self.compute.dtype)
        x = self.embed(tokens, dtype)
        if self.config.embed_scale is not None:
            x = x * jnp.asarray(self.config.embed_scale, dtype)
        if self.position_embed is not None:
            x = x + self.position_embed(positions, dtype)
        x = constrain(x, "batch", "length", None)  # right after the gather, which otherwise loses the batch's sharding
        views = Views(self.config, mask, positions)
        sums = None
        if cache is None:
            x, sums = self.run_blocks(x, views)
        else:
            updated = []
            for block, traits, layer in zip(self.blocks, layer_traits(self.config), cache, strict=True):
                x, layer, _ = block(x, *views.of(traits), layer, positions)
                updated.append(layer)
            cache = tuple(updated)
        return (x if self.final_norm is None else self.final_norm(x)), cache, sums

    def run_blocks(self, x: Array, views: Views) -> tuple[Array, RouterSums | None]:
        """Run the blocks without a cache: scanned, or unrolled from the same stacked parameters.

        Returns:
          (x, what the routers did, stacked on L).
        """

        def apply(x: Array, layer: tuple[Block, Traits]) -> tuple[Array, RouterSums | None]:
            block, traits = layer
            x, _, sums = block(x, *views.of(traits))
            return constrain(x, "batch", "length", None), sums

        if self.compute.remat != "none":
            apply = jax.checkpoint(apply, policy=REMAT[self.compute.remat], prevent_cse=False)
        traits = layer_traits(self.config)
        unroll = self.config.n_layers if self.compute.layers == "unroll" else 1
        if len(set(traits)) == 1:  # no layer differs: facts of the program, not data of the loop
            return jax.lax.scan(lambda x, block: apply(x, (block, traits[0])), x, self.blocks, unroll=unroll)
        stacked = Traits(*(jnp.asarray(values) for values in zip(*traits, strict=True)))
        return jax.lax.scan(apply, x, (self.blocks, stacked), unroll=unroll)

    def output_table(self) -> Float[Array, "V D"]:
        """Return the table of output vectors: logits are products of hidden states with its rows."""
        return self.embed.table[...] if self.head is None else self.head[...]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return float32 logits of hidden states."""
        table = self.output_table().astype(hidden.dtype)
        logits = jnp.einsum("btd,vd->btv", hidden, table, preferred_element_type=jnp.float32)
        return soft_cap(logits, self.config.logit_softcap)

    def routed_states(
        self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterSums | None]:  # fmt: skip
        """Return the hidden states of whole rows, and what routers did with all tokens but padding (None: no experts).

        Args:
          segments: packing id per token, 0 = padding; None: each row is one document.
          positions: index within the document; None: 0 ... T-1.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        hidden, _, sums = self.hidden(tokens, positions, CausalMask(segments))
        return hidden, sums

    def __call__(
        self, tokens: Int[Array, "B T"], segments: Int[Array, "B T"] | None = None,
        positions: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:  # fmt: skip
        """Return float32 next-token logits of whole rows; arguments as of `routed_states`."""
        return self.logits(self.routed_states(tokens, segments, positions)[0])

    def prefill(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Write whole prompts into an empty cache: `decode` where the prompt is all there is to see."""
        return self.hidden(tokens, positions, CausalMask(), cache)[:2]

    def decode(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], cache: Cache
    ) -> tuple[Float[Array, "B T D"], Cache]:
        """Append T tokens per row at `positions` (consecutive) to the cache; return (their hidden states, cache)."""
        return self.hidden(tokens, positions, CacheMask(positions), cache)[:2]


def graph(config: ModelConfig, compute: ComputeConfig, *, stacked: bool = True) -> tuple[nnx.GraphDef, nnx.State]:
    """Return (graph definition, abstract parameters with their logical axes); allocates nothing."""
    build = lambda: Transformer(config, compute, nnx.Rngs(0), stacked=stacked)
    return nnx.split(nnx.eval_shape(build), nnx.Param)


def bind(graphdef: nnx.GraphDef, params: Params) -> Transformer:
    """Join structure and parameters to a module; free under jit (trace time only)."""
    return nnx.merge(graphdef, params)


def init_params(config: ModelConfig, seed: int) -> Params:
    """Draw the initial parameters; call under jit with out_shardings to have them born sharded."""
    model = Transformer(config, ComputeConfig(), nnx.Rngs(rng.key(seed, "init")))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def logical_axes(config: ModelConfig) -> dict[str, Any]:
    """Return the tree of logical axis names of `init_params`, e.g. blocks/ffn/up/kernel: (layers, embed, mlp)."""
    return axes_of(graph(config, ComputeConfig())[1])


def axes_of(state: nnx.State) -> dict[str, Any]:
    """Return the logical axis names of abstract parameters."""
    is_variable = lambda node: isinstance(node, nnx.Variable)
    return nnx.to_pure_dict(jax.tree.map(lambda v: v.get_metadata()["axes"], state, is_leaf=is_variable))


def abstract_params(config: ModelConfig) -> Params:
    """Return ShapeDtypeStructs of the parameters without allocating them."""
    return jax.eval_shape(lambda: init_params(config, 0))


def unstack(params: Params) -> Params:
    """Cut stacked block parameters into layers: the tree of `Transformer(stacked=False)`."""
    leaves = jax.tree.leaves(params["blocks"])
    n_layers = leaves[0].shape[0]
    blocks = {i: jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(n_layers)}
    return {**params, "blocks": blocks}
