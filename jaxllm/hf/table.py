"""The table between two layouts of the same weights: one row per parameter, read in both directions.

Each row says in einops notation how a tensor of the checkpoint becomes a parameter of ours. The inverse is the same row
read backwards, so that import and export cannot disagree.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from einops import rearrange

Sizes = Mapping[str, int]  # of the axes that rows name
# What a name counts: blocks, those of either half of an encoder-decoder, experts of a block.
STACKED = ("layer", "dense_layer", "encoder", "decoder", "expert")


class Part(NamedTuple):
    """A piece of a tensor that joins several parameters (GPT-2's c_attn: q, k and v).

    Attributes:
      axis: along which they are joined; index: which piece; lengths: of all pieces.
      turns: the pieces take turns, one line of each after the other (gpt-oss); they are of one length.
    """

    axis: int
    index: int
    lengths: tuple[int, ...]
    turns: bool = False

    @property
    def slice(self) -> tuple[slice, ...]:
        """The piece of the whole."""
        start = sum(self.lengths[: self.index])
        piece = slice(start, start + self.lengths[self.index])
        return (slice(None),) * self.axis + (slice(self.index, None, len(self.lengths)) if self.turns else piece,)


class Row(NamedTuple):
    """A parameter and where it is in the checkpoint.

    Attributes:
      ours: path of the parameter, without the layer: "blocks/attention/q/kernel" is stacked on L.
      theirs: name of the tensor; "{layer}" in it stands for the number of the layer, and so on (`STACKED`).
      order: "theirs -> ours" in einops notation, of one layer, without the experts' axis.
      whole: order of the whole tensor before `part` is taken, for layouts with the parts of each head together.
    """

    ours: str
    theirs: str
    order: str
    part: Part | None = None
    whole: str = ""


def names(row: Row, sizes: Sizes) -> list[str]:
    """Return the tensors of a parameter, layer by layer and expert by expert."""
    found = [{}]
    for field in STACKED:
        if f"{{{field}}}" in row.theirs:
            first = sizes.get("dense_layers", 0) if field == "layer" else 0
            found = [{**each, field: i} for each in found for i in range(first, sizes[f"{field}s"])]
    return [row.theirs.format(**each) for each in found]


def stacked(row: Row) -> int:
    """Return over how many axes a parameter is stacked: one for layers, one for experts."""
    return sum(f"{{{field}}}" in row.theirs for field in STACKED)


def take(row: Row, tensor: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Return what `row` makes of a tensor of the checkpoint."""
    if row.whole:
        tensor = _rearrange(tensor, row.whole, sizes)
    if row.part:
        tensor = tensor[row.part.slice]
    return _rearrange(tensor, row.order, sizes)


def put(row: Row, parameter: np.ndarray, into: np.ndarray, sizes: Sizes) -> None:
    """Write a parameter into its place of a tensor of the checkpoint: the inverse of `take`.

    Args:
      into: the tensor after `whole`, of which the place is a view; `finish` turns it back.
    """
    into[row.part.slice if row.part else ...] = _rearrange(parameter, _backwards(row.order), sizes)


def finish(row: Row, tensor: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Return a tensor filled by `put` in the checkpoint's own order."""
    return _rearrange(tensor, _backwards(row.whole), sizes) if row.whole else tensor


def stored_shape(row: Row, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
    """Return the shape of the tensor, after `whole`, that holds a parameter of `shape` (of one layer and expert)."""
    inner = list(_rearrange(np.broadcast_to(np.int8(0), shape), _backwards(row.order), sizes).shape)
    if row.part:
        inner[row.part.axis] = sum(row.part.lengths)
    return tuple(inner)


def _backwards(order: str) -> str:
    theirs, ours = order.split("->")
    return f"{ours} -> {theirs}"


def _rearrange(x: np.ndarray, order: str, sizes: Sizes) -> np.ndarray:
    return rearrange(x, order, **{axis: sizes[axis] for axis in re.findall(r"\w+", order) if axis in sizes})
