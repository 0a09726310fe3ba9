"""Mixture of experts: a feed-forward layer of which each token uses a few parts, chosen by a router.

Dropless: the rows of a batch are sorted by expert and multiplied group by group (`grouped_product`), so that an
expert takes whatever number of tokens comes, and what a token gets does not depend on the others. One token of a decode
step and a whole batch run the same function.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from jaxllm.layers.config import ClampedGate, Experts, Gated, Groups
from jaxllm.layers.ffn import ACTIVATIONS, Ffn
from jaxllm.layers.grouped import grouped_product
from jaxllm.layers.linear import PRODUCT, constant, param
from jaxllm.sharding import shards
from jaxllm.sharding.rules import partition_spec


class RouterSums(NamedTuple):
    """What a router did, summed over the tokens that count; float32, with a leading L where layers are stacked.

    Attributes:
      counts: how often each expert was chosen; sums to `tokens` * A.
      probs: of each expert, before the choice, as shares of their sum; the only part with a gradient to balance the
        load by.
      z: squared log-partitions of the router's logits.
      tokens: how many count.
    """

    counts: Float[Array, "*L E"]
    probs: Float[Array, "*L E"]
    z: Float[Array, "*L"]
    tokens: Float[Array, "*L"]


class Kernels(NamedTuple):
    """The weights of all experts, or of those that one device holds."""

    gate: Float[Array, "E D F"]
    up: Float[Array, "E D F"]
    down: Float[Array, "E F D"]
    gate_bias: Float[Array, "E F"] | None = None
    up_bias: Float[Array, "E F"] | None = None


class Bank(nnx.Module):
    """The parameters of the experts of a layer, stacked on E."""

    def __init__(self, rngs: nnx.Rngs, number: int, *, d_model: int, d_ff: int, bias: bool, std: float, out_std: float):
        wide, narrow = (number, d_model, d_ff), (number, d_ff, d_model)
        self.gate = param(rngs, wide, ("experts", "embed", "mlp"), std)
        self.up = param(rngs, wide, ("experts", "embed", "mlp"), std)
        self.down = param(rngs, narrow, ("experts", "mlp", "embed"), out_std)
        inner = lambda: constant((number, d_ff), ("experts", "mlp"), 0.0) if bias else None
        self.gate_bias, self.up_bias = inner(), inner()
        self.down_bias = constant((number, d_model), ("experts", "norm"), 0.0) if bias else None

    def kernels(self, dtype: jnp.dtype) -> Kernels:
        """Return the weights in the precision of a product; the bias of `down` is added to the sum over experts."""
        weights = self.gate, self.up, self.down, self.gate_bias, self.up_bias
        return Kernels(*(None if weight is None else weight[...].astype(dtype) for weight in weights))


class Moe(nnx.Module):
    """The layer that `config` describes; `d_ff` is the width of one expert."""

    def __init__(
        self, rngs: nnx.Rngs, config: Experts, *, d_model: int, d_ff: int, bias: bool = False, std: float = 0.02,
        out_std: float = 0.02,
    ):  # fmt: skip
        self.config = config
        self.router = param(rngs, (d_model, config.number), ("embed", None), std)
        self.router_bias = constant((config.number,), (None,), 0.0) if bias else None
        self.choice_bias = constant((config.number,), ("norm",), 0.0) if config.biased else None
        shape = {"d_model": d_model, "bias": bias, "std": std, "out_std": out_std}
        self.experts = Bank(rngs, config.number, d_ff=d_ff, **shape)
        kind = Gated(activation=config.activation)
        self.shared = Ffn(rngs, kind, d_ff=config.shared * d_ff, **shape) if config.shared else None

    def __call__(
        self, x: Float[Array, "B T D"], counted: Bool[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], RouterSums]:
        """Return (output, what the router did).

        Args:
          counted: the tokens that the sums are about, all but padding; None: every token.
        """
        with jax.named_scope("moe"):
            # float32 in full precision: two experts that score alike must not change places by rounding.
            exact = jax.lax.Precision.HIGHEST
            logits = jnp.einsum("btd,de->bte", x.astype(jnp.float32), self.router[...], precision=exact)
            logits = logits if self.router_bias is None else logits + self.router_bias[...][None, None]
            softmax = self.config.score == "softmax"
            probs = jax.nn.softmax(logits, axis=-1) if softmax else jax.nn.sigmoid(logits)
            choice = self._choose(jax.lax.stop_gradient(probs))
            weights = jnp.take_along_axis(probs, choice, axis=-1)
            if self.config.renormalise:
                weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)  # all sigmoids may be zero
            kernels, weights = self.experts.kernels(x.dtype), (self.config.scale * weights).astype(x.dtype)
            y = apply_experts(x, choice, weights, kernels, self.config.clamped or self.config.activation)
            if self.experts.down_bias is not None:  # here, where no device adds it twice
                chosen = jax.nn.one_hot(choice, self.config.number, dtype=x.dtype)
                shares = jnp.sum(chosen * weights[..., None], axis=2)
                y = y + jnp.matmul(shares, self.experts.down_bias[...].astype(x.dtype), precision=exact)
            y = y if self.shared is None else y + self.shared(x)
            probs = probs if softmax else probs / (jnp.sum(probs, axis=-1, keepdims=True) + 1e-20)
            return y, _sums(logits, probs, choice, counted)

    def _choose(self, probs: Float[Array, "B T E"]) -> Int[Array, "B T A"]:
        """Return the experts of each token: the best ones by probability and bias, of its best groups."""
        if self.choice_bias is not None:
            probs = probs + self.choice_bias[...][None, None]
        if self.config.groups is not None:
            probs = _within_groups(probs, self.config.groups)
        return jax.lax.top_k(probs, self.config.top_k)[1]


def _within_groups(scores: Float[Array, "B T E"], groups: Groups) -> Float[Array, "B T E"]:
    """Return the scores with -inf outside of the groups whose two best experts score most."""
    scores = rearrange(scores, "B T (g e) -> B T g e", g=groups.number)
    best = jnp.sum(jax.lax.top_k(scores, 2)[0], axis=-1)
    chosen = jax.lax.top_k(best, groups.top_k)[1]
    allowed = jnp.any(chosen[..., None] == jnp.arange(groups.number)[None, None, None], axis=-2)
    return rearrange(jnp.where(allowed[..., None], scores, -jnp.inf), "B T g e -> B T (g e)")


def _sums(
    logits: Float[Array, "B T E"], probs: Float[Array, "B T E"], choice: Int[Array, "B T A"],
    counted: Bool[Array, "B T"] | None,
) -> RouterSums:  # fmt: skip
    count = jnp.ones(choice.shape[:2], jnp.float32) if counted is None else counted.astype(jnp.float32)
    chosen = choice[..., None] == jnp.arange(probs.shape[-1])[None, None, None, :]
    return RouterSums(
        counts=jnp.sum(chosen * count[..., None, None], axis=(0, 1, 2)),
        probs=jnp.einsum("bte,bt->e", probs, count, precision=jax.lax.Precision.HIGHEST),
        z=jnp.sum(jax.nn.logsumexp(logits, axis=-1) ** 2 * count),
        tokens=jnp.sum(count),
    )


def apply_experts(
    x: Float[Array, "B T D"], choice: Int[Array, "B T A"], weights: Float[Array, "B T A"], kernels: Kernels,
    activation: str | ClampedGate,
) -> Float[Array, "B T D"]:  # fmt: skip
    """Return sum_a weights[a] expert_{choice[a]}(x), on all devices of the mesh in use.

    The compiler cannot partition a product of groups whose sizes are data, so what each device does is written out: it
    sorts the tokens of its own rows of the batch. Devices that share the experts gather one another's tokens, compute
    what falls to their own experts (all other rows are in no group), and sum the results, each for its own rows.
    Devices that share the width of experts sum as after any split product, each for its own part of the rows.

    Cost: with n devices on the expert axis each receives the tokens of the n - 1 others and sums as many results, n / A
    times what an exchange of the chosen tokens alone would move, and it holds rows for all n, since any number of them
    may choose its experts. In return no shape depends on the routing, and no token is ever dropped.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return _mix(x, choice, weights, kernels, activation)
    rows = partition_spec(("batch", "length", None), x.shape, mesh.shape)
    wide = partition_spec(("experts", None, "mlp"), kernels.up.shape, mesh.shape)
    owners, parts = wide[0], wide[2]
    gathers = owners in jax.tree.leaves(rows[0])  # one mesh axis, several, or None
    out = partition_spec(("batch", "stream", None), x.shape, mesh.shape)
    scatters = parts is not None and out[1] != rows[1] and parts in jax.tree.leaves(out[1])
    out = out if scatters else rows
    # JAX cannot type what varies over devices under a vmap that is split over them (a pipeline), nor in its kernels for
    # TPUs; one more sum, then, where devices share the width of experts.
    typed = mesh.shape.get("stage", 1) == 1 and shards.platform() != "tpu"

    def local(x: Array, choice: Array, weights: Array, kernels: Kernels) -> Array:
        if gathers:
            gather = lambda y: jax.lax.all_gather(y, owners, axis=0, tiled=True)
            x, choice, weights = gather(x), gather(choice), gather(weights)
        # Here, so that gradients are summed over devices once per token, not once per expert of a token.
        alone = tuple(axis for axis in (owners, parts) if axis is not None and not (gathers and axis == owners))
        x, weights = (jax.lax.pcast(y, alone, to="varying") if alone and typed else y for y in (x, weights))
        if owners is not None:
            choice = choice - jax.lax.axis_index(owners) * kernels.up.shape[0]
        y = _mix(x, choice, weights, kernels, activation, some=owners is not None)
        if scatters:
            y = jax.lax.psum_scatter(y, parts, scatter_dimension=1, tiled=True)
        summed = tuple(axis for axis in alone if not (scatters and axis == parts))
        y = jax.lax.psum(y, summed) if summed else y
        return jax.lax.psum_scatter(y, owners, scatter_dimension=0, tiled=True) if gathers else y

    narrow = PartitionSpec(owners, parts, None)
    inner = None if kernels.up_bias is None else PartitionSpec(owners, parts)
    specs = (rows, rows, rows, Kernels(wide, wide, narrow, inner, inner))
    return jax.shard_map(local, in_specs=specs, out_specs=out, check_vma=typed)(x, choice, weights, kernels)


