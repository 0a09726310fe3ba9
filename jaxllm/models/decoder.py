"""The decoder-only Transformer: one class for Llama-type and GPT-type models, in training and in decoding.

Blocks are stacked on a leading L axis: one parameter layout in memory, on disk and in conversion tables. Decoding works
on the same parameters cut into layers, because a loop over a stacked array copies the weights per token.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxllm.layers.cache import Cache, LayerCache, Memory, init_cache
from jaxllm.layers.config import Learned, RelativeBias, Sinusoids
from jaxllm.layers.dropout import Drop
from jaxllm.layers.kernels import soft_cap
from jaxllm.layers.linear import PRODUCT, Embed, Projection, param
from jaxllm.layers.masks import CacheMask, CausalMask, Mask
from jaxllm.layers.moe import RouterSums
from jaxllm.layers.norms import Norm
from jaxllm.layers.positions import RelativeScores, sinusoids
from jaxllm.models.block import Block
from jaxllm.models.config import ComputeConfig, ModelConfig, Stack
from jaxllm.models.pipeline import pipelined, spread, stages
from jaxllm.models.views import Traits, Views, layer_traits
from jaxllm.sharding.rules import constrain

# What a loop over blocks of one kind reads of each: itself, its traits where they differ, its cache, and its number
# where there is dropout.
Layers = tuple[Block, Traits | None, LayerCache | None, Array | None]
REMAT = {
    # By name: a policy for products does not see those inside of functions with gradients of their own.
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[PRODUCT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Transformer(nnx.Module):
    """A stack of blocks with its tables: a language model, or one half of an encoder-decoder.

    Args:
      stacked: False holds the blocks one by one, for decoding.
      columns: hold the output table turned, [D, V]: a CPU multiplies 2 to 16 rows with it 1.3 to 1.9 times as fast, for
        tables of 4 to 260 MB.
      joined: as of `join`.
      packed: this type, whose bits the blocks' matrices are given as (uint16). A CPU multiplies by float32 alone, and
        XLA would widen all layers at one time if it saw that they are numbers.
      part: "encoder" has no tables of tokens, "decoder" attends to a source as well.
    """

    def __init__(
        self, config: ModelConfig, compute: ComputeConfig, rngs: nnx.Rngs, *, stacked: bool = True,
        columns: bool = False, joined: bool = False, packed: str | None = None,
        part: Literal["whole", "encoder", "decoder"] = "whole",
    ):  # fmt: skip
        self.config = config
        self.compute = compute
        self.packed = packed
        self.drop: Drop | None = None  # while training; see `models.build.bind`
        d_model, std, encoder = config.d_model, config.init_std, part == "encoder"
        self.embed = None if encoder else Embed(rngs, config.vocab_size, d_model, std=std)
        places = config.positions
        rows = config.max_seq_len + places.offset if isinstance(places, Learned) else 0
        self.position_embed = Embed(rngs, rows, d_model, axis="positions", std=std) if rows else None
        relative = isinstance(places, RelativeBias)
        self.relative = RelativeScores(rngs, places, config.n_heads, both_ways=encoder, std=std) if relative else None
        self.embed_norm = Norm(config.norm, d_model) if config.embed_norm else None
        for name, layers, kind in config.stacks():  # self.blocks, and what comes before them
            block = functools.partial(Block, config=kind, kernel=compute.kernel, cross=part == "decoder")
            if stacked:
                build = nnx.vmap(block, transform_metadata={nnx.PARTITION_NAME: None, "axes": "layers"})
                setattr(self, name, nnx.split_rngs(splits=len(layers))(build)(rngs))
            else:
                setattr(self, name, nnx.List([block(rngs) for _ in layers]))
        self.final_norm = None if config.norm_placement in ("post", "none") else Norm(config.norm, d_model)
        untied = not (config.tie_embeddings or encoder or columns)
        self.head = param(rngs, (config.vocab_size, d_model), ("vocab", "embed"), std) if untied else None
        self.columns = Projection(rngs, {"embed": d_model}, {"vocab": config.vocab_size}, std=std) if columns else None
        if joined:
            self.join()

    def join(self) -> None:
        """Hold together the matrices of each cut block that are multiplied by one input."""
        for stack in self.config.stacks():
            for block in getattr(self, stack.name):
                block.join()

    def hidden(
        self, tokens: Int[Array, "B T"], positions: Int[Array, "B T"], mask: Mask, cache: Cache | None = None
    ) -> tuple[Float[Array, "B T D"], Cache | None, RouterSums | None]:
        with jax.named_scope("embedding"):
            x = self.embedded(self.embed(tokens, jnp.dtype(self.compute.dtype)), positions)
        return self.run(x, positions, mask, cache)

    def embedded(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Return what the first block reads, of rows of a table of tokens."""
        config = self.config
        if config.embed_scale is not None:
            x = x * jnp.asarray(config.embed_scale, x.dtype)
        match config.positions:
            case Learned(offset=offset):
                x = x + self.position_embed(positions + offset if offset else positions, x.dtype)
            case Sinusoids():
                x = x + sinusoids(positions, config.d_model, config.positions).astype(x.dtype)
        x = constrain(x, "rows", "stream", None)  # right after the gather, which otherwise loses the batch's sharding
        x = x if self.embed_norm is None else self.embed_norm(x)
        return x if self.drop is None else self.drop.at(config.n_layers)(x)

    def run(
        self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], mask: Mask, cache: Cache | None = None,
        memory: Memory | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None, RouterSums | None]:  # fmt: skip
        """Return (hidden states after the final norm, the cache with the new tokens, what the routers did)."""
        if self.relative is not None:
            rows = jnp.arange(positions.shape[1])
            cached = isinstance(mask, CacheMask)
            keys = jnp.arange(cache[0].keys.shape[1]) if cached else rows
            mask = mask._replace(bias=self.relative(positions if cached else rows, keys))
        views = Views(self.config, mask, positions)
        sums = None
        if cache is None:
            x, sums = self.run_blocks(x, mask, positions, memory)
        elif not isinstance(self.blocks, nnx.List):
            updated = []
            for stack in self.config.stacks():
                layers = jax.tree.map(lambda *z: jnp.stack(z), *(cache[i] for i in stack.layers))
                layers = *self._layers(stack)[:2], layers, None
                x, (layers, _) = self._scan(x, stack, layers, views, positions=positions)
                updated += [jax.tree.map(lambda z, i=i: z[i], layers) for i in range(len(stack.layers))]
            cache = tuple(updated)
        else:
            updated, blocks = [], [block for stack in self.config.stacks() for block in getattr(self, stack.name)]
            for block, traits, layer in zip(blocks, layer_traits(self.config), cache, strict=True):
                x, layer, _ = block(x, *views.of(traits), layer, positions)
                updated.append(layer)
            cache = tuple(updated)
        return (x if self.final_norm is None else self.final_norm(x)), cache, sums

    def run_blocks(
        self, x: Array, mask: Mask, positions: Int[Array, "B T"], memory: Memory | None = None
    ) -> tuple[Array, RouterSums | None]:
        """Run the blocks without a cache: scanned, or unrolled from the same stacked parameters.

        On a mesh with stages those of the last stack, which is nearly all of them, go through `pipeline.pipelined`.

        Returns:
          (x, what the routers did, stacked on the L of the layers that have one).
        """
        stacks = self.config.stacks()
        for stack in stacks:
            layers = self._layers(stack)
            if stages() == 1:
                x, (_, sums) = self._scan(x, stack, layers, Views(self.config, mask, positions), memory=memory)
                continue

            def run(x: Array, layers: tuple, sides: tuple, stack: Stack = stack) -> tuple[Array, RouterSums | None]:
                positions, segments, memory, rows = sides
                views = Views(self.config, mask._replace(segments=segments), positions)
                drop = None if rows is None else self.drop._replace(rows=rows)
                x, (_, sums) = self._scan(x, stack, layers, views, memory=memory, drop=drop)
                return x, sums

            sides = positions, mask.segments, memory, None if self.drop is None else self.drop.rows
            if stack is stacks[-1]:
                x, sums = pipelined(run, x, layers, sides, self.compute.pipeline)
            else:
                x = spread(run, x, layers, sides)
        return x, sums

    def _layers(self, stack: Stack) -> Layers:
        """Return the blocks of one kind, for a loop without a cache."""
        traits = self._traits(stack)
        # If no layer differs, traits are facts of the program, not data of the loop.
        differ = Traits(*(jnp.asarray(z) for z in zip(*traits, strict=True))) if len(set(traits)) > 1 else None
        numbers = None if self.drop is None else jnp.arange(stack.layers.start, stack.layers.stop)
        return getattr(self, stack.name), differ, None, numbers

    def _traits(self, stack: Stack) -> list[Traits]:
        return layer_traits(self.config)[stack.layers.start : stack.layers.stop]

    def _scan(
        self, x: Array, stack: Stack, layers: Layers, views: Views, memory: Memory | None = None,
        positions: Int[Array, "B T"] | None = None, drop: Drop | None = None,
    ) -> tuple[Array, tuple[LayerCache | None, RouterSums | None]]:  # fmt: skip
        """Run blocks of one kind; `layers` are stacked. `drop`: of some rows alone."""
        alike, drop = self._traits(stack)[0], drop or self.drop

        def apply(x: Array, layer: Layers) -> tuple[Array, tuple]:
            block, own, cache, number = layer
            if self.packed:
                block = jax.tree.map(
                    lambda z: jax.lax.bitcast_convert_type(z, self.packed) if z.dtype == jnp.uint16 else z, block
                )
            place = None if drop is None else drop.at(number)
            x, *rest = block(x, *views.of(own or alike), cache, positions, memory, place)
            return constrain(x, "batch", "stream", None), tuple(rest)

        if self.compute.remat != "none":
            apply = jax.checkpoint(apply, policy=REMAT[self.compute.remat], prevent_cse=False)
        unroll = self.compute.layers == "unroll" and not self.packed
        return jax.lax.scan(apply, x, layers, unroll=True if unroll else 1)

    def output_table(self) -> Float[Array, "V D"]:
        """Return the table of output vectors: logits are products of hidden states with its rows."""
        return self.embed.table[...] if self.head is None else self.head[...]

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Return float32 logits of hidden states."""
        if self.columns is not None:
            logits = self.columns(hidden).astype(jnp.float32)
        else:
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

    @property
    def decoder(self) -> "Transformer":
        """What writes text, as other models have it."""
        return self

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """Return a cache of `slots` places for each row."""
        config, latent = self.config, self.config.mla
        kept = (1, latent.rank + latent.rotated) if latent else (config.kv_heads, config.head_width)
        dtype = jnp.dtype(self.compute.dtype)
        return init_cache(config.n_layers, (batch, slots, *kept), dtype, latent=latent is not None)

    def memory_cache(self, memory: Memory, slots: int) -> Cache:
        """Return an empty cache with the keys and values of what each layer attends to beside the text."""
        layers = zip(self.blocks, self.empty_cache(memory.segments.shape[0], slots), strict=True)
        return tuple(layer._replace(memory=block.cross_attention.remember(memory)) for block, layer in layers)

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
