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
from jaxllm.training.loop import local_part

jax.config.update("jax_num_cpu_devices", 3)
jax.distributed.initialize("127.0.0.1:" + sys.argv[2], 2, int(sys.argv[3]))
config = DataConfig.of(sys.argv[1], 16, 12)
whole = next(Loader(config))
for order, context, tensor, held in (
    ([0, 3, 4, 1, 5, 2], 1, 1, [(0, 3, 5), (1, 2, 4)]),
    ([0, 1, 2, 3, 4, 5], 1, 2, [(0, 1), (1, 2)]),
    ([3, 0, 1, 4, 5, 2], 2, 1, [(0, 1, 2), (0, 1, 2)]),
    ([0, 3, 1, 4, 2, 5], 2, 1, [(0, 1, 2), (0, 1, 2)]),
):
    devices = np.array(jax.devices())[order].reshape(1, 6 // context // tensor, 1, 1, context, tensor)
    mesh = Mesh(devices, AXES)
    parts, count = reader(mesh)
    assert (parts, count) == (held[jax.process_index()], 6 // context // tensor)
    local = next(Loader(config, "train", parts, count))
    joined = place(local, mesh)
    part = local_part(joined)
    for name, field, all_rows in zip(whole._fields, joined, whole, strict=True):
        rows, columns = part[f"{name}.rows"], part[f"{name}.columns"]
        size = 12 // count
        assert rows.tolist() == [size * n + row for n in parts for row in range(size)]
        if order[0] == 0:  # what it holds of each of these rows lies at the same places
            assert len(columns) == 16 // context
            np.testing.assert_array_equal(part[name], all_rows[np.ix_(rows, columns)])
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
