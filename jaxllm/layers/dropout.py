"""Dropout of what is added to the stream, while training: off, it is not part of the program."""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


class Drop(NamedTuple):
    """Sets a share of the numbers to zero and the rest to 1 / (1 - rate) of what they are.

    Which ones, is decided by the key and the number of the row in the batch: how a batch is cut into microbatches or
    spread over devices changes nothing. Source: Srivastava et al. 2014; where: Vaswani et al. 2017, section 5.4.

    Attributes:
      key: of the update and the place. rows: numbers of the rows of x. rate: in [0, 1).
    """

    key: Key[Array, ""]
    rows: Int[Array, "B"]
    rate: float

    def at(self, place: Int[Array, ""] | int) -> Self:
        """Return the dropout of a place, independent of all others."""
        return self._replace(key=jax.random.fold_in(self.key, place))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        stay = lambda row: jax.random.bernoulli(jax.random.fold_in(self.key, row), 1.0 - self.rate, x.shape[1:])
        return jnp.where(jax.vmap(stay)(self.rows), x / (1.0 - self.rate), 0.0).astype(x.dtype)
