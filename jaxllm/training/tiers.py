"""Two tiers of checkpoints: those of the run directory and, beside them and more often, fast ones on each host.

The fast tier is for what ends processes and leaves their machines alone. Each process writes the shards that it holds
into a directory of its host, in memory or on a disk. They belong to one line of the run: begun by a launch that starts
without them, gone on with by every launch that starts from them. RUN/fast.txt names the newest line, so that what an
older one left on some host, in whose place the run has taken other steps since, is never taken for newer.
"""

import hashlib
import shutil
from collections.abc import Mapping
from contextlib import suppress
from glob import escape, glob
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxllm.core import files
from jaxllm.training.checkpoint import Checkpoints, note, target
from jaxllm.training.config import CheckpointConfig
from jaxllm.training.state import TrainState

LINE = "fast.txt"
KEPT = 2  # one process may be a save ahead of another when both are killed
_MOST = KEPT + 2  # that a process can have: with one whose successor is whole, and one that is to be deleted


class Tiers(Checkpoints):
    """The checkpoints of a run directory, and those of its fast tier where `config.fast` has a directory.

    Where it is newer, a run goes on from the newest fast checkpoint that every process has.

    Args:
      launch: a number that all processes of this launch share.

    Attributes:
      fast: those of this process, or None.
    """

    def __init__(self, run_dir: Path, config: CheckpointConfig, launch: int):
        super().__init__(run_dir, config)
        self._file, self._launch, line = run_dir / LINE, launch, 0
        self.fast: Checkpoints | None = None
        self._newer: list[int] = []  # steps of fast checkpoints to go on from
        if config.fast.directory is None:
            self._file.unlink(missing_ok=True)  # or a later launch would go on from before this one
            return
        mark = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:12]  # other runs may have this name
        self._home = Path(config.fast.directory).expanduser().resolve() / f"{run_dir.resolve().name}-{mark}"
        with suppress(FileNotFoundError, ValueError):
            line = int(self._file.read_text(encoding="utf-8"))
        if line := int(multihost_utils.broadcast_one_to_all(np.int32(line))):
            self._open(line)
            self._newer = self._agreed()
        if not self._newer:
            self._begin()

    @property
    def resumes(self) -> bool:
        """Whether there is something to go on from."""
        return bool(self._newer or self.steps())

    def restore(
        self, abstract: TrainState, shardings: TrainState, same: Mapping[str, Any] | None = None
    ) -> tuple[TrainState, dict[str, Any]]:
        """As `Checkpoints.restore`, from the fast tier if that is newer and every process finds there what it needs."""
        for step in reversed(self._newer):
            state, meta, reason = self.fast.read(step, target(abstract, shardings), same or {})
            if not reason:
                note(f"step {step} is of the fast checkpoints in {self._home}")
                for later in self.fast.steps():  # which not all processes have
                    if later > step:
                        self.fast.delete(later)
                return state, meta
            note(f"the fast checkpoint of step {step} is of no use to these processes and this mesh ({reason})")
        if self._newer:
            self._newer = []
            self._begin()
        return super().restore(abstract, shardings, same)

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        if self.fast is not None:
            self.fast.__exit__(*exception)
            if exception[0] is None:  # the run directory has all of it
                self._file.unlink(missing_ok=True)
                self._sweep(0)

    def _begin(self) -> None:
        """Begin a line; all fast checkpoints that there are mean nothing from now on."""
        if jax.process_index() == 0:
            files.write_text(self._file, f"{self._launch}\n")
        self._open(self._launch)

    def _open(self, line: int) -> None:
        if self.fast is not None:
            self.fast.__exit__()
        self._sweep(line)
        place = self._home / f"process-{jax.process_index()}" / str(line)
        self.fast = Checkpoints(place, CheckpointConfig(keep_last=KEPT, keep_best=0), alone=True)

    def _sweep(self, line: int) -> None:
        """Remove what this host has of other lines; line 0: of all, what this process has and its part of the rest."""
        for path in map(Path, glob(f"{escape(str(self._home))}/process-*/*")):  # which bears that others remove theirs
            owner = int(path.parent.name.removeprefix("process-")) % jax.process_count()
            if path.name != str(line) and (line or owner == jax.process_index()):  # who it was, another may be now
                shutil.rmtree(path, ignore_errors=True)
            if not line:
                with suppress(OSError):  # there is more in it
                    path.parent.rmdir()
                    self._home.rmdir()

    def _agreed(self) -> list[int]:
        """Return the steps after the newest checkpoint of which every process has a fast one, ascending."""
        newest = max(self.steps(), default=0)
        own = [step for step in self.fast.steps() if step > newest][-_MOST:]
        told = multihost_utils.process_allgather(np.array(own + [0] * (_MOST - len(own)), np.int32))
        found = sorted(set.intersection(*map(set, told.tolist())) - {0})
        if not found:
            without = [process for process, steps in enumerate(told) if not steps.any()]
            why = f"process {', '.join(map(str, without))} has none" if without else "each process has others"
            note(f"no fast checkpoint in {self._home} is used: {why} after step {newest}")
        return found
