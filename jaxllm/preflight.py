"""train --check: everything about a run that can be known in seconds, before anything of the model is compiled.

Each check is a line: what was looked at and what was found, or what is wrong and what to do.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from rich.console import Console
from rich.markup import escape

from jaxllm.core.batch import Batch
from jaxllm.core.bucket import here, is_twin, named, origin, remove
from jaxllm.core.wording import count
from jaxllm.data.loader import Loader
from jaxllm.data.tokenizers import tokenizer as tokenizers
from jaxllm.locate import look
from jaxllm.models import accounting
from jaxllm.recipe import FILE_NAME, Recipe, check
from jaxllm.run import Run
from jaxllm.sharding import distributed
from jaxllm.sharding.mesh import make_mesh
from jaxllm.training.checkpoint import Checkpoints
from jaxllm.training.optim import optimizer
from jaxllm.training.state import TrainState, abstract_state, param_shardings, state_shardings
from jaxllm.training.tiers import KEPT
from jaxllm.wiring import check_home, total_steps

N_ROWS = 64  # of the order of training that are looked at, from its beginning


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    good: bool
    text: str


def preflight(recipe: Recipe) -> Iterator[Finding]:
    """Yield what each check found; data that cannot be opened ends them, because nothing else has a meaning then."""
    distributed.start(recipe.platform, recipe.data.batch_size // recipe.step.accumulate)
    run_dir = here(recipe.out)
    yield _finding("run directory", lambda: _home(run_dir, recipe))
    try:
        loader = Loader(recipe.data, "train")
    except (ValueError, OSError) as error:
        yield Finding("data", False, str(error))
        return
    yield Finding("data", True, _data(loader))
    agreed = _finding("recipe", lambda: _recipe(recipe, loader))
    yield agreed
    yield _finding("length", lambda: count(total_steps(recipe, loader, 0, 0), "step"))
    yield _finding("tokenizer", lambda: _tokenizer(loader))
    yield _finding("learned tokens", lambda: _coverage(loader))
    if recipe.start_from is not None:
        size = lambda: accounting.param_count(look(recipe.start_from, encoders=True)[0])
        yield _finding("start_from", lambda: f"{recipe.start_from}: {size():,} parameters")
    if not agreed.good:  # nothing can be built of it
        return
    try:
        mesh = make_mesh(recipe.mesh)
        run = Run(recipe, loader, mesh)
    except ValueError as error:
        yield Finding("mesh and data", False, str(error))
        return
    shape = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1)
    yield Finding("mesh and data", True, f"{count(mesh.size, 'device')}: {shape or 'no axis is split'}")
    kernels = f"{run.compute.dtype} by XLA on {jax.default_backend()}, attention by {run.kernel}"
    yield Finding("computation", True, f"{kernels}, layers={run.compute.layers}, remat={run.compute.remat}")
    state = abstract_state(recipe.model, optimizer(recipe.optim), ema=recipe.step.ema_decay is not None)
    yield _finding("memory", lambda: _memory(run))
    kept, fast = recipe.checkpoint.keep_last + recipe.checkpoint.keep_best, recipe.checkpoint.fast.directory
    hint = "lower checkpoint.keep_last or keep_best, or set `out` to a larger disk"
    yield _finding("disk", lambda: _disk(run_dir, kept, _bytes(state), hint))
    yield _finding("checkpoint", lambda: _write(run_dir))
    if fast is not None:
        hint = "set checkpoint.fast.directory to a larger disk, or none"
        yield _finding("fast checkpoints", lambda: _disk(Path(fast).expanduser(), KEPT, _held_bytes(run, state), hint))
        yield _finding("fast checkpoint", lambda: _write(Path(fast).expanduser()))


def report(recipe: Recipe) -> int:
    """Print what `preflight` finds, line by line; return 1 if something is wrong, else 0."""
    console, wrong = Console(highlight=False, soft_wrap=True), 0
    for finding in preflight(recipe):
        wrong += not finding.good
        mark = "[green]ok   [/]" if finding.good else "[bold red]wrong[/]"
        console.print(f"{mark} {finding.name:16s}", escape(finding.text))
    console.print(f"{count(wrong, 'thing')} to mend" if wrong else "nothing is wrong; train it without --check")
    return int(wrong > 0)


def _finding(name: str, look: Callable[[], str]) -> Finding:
    try:
        return Finding(name, True, look())
    except (ValueError, OSError) as error:
        return Finding(name, False, str(error))


def _home(run_dir: Path, recipe: Recipe) -> str:
    check_home(run_dir, recipe)
    return f"{named(run_dir)} {'holds this run, which goes on' if (run_dir / FILE_NAME).exists() else 'is free'}"


def _data(loader: Loader) -> str:
    nouns = {"chat": "conversation", "text": "document"}
    sizes = (f"{count(len(each), nouns[each.kind])}, {int(each.starts[-1]):,} tokens" for each in loader.datasets)
    parts = [f"{each.directory}: {size}" for each, size in zip(loader.datasets, sizes, strict=True)]
    return f"{'; '.join(parts)}; an epoch has {count(loader.samples_per_epoch, 'row')} of {loader.plans[0].seq_len}"


def _recipe(recipe: Recipe, loader: Loader) -> str:
    check(recipe, vocab_size=loader.vocab_size, n_devices=jax.device_count())
    return f"{accounting.param_count(recipe.model):,} parameters; batch, accumulation, mesh and lengths agree"


def _tokenizer(loader: Loader) -> str:
    """Ids in range, and what ends a text: bos, eos and padding must be told apart, and eos must be learned."""
    tok = tokenizers.load(loader.tokenizer_dir)
    ids = {"pad": tok.pad_id, "bos": tok.bos_id, "eos": tok.eos_id}
    if wrong := [f"{name}={token}" for name, token in ids.items() if not 0 <= token < tok.vocab_size]:
        raise ValueError(f"{', '.join(wrong)} of {loader.tokenizer_dir} is no id of 0 ... {tok.vocab_size - 1}")
    for dataset in loader.datasets:
        some = range(0, len(dataset), max(1, len(dataset) // N_ROWS))
        largest = max(int(dataset.tokens(document).max()) for document in some)
        if largest >= tok.vocab_size:
            raise ValueError(
                f"{dataset.directory} has id {largest}, and its tokenizer {tok.vocab_size}; prepare it again"
            )
        if not any(dataset.trained(document)[-1] for document in some):
            raise ValueError(
                f"no text of {dataset.directory} ends with a learned token, so the model would never stop; its chat "
                "template must end the answers with the end token inside {% generation %}"
            )
    same = " (eos is the padding as well; padding has no weight)" * (tok.pad_id == tok.eos_id)
    shown = ", ".join(f"{name}={token}" for name, token in ids.items())
    return f"{tok.vocab_size:,} ids, {shown}{same}; ends are learned"


def _coverage(loader: Loader) -> str:
    """Rows of the beginning: each must teach something."""
    n_rows = min(N_ROWS, loader.samples_per_epoch)
    rows = [loader.row(sample) for sample in range(n_rows)]
    learned, filled = (
        np.array([getattr(row, name).astype(bool).mean() for row in rows]) for name in Batch._fields[2:4]
    )
    if not learned.all():
        raise ValueError(f"sample {int(learned.argmin())} has no learned token")
    return (
        f"{learned.mean():.1%} of the positions of the first {count(n_rows, 'row')} ({learned.min():.1%} at least), "
        f"{1 - filled.mean():.1%} padding"
    )


def _memory(run: Run) -> str:
    text, needed = run.memory()
    available = _device_bytes()
    if available is not None and needed > available:
        raise ValueError(
            f"{text}; a device has {available / 1e9:.1f} GB: raise step.accumulate, set compute.remat=full, or split "
            "the model over more devices (mesh.fsdp)"
        )
    return text + ("" if available is None else f"; a device has {available / 1e9:.1f} GB")


def _device_bytes() -> float | None:
    """Memory of one device, as far as the platform tells: of a CPU, its share of the host's."""
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        total = next(int(line.split()[1]) for line in lines if line.startswith("MemTotal"))
        return total * 1024 / jax.local_device_count()
    return None


