"""Test environment: eight virtual CPU devices and strict shapes, set before anything imports jax.

Environment variables, not `jax.config`: tests without arrays stay free of the import, and subprocesses inherit them.
"""

import os

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
# Tests wait for the compiler; without its optimiser, half as long. Set it to 0 to test exactly what users run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked gpu unless JAX_PLATFORMS names an accelerator."""
    if os.environ["JAX_PLATFORMS"] == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an accelerator: JAX_PLATFORMS=cuda"))
