"""A node of NVIDIA GPUs that are not here, for the compiler of JAX's CUDA plugin: memory and collectives, no times."""

from typing import Any

from jaxllm.planning.topology import Topology

# What XLA asks of a GPU, with the limits of Hopper (compute capability 9.0) and of its SXM boards.
# Source: NVIDIA, "CUDA C++ Programming Guide", table of compute capabilities; "H100 Tensor Core GPU Architecture".
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024  threads_per_warp: 32  threads_per_core_limit: 2048
  shared_memory_per_block: 49152  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448
  core_count: 132  fpus_per_core: 128  clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024  thread_dim_limit_y: 1024  thread_dim_limit_z: 64
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
  memory_bandwidth: {bandwidth:.0f}  device_memory_size: {memory:.0f}  l2_cache_size: 52428800
  cuda_compute_capability {{ major: 9 }}
  device_vendor: "NVIDIA Corporation"  name: "{name}"  device_address_bits: 64  pcie_bandwidth: 64000000000
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9  minor: 10 }}
device_description_str: "{name}"
"""


def describe(topology: Topology) -> list[Any]:
    """Return the devices of a node."""
    from jax.experimental import topologies

    chip = topology.chip
    name = f"NVIDIA {topology.name.upper()}"
    target = TARGET.format(bandwidth=chip.hbm_bandwidth, memory=chip.hbm_bytes, name=name)
    found = topologies.get_topology_desc(platform="cuda", topology=f"1x1x{topology.size}", target_config=target)
    return list(found.devices)
