"""Everything that training carries from step to step, and its layout on the mesh."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxllm.core.tree import map_named, named_leaves
from jaxllm.models.build import AnyConfig, Params, abstract_params, init_params, logical_axes
from jaxllm.sharding.rules import named_sharding


class TrainState(NamedTuple):
    """The training state.

    Attributes:
      step: updates completed (skipped ones included).
      params: parameters, float32.
      opt_state: optimizer state of the same layout.
      ema: exponential moving average of params, or None.
      norm_mean: running mean of the gradient norm, what a spike is measured against; 0 until the first step.
    """

    step: Int[Array, ""]
    params: Params
    opt_state: optax.OptState
    ema: Params | None
    norm_mean: Float[Array, ""]


def param_shardings(config: AnyConfig, mesh: Mesh) -> Any:
    """Return the tree of NamedShardings of the parameters on `mesh`."""
    is_axes = lambda node: isinstance(node, tuple)
    place = lambda axes, leaf: named_sharding(mesh, axes, leaf.shape)
    return jax.tree.map(place, logical_axes(config), abstract_params(config), is_leaf=is_axes)


def state_shardings(abstract: TrainState, params: Any, mesh: Mesh, offload: bool = False) -> TrainState:
    """Return the shardings of a whole state: what mirrors a parameter lies like it, all else is replicated.

    Optimizer leaves carry the path of their parameter at the end of their own ("0/mu/blocks/ffn/up/kernel"). They are
    also split over the replicas of the model, along their first dimension (the layers, for most) where it divides: each
    replica keeps and updates its part, and the new parameters are gathered. Source: Rajbhandari et al. 2020 (ZeRO), 1.

    Args:
      offload: optimizer leaves lie in the memory of the device's host.
    """
    replicated = NamedSharding(mesh, PartitionSpec())
    by_name = named_leaves(params)

    def place(name: str, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        for start in range(name.count("/") + 1):
            sharding = by_name.get(name.split("/", start)[-1])
            if sharding is not None and len(sharding.spec) == leaf.ndim:
                sharding = _fitting(sharding, leaf.shape)
                if not name.startswith("opt_state/"):
                    return sharding
                sharding = _over_replicas(sharding, leaf)
                return sharding.with_memory_kind("pinned_host") if offload else sharding
        return replicated

    return map_named(place, abstract)


def _fitting(sharding: NamedSharding, shape: tuple[int, ...]) -> NamedSharding:
    """Leave dimensions whole that the mesh does not divide: the scales of a parameter's moments are fewer than it."""
    sizes = sharding.mesh.shape
    parts = lambda axes: math.prod(sizes[axis] for axis in ((axes,) if isinstance(axes, str) else axes or ()))
    kept = [axes if size % parts(axes) == 0 else None for axes, size in zip(sharding.spec, shape, strict=True)]
    return NamedSharding(sharding.mesh, PartitionSpec(*kept))


def _over_replicas(sharding: NamedSharding, leaf: jax.ShapeDtypeStruct) -> NamedSharding:
    """Split the first dimension over the "data" axis as well, if it divides."""
    first, *rest = sharding.spec
    mesh, taken = sharding.mesh.shape, first if isinstance(first, tuple) else (first,) if first else ()
    if mesh["data"] == 1 or leaf.shape[0] % math.prod(mesh[axis] for axis in (*taken, "data")):
        return sharding
    return NamedSharding(sharding.mesh, PartitionSpec((*taken, "data"), *rest))


def init_state(
    config: AnyConfig, tx: optax.GradientTransformation, mesh: Mesh, *, seed: int, ema: bool = False,
    params: Params | None = None, offload: bool = False,
) -> tuple[TrainState, TrainState]:  # fmt: skip
    """Return (state, its shardings), born sharded: no device and no host ever holds all of it.

    Args:
      params: start from these instead of random ones (instruction tuning); consumed.
      offload: see `state_shardings`.
    """

    build = lambda params: _new_state(init_params(config, seed) if params is None else params, tx, ema)
    shardings = state_shardings(jax.eval_shape(build, params), param_shardings(config, mesh), mesh, offload)
    return jax.jit(build, out_shardings=shardings, donate_argnums=0)(params), shardings


def abstract_state(config: AnyConfig, tx: optax.GradientTransformation, *, ema: bool = False) -> TrainState:
    """Return the shapes of a state, without its arrays."""
    return jax.eval_shape(lambda params: _new_state(params, tx, ema), abstract_params(config))


def _new_state(params: Params, tx: optax.GradientTransformation, ema: bool) -> TrainState:
    copy = jax.tree.map(jnp.copy, params) if ema else None
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params), copy, jnp.zeros((), jnp.float32))
