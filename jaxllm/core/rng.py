"""Random keys by name and step: no generator state exists, so none has to be saved."""

import zlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax


def key(seed: int, name: str, step: "int | jax.Array" = 0) -> "jax.Array":
    """Return the PRNG key of stream `name` at `step`.

    Args:
      seed: the run's seed; one integer decides every random number of a run.
      name: what the numbers are for ("init", "dropout", "sample"); streams of different names are independent.
      step: may be traced.
    """
    import jax

    stream = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode("utf-8")))
    return jax.random.fold_in(stream, step)
