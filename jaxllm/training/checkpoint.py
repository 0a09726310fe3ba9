"""Checkpoints: asynchronous, atomic, restorable onto any mesh. The only module that knows Orbax.

A checkpoint has the items `params` (and `ema`), which inference reads alone, `rest` (optimizer and counters) and `meta`
(JSON: step, sample index, fingerprints). Orbax writes into a temporary directory and renames it, so that a kill at any
moment leaves either the whole checkpoint or none.
"""

import json
import logging
import operator
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint import checkpoint_managers as managers

from jaxllm.core.bucket import origin, remove
from jaxllm.models.build import AnyConfig, Params, abstract_params
from jaxllm.training.config import CheckpointConfig
from jaxllm.training.state import TrainState

log = logging.getLogger(__name__)
# Orbax says at each load that what was opened for reading is read-only, at each save that there is no validation loss,
# and prints the traceback of a failed write that `wait` raises anyway.
_NOISE = re.compile("read.only|tracked_metric|_SignalingThread")
logging.getLogger("absl").addFilter(lambda record: not _NOISE.search(record.getMessage()))
# Replicas that share the writing of an array compile a program for the part of each, which pays for large parts alone.
_ARRAYS = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=1 << 20)
ocp.type_handlers.register_type_handler(jax.Array, _ARRAYS, override=True)
_val_loss = operator.itemgetter("val_loss")
_WRITE_ERRORS = (ValueError, OSError, KeyError)  # what Orbax raises for files that cannot be written


