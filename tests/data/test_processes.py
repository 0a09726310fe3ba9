"""Several processes, whose devices lie anywhere in the mesh, join what they read to the batch in its order."""

import os
import socket
import subprocess
import sys

PROCESS = """
import sys
import jax
import numpy as np
from jax.sharding import Mesh
from jaxllm.data.loader import DataConfig, Loader
from jaxllm.sharding.config import AXES
from jaxllm.sharding.mesh import reader
from jaxllm.training.feed import place

jax.config.update("jax_num_cpu_devices", 3)
jax.distributed.initialize("127.0.0.1:" + sys.argv[2], 2, int(sys.argv[3]))
config = DataConfig.of(sys.argv[1], 16, 12)
whole = next(Loader(config))
for order, tensor, held in (
    ([0, 3, 4, 1, 5, 2], 1, [(0, 3, 5), (1, 2, 4)]),
    ([0, 1, 2, 3, 4, 5], 2, [(0, 1), (1, 2)]),
    ([5, 0, 1, 3, 2, 4], 2, [(0, 1, 2), (0, 1, 2)]),
):
    devices = np.array(jax.devices())[order].reshape(1, 6 // tensor, 1, 1, 1, tensor)
    mesh = Mesh(devices, AXES)
    parts, count = reader(mesh)
    assert (parts, count) == (held[jax.process_index()], 6 // tensor)
    local = next(Loader(config, "train", parts, count))
    for field, all_rows in zip(place(local, mesh), whole, strict=True):
        assert field.shape == all_rows.shape
        for shard in field.addressable_shards:
            assert shard.data.shape[0] == 12 // count
            np.testing.assert_array_equal(shard.data, all_rows[shard.index])
"""


def test_two_processes_join_the_batch_in_its_order(text_dataset):
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    command = [sys.executable, "-c", PROCESS, str(text_dataset([200] * 30)), port]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "JAX_PLATFORMS": "cpu"}
    options = {"env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    processes = [subprocess.Popen([*command, number], **options) for number in "01"]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
