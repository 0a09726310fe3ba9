"""Which devices decode one answer together: every product is split over them (tensor parallelism)."""

import jax
from jax.sharding import Mesh

from jaxllm.models.accounting import param_count
from jaxllm.models.config import ModelConfig
from jaxllm.sharding.config import MeshConfig
from jaxllm.sharding.mesh import make_mesh

# A token reads all weights once. Where they outgrow the cache of a core, two cores read them faster than one; below,
# joining the parts costs more than it saves.
MIN_PARAMS = 8_000_000


def parts(config: ModelConfig) -> int:
    """Return into how many equal parts the model may be cut for decoding: its key/value heads, or 1 if it is small."""
    return 1 if param_count(config) < MIN_PARAMS else config.kv_heads


def tensor_mesh(config: ModelConfig) -> Mesh | None:
    """Return a mesh of all devices that splits every product, or None: one device, or a small model."""
    if jax.device_count() == 1 or parts(config) == 1:
        return None
    return make_mesh(MeshConfig(data=1, tensor=-1))
