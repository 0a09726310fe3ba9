"""Checkpoints: asynchronous, atomic, restorable onto any mesh. The only module that knows Orbax.

A checkpoint has the items `params` (and `ema`), which inference reads alone, `rest` (optimizer and counters) and `meta`
(JSON: step, sample index, fingerprints). Orbax writes into a temporary directory and renames it, so that a kill at any
moment leaves either the whole checkpoint or none.
"""

import logging
import re
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from jaxllm.models.config import ModelConfig
from jaxllm.models.decoder import Params, abstract_params
from jaxllm.training.config import CheckpointConfig
from jaxllm.training.state import TrainState

log = logging.getLogger(__name__)
# Orbax says at each load that what was opened for reading is read-only.
logging.getLogger("absl").addFilter(lambda record: not re.search("read.only", record.getMessage()))


class Checkpoints:
    """The checkpoints of one run directory; use as a context manager, so that pending writes end and errors surface."""

    def __init__(self, run_dir: str | Path, config: CheckpointConfig | None = None):
        config = CheckpointConfig() if config is None else config
        # A relative directory would fail only later, in the background writer.
        self.directory = (Path(run_dir) / "checkpoints").resolve()
        policies = [managers.LatestN(config.keep_last)]
        if config.keep_best:
            best = managers.BestN(
                get_metric_fn=lambda metrics: metrics["val_loss"], reverse=True, n=config.keep_best,
                keep_checkpoints_without_metrics=False,
            )  # fmt: skip
            policies.append(best)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=managers.AnyPreservationPolicy(policies), cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """Return the steps that have a complete checkpoint, ascending."""
        return sorted(self._manager.all_steps())

    def save(self, state: TrainState, meta: dict[str, Any], val_loss: float | None = None) -> None:
        """Write `state` in the background; blocks only while the arrays are copied off the devices.

        Args:
          meta: JSON values that resume needs; must hold "step".
          val_loss: what `keep_best` ranks by.
        """
        items = {"params": ocp.args.StandardSave(state.params), "rest": ocp.args.StandardSave(_rest(state))}
        if state.ema is not None:
            items["ema"] = ocp.args.StandardSave(state.ema)
        self._save(meta, items, val_loss)

    def save_params(self, params: Params, meta: dict[str, Any]) -> None:
        """Write a model without training state (an imported or merged one)."""
        self._save(meta, {"params": ocp.args.StandardSave(params)}, None)

    def _save(self, meta: dict[str, Any], items: dict[str, Any], val_loss: float | None) -> None:
        step = meta["step"]
        if step in self._manager.all_steps():  # left by a run that had to fall back to an older checkpoint
            self._manager.delete(step)
        metrics = None if val_loss is None else {"val_loss": val_loss}
        args = ocp.args.Composite(meta=ocp.args.JsonSave(meta), **items)
        self._manager.save(step, args=args, metrics=metrics, force=True)

    def wait(self) -> None:
        """Block until pending writes are on disk; raises what went wrong in the background."""
        self._manager.wait_until_finished()

    def meta(self, step: int) -> dict[str, Any]:
        """Return the JSON of checkpoint `step`."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, abstract: TrainState, shardings: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """Return (state, meta) of the newest checkpoint that can be read, laid out as `shardings`.

        A damaged newest checkpoint is reported and removed, and the one before it is used.

        Raises:
          ValueError: no checkpoint can be read; the message has the reason for each.
        """
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract, shardings
        )
        items = {"params": ocp.args.StandardRestore(target.params), "rest": ocp.args.StandardRestore(_rest(target))}
        if abstract.ema is not None:
            items["ema"] = ocp.args.StandardRestore(target.ema)
        failures = []
        for step in reversed(self.steps()):
            try:
                restored = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore(), **items))
            except (ValueError, OSError, KeyError, FileNotFoundError) as error:
                failures.append(f"step {step}: {type(error).__name__}: {str(error)[:300]}")
                log.warning("checkpoint %s cannot be read and is skipped: %s", self.directory / str(step), failures[-1])
                continue
            rest = restored["rest"]
            ema = restored["ema"] if abstract.ema is not None else None
            state = TrainState(rest["step"], restored["params"], rest["opt_state"], ema, rest["norm_mean"])
            return state, restored["meta"]
        raise ValueError(f"no readable checkpoint in {self.directory}: {'; '.join(failures) or 'it is empty'}")


def _rest(state: TrainState) -> dict[str, Any]:
    return {"step": state.step, "opt_state": state.opt_state, "norm_mean": state.norm_mean}


def load_params(
    run_dir: str | Path, model: ModelConfig, *, step: int | None = None, shardings: Any = None
) -> tuple[Params, dict[str, Any]]:
    """Read the parameters alone (the moving average where the run kept one), on one device or as `shardings` says.

    Args:
      step: which checkpoint; None = the newest.
    Returns:
      (params, meta of the checkpoint).
    Raises:
      ValueError: no such checkpoint; the message lists the steps there are.
    """
    directory = (Path(run_dir) / "checkpoints").resolve()
    if not directory.is_dir():
        raise ValueError(f"{run_dir} has no checkpoints/ directory; give a run directory written by train or tune")
    options = ocp.CheckpointManagerOptions(read_only=True, create=False)
    with ocp.CheckpointManager(directory, options=options) as manager:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            raise ValueError(f"{directory} has no checkpoint {'' if step is None else step}; it has steps {steps}")
        step = steps[-1] if step is None else step
        target = abstract_params(model)
        if shardings is None:
            shardings = jax.tree.map(lambda _: jax.sharding.SingleDeviceSharding(jax.local_devices()[0]), target)
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), target, shardings
        )
        item = "ema" if (directory / str(step) / "ema").exists() else "params"
        args = {item: ocp.args.StandardRestore(target), "meta": ocp.args.JsonRestore()}
        restored = manager.restore(step, args=ocp.args.Composite(**args))
        return restored[item], restored["meta"]
