"""The unit of data between text and loss: what the loader yields and the training step consumes."""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Packed token rows with next-token targets; every field has shape [B, T] (NumPy in the loader, JAX in the step).

    Attributes:
      tokens: int32, model input ids.
      targets: int32, the id at the next position of the same segment.
      weights: float32, loss weight of each target, >= 0; 0 = not trained (padding, prompt, no next token).
      segments: int32, 1, 2, ... per packed document; 0 = padding. Attention never crosses segments.
      positions: int32, index within the segment from 0 (RoPE and learned positions).

    Example, documents (7 8 9) and (5 6) packed at T = 6:

        tokens    7 8 9 5 6 0
        targets   8 9 0 6 0 0
        weights   1 1 0 1 0 0
        segments  1 1 1 2 2 0
        positions 0 1 2 0 1 0
    """

    tokens: Any
    targets: Any
    weights: Any
    segments: Any
    positions: Any