def _disk(place: Path, kept: int, one: int, hint: str) -> str:
    """Room for all the checkpoints that are kept, of `one` bytes each, and for the one that is being written."""
    text = f"{count(kept, 'checkpoint')} of {one / 1e9:.3g} GB and one in writing"
    if is_twin(place):
        return f"{text}, all of them in the bucket"
    free = shutil.disk_usage(_existing(place)).free
    if (kept + 1) * one > free:
        raise ValueError(f"{text}, {free / 1e9:.1f} GB free: {hint}")
    return f"{text}, {free / 1e9:.1f} GB free"


def _bytes(state: TrainState) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _held_bytes(run: Run, state: TrainState) -> int:
    """Of a state what this process holds, and writes into its fast tier."""
    places = state_shardings(state, param_shardings(run.recipe.model, run.mesh), run.mesh)

    def held(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> int:
        parts = {str(part) for part in sharding.addressable_devices_indices_map(leaf.shape).values()}
        return len(parts) * math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(held, state, places)))


def _write(run_dir: Path) -> str:
    """Write a checkpoint of a few bytes where the run will be, read it back, and remove it."""
    place = run_dir if is_twin(run_dir) else _existing(run_dir)
    probe = place / f".jaxllm-check-{os.getpid()}"
    try:
        with Checkpoints(probe) as checkpoints:
            checkpoints.save({"probe": jax.numpy.arange(4.0)}, {"step": 0})
            checkpoints.wait()
            if checkpoints.steps() != [0]:
                raise ValueError(f"a checkpoint that was written into {origin(place)} is not found again")
    finally:
        remove(origin(probe))
    return f"written and found again in {origin(place)}"


def _existing(path: Path) -> Path:
    return next(each for each in (path.resolve(), *path.resolve().parents) if each.is_dir())