def _mix(
    x: Float[Array, "B T D"], choice: Int[Array, "B T A"], weights: Float[Array, "B T A"], kernels: Kernels,
    activation: str | ClampedGate, some: bool = False,
) -> Float[Array, "B T D"]:  # fmt: skip
    """Return the weighted sum over those chosen experts that `kernels` has.

    Args:
      choice: counted from the first expert of `kernels`.
      some: `choice` may name experts that `kernels` does not have.
    """
    number = kernels.up.shape[0]
    if some and number < choice.shape[-1]:  # fewer rows: a token chooses each expert that is here once at most
        here = choice[..., None] == jnp.arange(number)[None, None, None]
        weights = jnp.sum(weights[..., None] * here, axis=-2)
        choice = jnp.where(jnp.any(here, axis=-2), jnp.arange(number)[None, None], number)
    top_k = choice.shape[-1]
    owner = choice.reshape(-1)
    if some:
        owner = jnp.where((owner >= 0) & (owner < number), owner, number)  # sorted to the end, in no group
    member = owner[:, None] == jnp.arange(number)[None, :]
    sizes = jnp.sum(member, axis=0, dtype=jnp.int32)
    order = jnp.argsort(owner, stable=True)
    inverse = jnp.argsort(order)
    rows = _spread(x.reshape(-1, x.shape[-1]), order, inverse, top_k)
    # A kernel may leave anything in the rows of no group, forward and backward.
    inside = (jnp.arange(len(owner)) < jnp.sum(sizes))[:, None]
    clean = lambda y: jnp.where(inside, y, jnp.zeros_like(y)) if some else y
    rows = clean(rows)
    product = lambda x, kernel: checkpoint_name(grouped_product(x, kernel, sizes), PRODUCT)
    gate, up = product(rows, kernels.gate), product(rows, kernels.up)
    if kernels.up_bias is not None:  # by a product, whose gradient is one; that of a lookup would scatter
        member = member[order].astype(x.dtype)
        add = functools.partial(jnp.dot, member, precision=jax.lax.Precision.HIGHEST)
        gate, up = gate + add(kernels.gate_bias), up + add(kernels.up_bias)
    hidden = _gated(gate, up, activation)
    rows = _spread(clean(product(hidden, kernels.down)), inverse, order, 1)
    # Summed in float32, and over a fixed order of experts: a scatter-add on a GPU is neither.
    y = jnp.einsum("mad,ma->md", rows.reshape(-1, top_k, x.shape[-1]), weights.reshape(-1, top_k),
                   preferred_element_type=jnp.float32)  # fmt: skip
    return y.astype(x.dtype).reshape(x.shape)


def _gated(gate: Float[Array, "R F"], up: Float[Array, "R F"], activation: str | ClampedGate) -> Float[Array, "R F"]:
    if isinstance(activation, str):
        return ACTIVATIONS[activation](gate) * up
    gate, up = jnp.minimum(gate, activation.limit), jnp.clip(up, -activation.limit, activation.limit)
    return gate * jax.nn.sigmoid(activation.alpha * gate) * (up + 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _spread(x: Float[Array, "M D"], order: Int[Array, "R"], inverse: Int[Array, "R"], top_k: int) -> Array:
    """Return A copies of each row in a new order, R = M A; the gradient is a gather and a sum, where JAX's scatters."""
    return x[order // top_k]


_spread.defvjp(
    lambda x, order, inverse, top_k: (x[order // top_k], inverse),
    lambda top_k, inverse, dy: (jnp.sum(dy[inverse].reshape(-1, top_k, dy.shape[-1]), axis=1), None, None),
)
