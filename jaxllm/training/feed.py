"""Batches on the devices before they are needed: a thread reads ahead, the step never waits for the host."""

import collections
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
from jax.sharding import Mesh, NamedSharding

from jaxllm.core.batch import Batch
from jaxllm.sharding.mesh import reader
from jaxllm.sharding.rules import named_sharding


class Feed:
    """Device batches from an iterator of host-local NumPy batches.

    Attributes:
      waited_s: seconds the caller has spent waiting for data, in all.
    """

    def __init__(self, batches: Iterator[Batch], mesh: Mesh, depth: int = 2):
        self.waited_s = 0.0
        self._batches = batches
        self._mesh = mesh
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed")  # one thread: order is kept
        self._ahead = collections.deque(self._reader.submit(self._read) for _ in range(depth))

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *exception: object) -> None:
        self._reader.shutdown(wait=True, cancel_futures=True)

    def next(self) -> Batch:
        """Return the next batch, sharded over the batch axes of the mesh.

        Raises:
          EOFError: the iterator has ended. Whatever else it raised is raised here.
        """
        start = time.perf_counter()
        batch = self._ahead.popleft().result()
        self.waited_s += time.perf_counter() - start
        self._ahead.append(self._reader.submit(self._read))
        return batch

    def _read(self) -> Batch:
        batch = next(self._batches, None)  # no StopIteration, which a future cannot carry
        if batch is None:
            raise EOFError("the data has ended; an iterator for training repeats, or raises an error of its own")
        return place(batch, self._mesh)


def place(batch: Batch, mesh: Mesh) -> Batch:
    """Join the rows of the parts that each process has, see `reader`, to global arrays [B, ...], over the batch axes.

    JAX lays the local rows on the devices in ascending order of the global ones, which is that of the parts.
    """
    parts, count = reader(mesh)

    def joined(local: "jax.typing.ArrayLike") -> jax.Array:
        shape = (local.shape[0] * count // len(parts), *local.shape[1:])
        return jax.make_array_from_process_local_data(batch_sharding(mesh, shape), local, shape)

    return jax.tree.map(joined, batch)


def batch_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Return how a field [B, T] or [B] of a batch lies on `mesh`."""
    return named_sharding(mesh, ("rows", "length")[: len(shape)], shape)
