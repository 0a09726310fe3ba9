"""Norms of gradient and update, block by block: where in a deep model training goes wrong."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxllm.core.tree import named_leaves


def block_norms(tree: Any) -> dict[str, Float[Array, "..."]]:
    """Return the Euclidean norm of each block [L], by the name of its stack, and of everything else by its first name.

    Example, of a decoder of two layers: {"embed": 0.3, "blocks": [1.2, 0.9], "final_norm": 0.1, "head": 2.0}
    """
    squares: dict[str, Array] = {}
    for name, leaf in named_leaves(tree).items():
        words = name.split("/")
        stack = next((number for number, word in enumerate(words) if word.endswith("blocks")), None)
        key = words[0] if stack is None else "/".join(words[: stack + 1])
        axes = None if stack is None else tuple(range(1, leaf.ndim))
        squares[key] = squares.get(key, 0.0) + jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=axes)
    return {key: jnp.sqrt(square) for key, square in squares.items()}
