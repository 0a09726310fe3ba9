"""Compile the training step of a recipe for chips that are not here: the same function, on shapes instead of arrays."""

import gzip
import json
import re
import time
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from jaxllm.core import files
from jaxllm.core.batch import Batch
from jaxllm.models.build import AnyConfig
from jaxllm.models.config import ComputeConfig, ModelConfig, is_vae
from jaxllm.planning.topology import Topology
from jaxllm.sharding.config import MeshConfig
from jaxllm.sharding.mesh import make_mesh
from jaxllm.sharding.xla import compiler_options
from jaxllm.training.config import AdamW, Muon, StepConfig
from jaxllm.training.feed import batch_sharding
from jaxllm.training.optim import optimizer
from jaxllm.training.state import TrainState, abstract_state, param_shardings, state_shardings
from jaxllm.training.step import compile_step as jit_step

CACHE = Path("~/.cache/jaxllm/plans")
UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


class Job(NamedTuple):
    """What decides the program of a training step.

    Attributes:
      rows: of a global batch. compute: as in the recipe, not yet resolved for a platform.
    """

    model: AnyConfig
    compute: ComputeConfig
    optim: AdamW | Muon
    step: StepConfig
    mesh: MeshConfig
    rows: int
    seq_len: int


class Compiled(NamedTuple):
    """What the compiler says of a program.

    Attributes:
      text: the scheduled module. memory: bytes of a device: arguments, outputs, aliased, temporary, code; of a TPU the
        peak as well, of all but code. Either counts some room twice (programs that a compiler accepts have read more
        than their chip has, by both), so the smaller is an upper bound.
      seconds: of tracing and compilation, when it was done.
      problem: why it is no program that runs, in the compiler's words; "" = none.
      cached: an earlier plan had compiled it.
    """

    text: str
    memory: dict[str, int]
    seconds: float
    problem: str = ""
    cached: bool = False

    @property
    def total(self) -> int:
        """Bytes of memory that a device needs."""
        memory = self.memory
        held = memory["arguments"] + memory["outputs"] - memory["aliased"] + memory["temporary"]
        return min(held, memory.get("peak", held)) + memory["code"]


class Abstract(NamedTuple):
    """The arguments of a step, as shapes with shardings."""

    state: TrainState
    batch: Batch
    mesh: Mesh


def abstract(job: Job, devices: list[Any]) -> Abstract:
    """Return state and batch of `job` on a mesh of `devices`.

    Raises:
      ValueError: the mesh does not use the devices exactly.
    """
    return on_mesh(job, make_mesh(job.mesh, devices))


def on_mesh(job: Job, mesh: Mesh) -> Abstract:
    """Return state and batch of `job` on a mesh."""
    state = abstract_state(job.model, optimizer(job.optim), ema=job.step.ema_decay is not None)
    shardings = state_shardings(state, param_shardings(job.model, mesh), mesh, job.step.offload)
    shape = (job.rows, job.seq_len)
    field = lambda name: jnp.float32 if name == "weights" else jnp.int32
    batch = Batch(*(
        jax.ShapeDtypeStruct(shape, field(name), sharding=batch_sharding(mesh, shape)) for name in Batch._fields
    ))  # fmt: skip
    return Abstract(laid_out(state, shardings), batch, mesh)


def laid_out(tree: Any, shardings: Any) -> Any:
    """Return a tree of shapes with shardings."""
    put = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(put, tree, shardings)


def check_model(model: AnyConfig) -> None:
    """Refuse a model of another kind than plans are for.

    Raises:
      ValueError: it has an encoder.
    """
    if not isinstance(model, ModelConfig) or is_vae(model):
        raise ValueError("plans are for decoder-only models; this one has an encoder")


