"""A plan of decoding: the program that adds a token to each row, for chips that are not here."""

import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from jaxllm.core.config import Record
from jaxllm.inference.decode import bucket, programs
from jaxllm.inference.layout import Layout, cut
from jaxllm.inference.rules import Rules
from jaxllm.inference.sampling import Sampler, settings
from jaxllm.inference.steps import Rows
from jaxllm.models.build import STACKS, Params, abstract_params
from jaxllm.models.config import ComputeConfig, ModelConfig
from jaxllm.planning import memory, schedule, topology
from jaxllm.planning.aot import Compiled, compile_lowered, laid_out, platform, resolved
from jaxllm.planning.network import Network
from jaxllm.planning.report import BASIS, GIB
from jaxllm.planning.topology import Topology
from jaxllm.sharding.config import MeshConfig
from jaxllm.sharding.mesh import make_mesh
from jaxllm.training.state import param_shardings


class DecodePlan(Record):
    """What is known of a decode step.

    Attributes:
      rows, slots: of the cache. parameters, cache, needed, available: GiB of a chip; needed is the compiler's figure.
      seconds: of a step, a model estimate; None where it does not fit, or for GPUs.
      bandwidth: parameters and cache, read once a step, as a share of the memory's bandwidth.
    """

    basis: str = BASIS
    topology: str
    rows: int
    slots: int
    parameters: float
    cache: float
    needed: float | None
    available: float
    seconds: float | None
    exposed: float | None
    bandwidth: float | None
    compile_seconds: float


def plan_decoding(model: ModelConfig, compute: ComputeConfig, place: Topology, rows: int, slots: int) -> DecodePlan:
    """Compile prefill and decode step on a mesh that splits every product, as `sample` has it.

    Args:
      rows: decoded at one time. slots: tokens of a row, of prompt and answer; half of them are prompt.
    Raises:
      ValueError: the model takes no rows so long.
    """
    if slots > model.max_seq_len:
        raise ValueError(f"--decode asks for rows of {slots} tokens, and model.max_seq_len={model.max_seq_len}")
    start, devices = time.perf_counter(), topology.devices(place)
    mesh, compute = make_mesh(MeshConfig(data=1, tensor=-1), devices), resolved(compute, place, model.n_layers)
    slots = bucket(slots, model.max_seq_len)
    params = _held(model, compute, mesh)
    prefill, step, *_ = programs(model, compute, Layout())
    number = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    asked = Rows(
        number(rows), number(4), number(), jax.ShapeDtypeStruct((rows, 2), jnp.uint32),
        settings(Sampler(temperature=0)), Rules(),
    )  # fmt: skip
    with jax.set_mesh(mesh):
        inputs = params, number(rows, slots // 2), number(rows), asked, None
        traced = prefill.trace(*inputs, slots=slots, new_slots=slots // 2)
        begun = traced.lower(lowering_platforms=(platform(place),)).compile()
        state = laid_out(traced.out_info, begun.output_shardings)
        lowered = step.trace(params, state).lower(lowering_platforms=(platform(place),))
    return _plan(place, mesh, compile_lowered(lowered, place, mesh, start), params, (rows, slots, state.cache))


def _held(model: ModelConfig, compute: ComputeConfig, mesh: Mesh) -> Params:
    """Return the parameters as shapes by layer, each with the sharding of its stack."""
    shardings = param_shardings(model, mesh)
    shapes = jax.eval_shape(lambda params: cut(params, compute.dtype), abstract_params(model))
    inner = lambda leaf: NamedSharding(mesh, PartitionSpec(*leaf.spec[1:]))
    spread = {
        name: dict.fromkeys(shapes[name], jax.tree.map(inner, part)) if name in STACKS else part
        for name, part in shardings.items()
    }
    return laid_out(shapes, spread)


def _plan(place: Topology, mesh: Mesh, compiled: Compiled, params: Params, cache: tuple) -> DecodePlan:
    rows, slots, kept = cache
    read, exposed, seconds = memory.of_device(params) + memory.of_device(kept), None, None
    if compiled.text and place.chip.kind == "tpu":
        found = schedule.estimate(compiled.text, Network.of(place, list(mesh.devices.flat)))
        seconds, exposed = found.seconds, found.exposed
    return DecodePlan(
        topology=str(place), rows=rows, slots=slots, parameters=memory.of_device(params) / GIB,
        cache=memory.of_device(kept) / GIB, needed=compiled.total / GIB if compiled.text else None,
        available=place.chip.hbm_bytes / GIB, seconds=seconds, exposed=exposed,
        bandwidth=read / seconds / place.chip.hbm_bandwidth if seconds else None, compile_seconds=compiled.seconds,
    )  # fmt: skip


def show(plan: DecodePlan, console: Console) -> None:
    """Print a plan of decoding."""
    console.print(
        f"{plan.topology}, {plan.rows} rows of {plan.slots} tokens: parameters {plan.parameters:.2f} GiB, cache "
        f"{plan.cache:.2f} GiB of a chip"
    )
    if plan.needed is None:
        console.print(f"it does not fit into {plan.available:.2f} GiB; take fewer rows, shorter ones or more chips")
        return
    console.print(f"it needs {plan.needed:.2f} GiB by the compiler's figure, of {plan.available:.2f} GiB")
    if plan.seconds:
        console.print(
            f"a step takes {1e3 * plan.seconds:.2f} ms, {plan.rows / plan.seconds:,.0f} tokens/s, of which collectives "
            f"are exposed {1e3 * plan.exposed:.2f} ms; {plan.bandwidth:.0%} of the memory's bandwidth ({plan.basis})"
        )
