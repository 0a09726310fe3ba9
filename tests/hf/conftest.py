"""Parameters to write and to read again: any numbers will do, and NumPy compiles nothing for them."""

import jax
import numpy as np
import pytest

from jaxllm.models.build import abstract_params


@pytest.fixture(scope="session")
def drawn():
    """Return what draws parameters of a configuration."""

    def draw(config):
        normal = np.random.default_rng(0).normal
        return jax.tree.map(lambda leaf: normal(size=leaf.shape).astype(np.float32), abstract_params(config))

    return draw