def compile_step(job: Job, topology: Topology, devices: list[Any]) -> Compiled:
    """Compile the training step of `job`, or take it from the cache."""
    start = time.perf_counter()
    state, batch, mesh = abstract(job, devices)
    compute = resolved(job.compute, topology, job.model.n_layers)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = jit_step(job.model, compute, job.optim, job.step, shardings)
    with jax.set_mesh(mesh):
        rate = jax.ShapeDtypeStruct((), jnp.float32)
        lowered = step.trace(state, batch, rate).lower(lowering_platforms=(platform(topology),))
    return compile_lowered(lowered, topology, mesh, start)


def resolved(compute: ComputeConfig, topology: Topology, layers: int) -> ComputeConfig:
    """Return how a model of so many layers is computed on its chips, as far as that can be compiled here."""
    compute = compute.resolve(topology.chip.kind, layers)
    if topology.chip.kind == "gpu" and compute.kernel == "auto":
        compute = compute.model_copy(update={"kernel": "xla"})  # cuDNN would have to be here, and asks the GPU
    return compute


def platform(topology: Topology) -> str:
    """Return the name of its platform, as programs are lowered for."""
    return "cuda" if topology.chip.kind == "gpu" else topology.chip.kind


def compile_lowered(lowered: jax.stages.Lowered, topology: Topology, mesh: Mesh, start: float) -> Compiled:
    """Compile a program, or take it from the cache: by its text, chips, options and versions of what compiles.

    Args:
      start: `time.perf_counter()` when its tracing began.
    """
    versions = [jax.__version__, *(f"{name} {metadata.version(name)}" for name in topology.compilers)]
    order, options = [str(each) for each in mesh.devices.flat], compiler_options(mesh.devices.flat[0])
    key = files.fingerprint(lowered.as_text(), json.dumps([str(topology), order, options, versions]))
    path = CACHE.expanduser() / f"{key}.json.gz"
    if path.exists():
        return Compiled(**json.loads(gzip.decompress(path.read_bytes())), cached=True)
    untuned = {"xla_gpu_autotune_level": "0"} if topology.chip.kind == "gpu" else None  # nothing here can be timed
    found = _compile(lowered, untuned)._replace(seconds=time.perf_counter() - start)
    kept = {name: value for name, value in found._asdict().items() if name != "cached"}
    files.write_bytes(path, gzip.compress(json.dumps(kept).encode()))
    return found


def _compile(lowered: jax.stages.Lowered, options: dict[str, str] | None) -> Compiled:
    try:
        compiled = lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return Compiled("", {}, 0.0, problem=str(error))
    analysis = compiled.memory_analysis()
    names = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporary": "temp"}
    memory = {name: getattr(analysis, f"{said}_size_in_bytes") for name, said in names.items()}
    memory["code"] = analysis.generated_code_size_in_bytes
    if options is None:  # of a TPU
        memory["peak"] = analysis.peak_memory_in_bytes
    return Compiled(compiled.as_text(), memory, 0.0)


class Shortage(NamedTuple):
    """Of a program that does not fit, in bytes (0 = not said); and its largest buffers, (bytes, what they are)."""

    needed: float
    available: float
    buffers: list[tuple[float, str]]


def shortage(problem: str) -> Shortage:
    """Read what the compiler says about memory that is not there.

    Example: "... temporaries (47.70G) exceeds available HBM (15.75G)." -> 47.7 GiB needed, arguments and all, of 15.75
    """
    size = r"([\d.]+)([KMGT]?)"
    pairs = (rf"\({size}\) exceeds available HBM \({size}\)", rf"Used {size} of {size} hbm")
    found = next((match for pair in pairs if (match := re.search(pair, problem))), None)
    needed, available = (0.0, 0.0) if found is None else (_bytes(*found.groups()[:2]), _bytes(*found.groups()[2:]))
    buffers = re.findall(rf"Size: {size}\w*\s+(?:Operator: op_name=\"([^\"]*)\"|)[^\n]*\s*Shape: (\S+)", problem)
    return Shortage(needed, available, [(_bytes(n, unit), f"{shape} {op}".strip()) for n, unit, op, shape in buffers])


def _bytes(number: str, unit: str) -> float:
    return float(number) * UNITS[unit]
