"""Test environment: eight virtual CPU devices and strict shapes, set before anything imports jax.

Environment variables, not `jax.config`: tests without arrays stay free of the import, and subprocesses inherit them.
"""

import gc
import os
import sys
import tempfile
from importlib.metadata import version

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Tests wait for the compiler; without its optimiser, half as long. Set it to 0 to test exactly what users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and version("jaxlib").startswith("0.10."):
    # Four times as fast again; only where it is known, because XLA aborts at a flag that it does not know.
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1")

gc.set_threshold(100_000)  # tracing makes objects by the million, hardly any of them garbage: a sixteenth of the time

# What another test, worker or process of this run has compiled is read in a sixth of the time; writing it costs nothing
# that can be measured.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="jaxllm-compiled-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


@pytest.fixture(scope="session", autouse=True)
def eight_devices() -> None:
    """Take the devices before the first run in this process, which would ask for as many as there are cores."""
    if "jax" in sys.modules:
        sys.modules["jax"].devices()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu unless JAX_PLATFORMS names an accelerator."""
    if os.environ["JAX_PLATFORMS"] == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an accelerator: JAX_PLATFORMS=cuda"))
