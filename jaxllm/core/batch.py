"""The unit of data between text and loss: what the loader yields and the training step consumes.

Fields are NumPy in the loader, JAX in the step, and rows of a batch lie along the first axis of each.
"""

from typing import Any, NamedTuple


class Batch(NamedTuple):
    """Packed token rows with next-token targets; every field has shape [B, T].

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


class TextPairs(NamedTuple):
    """Sources and their targets, packed: a target reads the source of its segment's number.

    Attributes:
      sources: int32 [B, S]; source_segments: int32 [B, S], 1, 2, ... per text, 0 = padding.
      targets: int32 [B, T]; what the decoder reads are these, one place later, behind the model's start token.
      weights: float32 [B, T], loss weight of each target; 0 = not trained (padding).
      segments: int32 [B, T], of `targets`.

    Example, the pairs (7 8 2 -> 4 2) and (9 2 -> 5 6 2), where 2 is the end:

        sources 7 8 2 9 2 0   source_segments 1 1 1 2 2 0
        targets 4 2 5 6 2 0   segments        1 1 2 2 2 0   weights 1 1 1 1 1 0
    """

    sources: Any
    source_segments: Any
    targets: Any
    weights: Any
    segments: Any


class LabelledTexts(NamedTuple):
    """One text per row, and which label is right.

    Attributes:
      tokens: int32 [B, T]; segments: int32 [B, T], 1 = token, 0 = padding, on either side of a row.
      labels: int32 [B]; weights: float32 [B], 0 = not trained (a row that fills up a batch).
    """

    tokens: Any
    segments: Any
    labels: Any
    weights: Any
