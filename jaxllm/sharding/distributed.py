"""Start-up of JAX: devices, processes, compile cache. Call `start` once, before anything touches a device."""

import ctypes
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import Field, model_validator

from jaxllm.core.config import Config

WAIT_S = 10.0  # before it is said that other processes are waited for
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # glibc's malloc.h


class PlatformConfig(Config):
    """How JAX starts in this process."""

    cpu_devices: int | None = Field(
        None, ge=1, description="virtual devices on a CPU; none = as many cores as divide the batch"
    )
    compile_cache: str | None = Field(
        "~/.cache/jaxllm/xla",
        description="directory of compiled programs, reused by later runs, or gs://...; none = off",
    )
    keep_memory: bool = Field(
        True,
        description="on a CPU, keep what a step has freed for the next one: a tenth to a quarter faster, and two to "
        "four times the estimated memory may be held",
    )
    distributed: bool = Field(
        False, description="join a multi-process run with jax.distributed; found out by itself on TPU pods, Slurm, GKE"
    )
    coordinator: str | None = Field(None, description="elsewhere: HOST:PORT of process 0, the same in every process")
    n_processes: int | None = Field(None, ge=1, description="elsewhere: how many processes there are")
    process_index: int | None = Field(None, ge=0, description="elsewhere: which of them this is, from 0")
    silence_s: float = Field(
        60.0, ge=1, description="how long another process may give no sign of life before this one ends, seconds"
    )

    @model_validator(mode="after")
    def _check_processes(self) -> "PlatformConfig":
        given = [self.coordinator, self.n_processes, self.process_index]
        if any(value is not None for value in given) and (None in given or not self.distributed):
            raise ValueError(
                f"coordinator={self.coordinator}, n_processes={self.n_processes}, process_index={self.process_index}, "
                f"distributed={str(self.distributed).lower()}: give the three together, with distributed=true"
            )
        return self


def start(config: PlatformConfig, rows: int = 1) -> None:
    """Configure JAX and join the other processes, if any.

    Args:
      rows: of a microbatch, over all processes: the virtual devices of a CPU share them.
    Raises:
      ValueError: nothing here says who the other processes are.
    """
    import jax

    if "XLA_PYTHON_CLIENT_MEM_FRACTION" not in os.environ:  # the name that it had before
        os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")  # of a GPU; by JAX's 0.75 no H200 has room for 7B
    if config.compile_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compile_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if config.distributed:
        # [] are all GPUs of a node: where Slurm has one process on each, JAX would take one GPU alone.
        gpus = [] if os.environ.get("SLURM_NTASKS", "") == os.environ.get("SLURM_STEP_NUM_NODES") else None
        # JAX's own watch, whose message names nobody, comes after ours (training.heartbeat).
        with _joining(config):
            jax.distributed.initialize(
                config.coordinator, config.n_processes, config.process_index, gpus,
                heartbeat_timeout_seconds=max(100, int(2 * config.silence_s)),
            )  # fmt: skip
    if _cpu_only():
        if config.keep_memory:
            _keep_freed_memory()
        _set_cpu_devices(config.cpu_devices, rows // (config.n_processes or 1))


@contextmanager
def _joining(config: PlatformConfig) -> Iterator[None]:
    """Say for whom this process waits, if it does, and what is missing where JAX finds no cluster."""
    place = f" of {config.n_processes} at {config.coordinator}" if config.coordinator else ""
    said = threading.Timer(WAIT_S, sys.stderr.write, (f"waiting for the other processes{place}\n",))
    said.start()
    try:
        yield
    except ValueError as error:
        if config.coordinator:
            raise
        raise ValueError(
            f"platform.distributed=true, and no TPU pod, Slurm or GKE was found here ({error}); set "
            "platform.coordinator=HOST:PORT, platform.n_processes and platform.process_index"
        ) from error
    finally:
        said.cancel()


def _set_cpu_devices(count: int | None, rows: int) -> None:
    import jax

    try:
        jax.config.update("jax_num_cpu_devices", count or default_cpu_devices(rows))
    except RuntimeError as error:  # devices are in use already: a notebook, a second run in one process
        if count not in (None, jax.local_device_count()):
            raise ValueError(
                f"platform.cpu_devices={count}, but this process already uses {jax.local_device_count()} devices; "
                "set it before the first use of JAX"
            ) from error


def default_cpu_devices(rows: int, cores: int | None = None) -> int:
    """Return the largest number of devices, at most one per core, that divides `rows`.

    One device per core and data parallelism beats one device with all cores by 10-20 % on small models: XLA runs most
    of its kernels on one thread.
    """
    if cores is None:  # macOS and Windows do not tell which cores are ours
        cores = len(os.sched_getaffinity(0)) if sys.platform.startswith("linux") else os.cpu_count() or 1
    return max((n for n in range(1, min(cores, rows, 8) + 1) if rows % n == 0), default=1)  # no row: an error follows


def _cpu_only() -> bool:
    import jax

    platforms = jax.config.jax_platforms or os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms == "cpu"
    plugins = ("libtpu", "jax_cuda12_plugin", "jax_cuda13_plugin", "jax_rocm7_plugin")
    installed = [module for module in plugins if importlib.util.find_spec(module)]
    if installed != ["libtpu"] or _google_devices():
        return not installed
    jax.config.update("jax_platforms", "cpu")  # it is here to plan, and would complain that it finds no TPU
    return True


def _google_devices() -> bool:
    """Whether one of Google's devices is on the PCI bus, as a TPU is."""
    return any(vendor.read_text().strip() == "0x1ae0" for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"))


def _keep_freed_memory() -> None:
    """Tell glibc to keep large freed blocks: each step asks for the same megabytes again, and page faults cost time."""
    if not sys.platform.startswith("linux"):
        return
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:  # another C library (musl): nothing to tune
        return
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, -1)
    libc.mallopt(_M_ARENA_MAX, 1)  # the arenas of other threads are unmapped as soon as they are empty
