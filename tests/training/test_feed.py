import jax
import numpy as np
import pytest

from jaxllm.core.batch import Batch
from jaxllm.sharding.mesh import MeshConfig, make_mesh
from jaxllm.training.feed import Feed


def batches(count):
    for number in range(count):
        rows = np.full((8, 4), number, np.int32)
        yield Batch(rows, rows, rows.astype(np.float32), rows, rows)


def test_batches_arrive_in_order_and_sharded():
    with Feed(batches(5), make_mesh(MeshConfig())) as feed:
        for number in range(5):
            batch = feed.next()
            assert int(batch.tokens[7, 3]) == number
            assert batch.tokens.sharding.num_devices == jax.device_count()
        with pytest.raises(EOFError, match="the data has ended"):
            feed.next()


def test_an_error_of_the_reader_reaches_the_caller():
    def broken():
        yield from batches(1)
        raise ValueError("shard 7 is damaged")

    with Feed(broken(), make_mesh(MeshConfig())) as feed:
        feed.next()
        with pytest.raises(ValueError, match="shard 7 is damaged"):
            feed.next()
