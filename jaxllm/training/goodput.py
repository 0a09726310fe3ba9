"""Goodput: which share of the wall time since a run began made updates that count."""

import json
import os
import time
from pathlib import Path

import jax

from jaxllm.training.metrics import read

FILE_NAME = "starts.jsonl"


class Goodput:
    """Productive seconds / seconds since the first start, over kills, restarts and all that was in between.

    Productive is the time of updates without compilation and without waiting for data. Updates that a kill undid do not
    count, nor do evaluation, samples, the blocking part of checkpoints, start-up and the time between two processes.

    Args:
      before: records of timing.jsonl up to the step that this process goes on from.
    """

    def __init__(self, run_dir: Path, step: int, before: list[dict]):
        self._productive_s = max((record.get("productive_s", 0.0) for record in before), default=0.0)
        starts = read(run_dir / FILE_NAME)
        now = {"step": step, "time": time.time(), "processes": jax.process_count(), "devices": jax.device_count()}
        self._begin_s = starts[0]["time"] if starts else now["time"]
        if jax.process_index() == 0:
            with open(run_dir / FILE_NAME, "a", encoding="utf-8") as file:
                file.write(json.dumps({**now, "pid": os.getpid()}) + "\n")

    def add(self, seconds: float) -> None:
        """Count the productive seconds of an update."""
        self._productive_s += max(seconds, 0.0)

    def values(self) -> dict[str, float]:
        """Return what timing.jsonl gets."""
        wall_s = max(time.time() - self._begin_s, 1e-9)
        return {"productive_s": self._productive_s, "wall_s": wall_s, "goodput": self._productive_s / wall_s}


def device_memory() -> dict[str, float]:
    """Return the bytes in use on this process's first device, now and at most so far; empty where nobody counts."""
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "hbm_bytes", "peak_bytes_in_use": "hbm_peak_bytes", "bytes_limit": "hbm_limit_bytes"}
    return {name: float(stats[key]) for key, name in names.items() if key in stats}
