"""Options of XLA by the kind of the device: what the compiler of a chip does better with than without."""

import jax

# A matrix product with a gathered operand is not cut into a ring of small products (which the schedule of wide meshes
# does not need); gathers run beside products where the chip's compiler can fuse them into one another.
_WHOLE = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
_FUSED = {
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    "xla_enable_async_all_gather": "true",
}
_BOTH = {**_WHOLE, **_FUSED}
# Products of v6e have larger tiles in most of its 128 MB of fast memory; compilation takes twice as long.
_TILES = {"xla_tpu_scoped_vmem_limit_kib": "98304"}
OPTIONS = {"TPU v4": _WHOLE, "TPU v5": _BOTH, "TPU v5 lite": _BOTH, "TPU v6 lite": {**_BOTH, **_TILES}}


def compiler_options(device: jax.Device) -> dict[str, str]:
    """Return the options of programs for devices like `device`; measured with `jaxllm.plan`, see docs/results.md."""
    return dict(OPTIONS.get(device.device_kind, {}))
