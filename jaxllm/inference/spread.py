"""Which devices decode one answer together: every product is split over them (tensor parallelism)."""

import jax
from jax.sharding import Mesh

from jaxllm.models.accounting import param_count
from jaxllm.models.config import ModelConfig
from jaxllm.sharding.config import MeshConfig
from jaxllm.sharding.distributed import default_cpu_devices
from jaxllm.sharding.mesh import make_mesh

# A token reads all weights once. Where they outgrow the cache of a core, two cores read them faster than one; below,
# joining the parts costs more than it saves.
MIN_PARAMS = 8_000_000


def cpu_devices(config: ModelConfig) -> int:
    """Return how many cores, as virtual devices, decode the model best: a divisor of its key/value heads."""
    return 1 if param_count(config) < MIN_PARAMS else default_cpu_devices(config.kv_heads)


def tensor_mesh() -> Mesh | None:
    """Return a mesh of all devices that splits every product, or None if there is one device."""
    return make_mesh(MeshConfig(data=1, tensor=-1)) if jax.device_count() > 1 else None
