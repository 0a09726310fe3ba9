"""Layers over devices in a row: each device of the mesh axis "stage" has some of them, and microbatches pass through.

Stages are a batch axis (`jax.vmap`) that is split over devices, and passing on is a roll along it, which compiles to a
permute between neighbours. With `rounds` r > 1 the layers are dealt out in r rounds, so that a microbatch goes through
the row r times and a stage starts r times earlier: less time is idle, more is passed on.

Parameters lie as always, stacked on L and split over "stage" in their order; with rounds they are dealt out anew in
each step, an exchange of (1 - 1 / stages) of them.

Source: Huang et al. 2019 (GPipe); rounds: Narayanan et al. 2021, section 2.2.2; written as one program of an array:
Xu et al. 2021 (GSPMD), section 3.3.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxllm.models.config import Pipeline
from jaxllm.sharding.config import BATCH_AXES
from jaxllm.sharding.rules import constrain

# What a stage does: (x [b, T, D], its layers [l, ...], rows that go with x) -> (x, sums over tokens or None).
Run = Callable[[Array, Any, Any], tuple[Array, Any]]


class Schedule(NamedTuple):
    """When which stage works on what.

    Microbatches go in groups of as many as there are stages. A group fills the row and stays in it for all rounds, so
    that what leaves the last stage is what the first one takes next: nothing is ever put aside. Stage s begins unit u
    of its work, u = 0 ... microbatches * rounds - 1, in turn u + s.
    """

    stages: int
    groups: int
    rounds: int

    @property
    def units(self) -> int:
        """Units of work of each stage; a unit is its layers of one round, on one microbatch."""
        return self.groups * self.rounds * self.stages

    def unit(self, u: Int[Array, "*s"]) -> tuple[Array, Array, Array]:
        """Return (group, round, number within the group) of unit u."""
        return u // (self.rounds * self.stages), u // self.stages % self.rounds, u % self.stages


def stages() -> int:
    """Return the number of stages of the mesh in use."""
    return jax.sharding.get_abstract_mesh().shape.get("stage", 1)


def pipelined(run: Run, x: Float[Array, "B T D"], layers: Any, sides: Any, config: Pipeline) -> tuple[Array, Any]:
    """Return what `run` over all layers [L, ...] makes of x: (x, sums stacked on L).

    Args:
      sides: arrays [B, ...] of the same rows, given to every stage; None leaves are passed on.
    Raises:
      ValueError: layers or rows cannot be dealt out evenly.
    """
    number = stages()
    depth, parts = len(jax.tree.leaves(layers)[0]), config.parts(number)
    config.check(number, depth, x.shape[0], _row_parts())
    plan = Schedule(number, parts // number, config.rounds)
    layers = jax.tree.map(lambda z: _deal(z, plan), layers)
    rows = constrain(_cut(x, plan), None, "stages", "batch", "stream", None)
    # Every stage needs those of every microbatch in its turn; they are small.
    sides = jax.tree.map(lambda z: constrain(rearrange(_cut(z, plan), "g s ... -> (g s) ..."), None, *_axes(z)), sides)
    stage = jnp.arange(number)

    def turn(carry: tuple[Array, Array], time: Int[Array, ""]) -> tuple[tuple, Any]:
        rows, inputs = _exchange(*carry, time, plan)
        # Stages that have no work yet, or no more, work on what is there; nobody takes what comes of it.
        group, deal, place = plan.unit(jnp.clip(time - stage, 0, plan.units - 1))
        own = jax.tree.map(lambda z: jax.vmap(lambda z, r: z[r], (1, 0))(z, deal), layers)
        beside = jax.tree.map(lambda z: constrain(z[group * number + place], "stages", *_axes(z[0])), sides)
        outputs, sums = jax.vmap(run, spmd_axis_name="stage")(inputs, own, beside)
        return (rows, constrain(outputs, "stages", "batch", "stream", None)), sums

    # One more group of rows, for what comes out while nothing more comes in.
    start = jnp.pad(rows, ((0, 1), *((0, 0),) * (rows.ndim - 1))), jnp.zeros_like(rows[0])
    last = plan.units + number - 1
    (rows, passed), sums = jax.lax.scan(turn, start, jnp.arange(last))
    rows, _ = _exchange(rows, passed, jnp.asarray(last), plan)
    return _join(rows[1:]), jax.tree.map(lambda z: _total(z, plan), sums)


def spread(run: Run, x: Float[Array, "B T D"], layers: Any, sides: Any) -> Array:
    """Return what `run` makes of x where every stage has all of `layers`, and takes its part of the rows."""
    split = lambda z, *axes: constrain(rearrange(z, "(s b) ... -> s b ...", s=stages()), "stages", *axes)
    sides = jax.tree.map(lambda z: split(z, *_axes(z)), sides)
    x, _ = jax.vmap(run, (0, None, 0), spmd_axis_name="stage")(split(x, "batch", "stream", None), layers, sides)
    return constrain(rearrange(x, "s b ... -> (s b) ..."), "rows", "stream", None)


def _exchange(rows: Array, passed: Array, time: Array, plan: Schedule) -> tuple[Array, Array]:
    """Return (rows, inputs of the stages), where the first stage takes new rows and gives finished ones back.

    The rows of a group stand in the order of the stages, one each, and move up by one in every turn: to the first stage
    comes the microbatch that it takes next, and what it gives back in its place is home when the round ends.
    """
    group, deal, _ = plan.unit(time)
    arrived = jnp.roll(passed, 1, axis=0)
    stream = jax.lax.dynamic_index_in_dim(rows, group, keepdims=False)
    first = ((jnp.arange(plan.stages) == 0) & (deal == 0)).reshape(-1, 1, 1, 1)
    inputs, left = jnp.where(first, stream, arrived), jnp.where(first, arrived, stream)
    left = constrain(jnp.roll(left, -1, axis=0), "stages", "batch", "stream", None)
    rows = jax.lax.dynamic_update_index_in_dim(rows, left, group, 0)
    return rows, constrain(inputs, "stages", "batch", "stream", None)


def _axes(x: Array) -> tuple[str | None, ...]:
    """Return the logical axes of what goes with rows: [B], [B, T] or [B, T, D]."""
    return ("batch", "length", None)[: x.ndim]


def _row_parts() -> int:
    """Return into how many parts the mesh splits the rows that a stage works on."""
    mesh = jax.sharding.get_abstract_mesh().shape
    return math.prod(mesh.get(axis, 1) for axis in BATCH_AXES)


def _cut(x: Array, plan: Schedule) -> Array:
    """Cut rows [B, ...] to [group, stage, b, ...], each taken from the rows that its device holds."""
    return rearrange(x, "(s p k g) ... -> g s (p k) ...", s=plan.stages, p=_row_parts(), g=plan.groups)


def _join(x: Array) -> Array:
    """Undo `_cut`."""
    return constrain(rearrange(x, "g s (p k) ... -> (s p k g) ...", p=_row_parts()), "rows", "stream", None)


def _total(x: Array, plan: Schedule) -> Array:
    """Sum what every stage did in each turn, [turn, stage, l, ...], over microbatches: [L, ...]."""
    work = jnp.stack([x[s : s + plan.units, s] for s in range(plan.stages)])
    work = rearrange(work, "s (g r j) l ... -> (g j) (r s l) ...", r=plan.rounds, j=plan.stages)
    return jnp.sum(work, axis=0)


def _deal(x: Array, plan: Schedule) -> Array:
    """Deal out layers [L, ...] to [round, stage, l, ...]: each round goes through all stages."""
    x = rearrange(x, "(r s l) ... -> r s l ...", r=plan.rounds, s=plan.stages)
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 2)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(None, "stage", *rest))
