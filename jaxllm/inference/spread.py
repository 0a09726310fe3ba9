"""Which devices decode one answer together: every product is split over them (tensor parallelism)."""

import jax
from jax.sharding import Mesh

from jaxllm.models.accounting import param_count
from jaxllm.models.config import ModelConfig
from jaxllm.sharding.config import MeshConfig
from jaxllm.sharding.mesh import make_mesh

MIN_PARAMS = 8_000_000  # a smaller model is read faster than its parts are joined


def tensor_mesh(config: ModelConfig) -> Mesh | None:
    """Return a mesh of all devices that splits every product, or None: one device, or a small model."""
    if jax.device_count() == 1 or param_count(config) < MIN_PARAMS:
        return None
    return make_mesh(MeshConfig(data=1, tensor=-1))