class Checkpoints:
    """The checkpoints of one run directory; use as a context manager, so that pending writes end and errors surface.

    Args:
      alone: `run_dir` is of this process, which writes and reads what it holds of a state, and waits for no other.
    """

    def __init__(self, run_dir: str | Path, config: CheckpointConfig | None = None, *, alone: bool = False):
        config = CheckpointConfig() if config is None else config
        # A relative directory would fail only later, in the background writer.
        self.directory = origin(run_dir) / "checkpoints"
        policies = [managers.LatestN(config.keep_last)]
        if config.keep_best:
            best = managers.BestN(
                get_metric_fn=_val_loss, reverse=True, n=config.keep_best, keep_checkpoints_without_metrics=False
            )
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies), cleanup_tmp_directories=True,
            best_fn=_val_loss, best_mode="min",  # or Orbax keeps the losses in memory alone, and a resume forgets them
        )  # fmt: skip
        _drop_damaged_losses(self.directory)
        handlers = _only_here(options) if alone else None
        if alone:  # which Orbax leaves to us
            self.directory.mkdir(parents=True, exist_ok=True)
        self._manager = ocp.CheckpointManager(self.directory, options=options, item_handlers=handlers)
        self._writing: int | None = None
        self._less = "set checkpoint.fast.directory=none" if alone else "lower checkpoint.keep_last and keep_best"

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Return the steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState | Params, meta: dict[str, Any], val_loss: float | None = None) -> None:
        """Write a state in the background; blocks only while the arrays are copied off the devices.

        Args:
          state: or the parameters alone, of a model that was imported or merged.
          meta: JSON values that resume needs; must hold "step".
          val_loss: what `keep_best` ranks by.
        Raises:
          OSError: this checkpoint, or the one before in the background, could not be written.
        """
        items = _items(state) if isinstance(state, TrainState) else {"params": state}
        metrics = None if val_loss is None else {"val_loss": val_loss}
        saves = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
        self.wait()  # so that an error is said of the checkpoint that it belongs to
        sums = {name: _bit_sums(tree) for name, tree in items.items()}
        args = ocp.args.Composite(meta=ocp.args.JsonSave({**meta, "bit_sums": sums}), **saves)
        self._writing = meta["step"]
        with self._write_errors():
            self._manager.save(self._writing, args=args, metrics=metrics, force=True)

    @property
    def writing(self) -> str:
        """What goes on in the background, in words, or ""; any thread may ask."""
        return f"while the checkpoint of step {self._writing} is written" * self._manager.is_saving_in_progress()

    def wait(self) -> None:
        """Block until pending writes are on disk.

        Raises:
          OSError: a checkpoint could not be written; the message has the reason and the newest complete one.
        """
        with self._write_errors():
            self._manager.wait_until_finished()

    @contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except _WRITE_ERRORS as error:
            complete = self.steps()
            raise OSError(
                f"checkpoint {self.directory / str(self._writing)} could not be written ({_reason(error)}); "
                + (f"the newest complete one is of step {complete[-1]}" if complete else "there is no earlier one")
                + f"; make room on the disk, or {self._less}, and resume the run"
            ) from error

    def delete(self, step: int) -> None:
        """Delete a checkpoint."""
        self._manager.delete(step)

    def meta(self, step: int) -> dict[str, Any]:
        """Return the JSON of checkpoint `step`."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(
        self, abstract: TrainState, shardings: TrainState, same: Mapping[str, Any] | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """Return (state, meta) of the newest checkpoint that can be read, laid out as `shardings`.

        Damaged newer ones are reported and moved to damaged/, or they would be in the way of what is saved next.

        Args:
          same: what must be equal in the checkpoint's meta["fingerprints"], by key.
        Raises:
          ValueError: no checkpoint can be read, with the reason for each; or it differs in what must be the same.
        """
        failures: dict[int, str] = {}
        for step in reversed(self.steps()):
            state, meta, reason = self.read(step, target(abstract, shardings), same or {})
            if reason:
                failures[step] = reason
                continue
            for damaged, why in failures.items():
                place = self._set_aside(damaged)
                note(f"the checkpoint of step {damaged} is damaged ({why}), and now in {place}; step {step} is used")
            return state, meta
        reasons = "; ".join(f"step {step}: {reason}" for step, reason in failures.items())
        raise ValueError(f"no readable checkpoint in {self.directory}: {reasons or 'it is empty'}")

    def read(self, step: int, target: TrainState, same: Mapping[str, Any]) -> tuple[TrainState | None, dict, str]:
        """Return (state, meta, "") of one checkpoint, or the reason why not all processes can read it.

        Raises:
          ValueError: as `restore`, of what must be the same.
        """
        items = {name: _restore_args(tree) for name, tree in _items(target).items()}
        meta, changed, restored, reason = {}, [], {}, ""
        try:
            meta = self.meta(step)
            changed = _changed(meta.get("fingerprints", {}), same)
            restored = {} if changed else self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:  # catch-all: Orbax raises a bare Exception for an array cut short
            reason = _damage(error)
        if changed:  # the user's error, and never a reason to take an older checkpoint
            raise ValueError(
                f"{self.directory / str(step)} was trained with {' and '.join(changed)}; restore the old one, or start "
                "a new run with `out` and `start_from`"
            )
        if not _any_process(bool(reason)):  # or one would wait in the sums for another
            reason = _other_bits(restored, meta)
        if _any_process(bool(reason)):
            return None, {}, reason or "another process cannot read it"
        return TrainState(params=restored["params"], ema=restored.get("ema"), **restored["rest"]), meta, ""

    def _set_aside(self, step: int) -> Path:
        """Move a damaged checkpoint out of the way, without deleting it: the disk may be at fault."""
        place = self.directory.parent / "damaged" / str(step)
        if jax.process_index() == 0:
            remove(place)
            place.parent.mkdir(exist_ok=True)
            # A bucket has no empty directories, and epath renames into none that is missing.
            (place.parent / "README").write_text("Checkpoints that could not be read.\n")
            (self.directory / str(step)).rename(place)
        multihost_utils.sync_global_devices(f"checkpoint {step} is set aside")
        self._manager.reload()
        return place


def _only_here(options: ocp.CheckpointManagerOptions) -> dict[str, ocp.CheckpointHandler]:
    """Have a manager wait for no other process, and return what writes the shards that this one has, each once."""
    me = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
    options.multiprocessing_options, options.create = alone, False
    # That these are made is announced under keys that all processes share.
    options.async_options = ocp.AsyncOptions(create_directories_asynchronously=False)
    arrays = ocp.type_handlers.ArrayHandler(primary_host=me, replica_id=None, use_replica_parallel=False)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    tree = lambda: ocp.PyTreeCheckpointHandler(multiprocessing_options=alone, type_handler_registry=registry)
    meta = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
    return {"params": tree(), "ema": tree(), "rest": tree(), "meta": meta}


def _drop_damaged_losses(directory: Path) -> None:
    """Forget validation losses that cannot be read; Orbax reads all of them, and would refuse the whole run."""
    for path in directory.glob("[0-9]*/metrics/metrics") if jax.process_index() == 0 else ():
        try:
            json.loads(path.read_text(encoding="utf-8"))["val_loss"]
        except (ValueError, KeyError, TypeError):
            note(f"{path} is damaged and is dropped: this checkpoint no longer counts among the best")
            remove(path.parent)


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name every key that differs, with both values."""
    return [f"another {key} ({before[key]}, now {now[key]})" for key in now if before.get(key, now[key]) != now[key]]


def target(abstract: Any, shardings: Any) -> Any:
    """Return the tree of shapes with their places, as Orbax wants it."""
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, abstract, shardings)


def _restore_args(target: Any) -> ocp.args.PyTreeRestore:
    return ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))


def _any_process(value: bool) -> bool:
    """Whether `value` is true in any process; all of them must ask."""
    if jax.process_count() == 1:
        return value
    return bool(np.any(multihost_utils.process_allgather(np.asarray(value))))


def note(text: str) -> None:
    """Say something once, on stderr."""
    if jax.process_index() == 0:
        sys.stderr.write(f"note: {text}\n")


def _damage(error: Exception) -> str:
    """Say why a checkpoint cannot be read; what Orbax says of it is logged at the level DEBUG."""
    log.debug("a checkpoint cannot be read", exc_info=error)
    if "tree structures do not match" in str(error):
        return "its arrays are not those of this model and optimizer"
    return "a file of it is missing, cut short or changed"


def _reason(error: Exception) -> str:
    text = " ".join(str(error).partition("See full TensorStore")[0].split())
    return f"{type(error).__name__}: {text[:300]}"


def _bit_sums(tree: Any) -> list[int]:
    """Return the sum of the bits of each leaf as integers, modulo 2^32: the same in any order and on any mesh."""
    leaves = jax.tree.leaves(tree)
    sharding = leaves[0].sharding
    everywhere = NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else None
    sums = jax.jit(_sums_of, out_shardings=everywhere)
    # What waits in the host's memory goes through the device's leaf by leaf: for all of it there is no room.
    away = any(leaf.sharding.memory_kind == "pinned_host" for leaf in leaves)
    parts = [[leaf] for leaf in leaves] if away else [leaves]
    return [each for part in parts for each in np.asarray(sums(part)).tolist()]


def _sums_of(leaves: list[jax.Array]) -> jax.Array:
    near = lambda leaf: jax.device_put(leaf, jax.memory.Space.Device)
    bits = lambda leaf: jax.lax.bitcast_convert_type(near(leaf), f"uint{8 * leaf.dtype.itemsize}")
    return jnp.stack([jnp.sum(bits(leaf).astype(jnp.uint32), dtype=jnp.uint32) for leaf in leaves])


def _other_bits(restored: Mapping[str, Any], meta: dict[str, Any]) -> str:
    """Name the items that are not what was written, or return ""; Orbax's files have no checksums."""
    sums = meta.pop("bit_sums", {})
    other = [name for name, tree in restored.items() if name in sums and _bit_sums(tree) != sums[name]]
    names = " and ".join(other)
    return f"the bits of {names} are not those that were written: a file was damaged or changed" if other else ""


def _items(state: TrainState) -> dict[str, Any]:
    """Return the parts of a state that are written, and read, apart."""
    rest = {"step": state.step, "opt_state": state.opt_state, "norm_mean": state.norm_mean}
    return {"params": state.params, "rest": rest} | ({} if state.ema is None else {"ema": state.ema})


def load_params(
    run_dir: str | Path, model: AnyConfig, *, step: int | None = None, shardings: Any = None
) -> tuple[Params, dict[str, Any]]:
    """Read the parameters alone (the moving average where the run kept one), on one device or as `shardings` says.

    Args:
      step: which checkpoint; None = the newest.
    Returns:
      (params, meta of the checkpoint).
    Raises:
      ValueError: no such checkpoint, with the steps there are; or it is damaged, with the one before.
    """
    directory = origin(run_dir) / "checkpoints"
    if not directory.is_dir():
        raise ValueError(f"{run_dir} has no checkpoints/ directory; give a run directory written by train or tune")
    _drop_damaged_losses(directory)
    options = ocp.CheckpointManagerOptions(read_only=True, create=False)
    with ocp.CheckpointManager(directory, options=options) as manager:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            hint = f"it has steps {steps}" if steps else "there is none yet"
            raise ValueError(f"{directory} has no checkpoint{'' if step is None else f' {step}'}; {hint}")
        step = steps[-1] if step is None else step
        shapes = abstract_params(model)
        if shardings is None:
            shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), shapes)
        item = "ema" if (directory / str(step) / "ema").exists() else "params"
        args = {item: _restore_args(target(shapes, shardings)), "meta": ocp.args.JsonRestore()}
        try:
            restored = manager.restore(step, args=ocp.args.Composite(**args))
            reason = _other_bits({item: restored[item]}, restored["meta"])
        except Exception as error:  # catch-all: as in `Checkpoints.read`
            reason = _damage(error)
        if reason:
            before = [each for each in steps if each < step]
            raise ValueError(
                f"{directory / str(step)} cannot be read ({reason}); "
                + (f"use the one before: {directory / str(before[-1])}" if before else "there is no earlier one")
            )
        return restored[item], restored["meta"]
