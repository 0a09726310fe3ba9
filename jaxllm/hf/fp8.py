"""FP8 weights: squares of 128 x 128 numbers of eight bits (E4M3) that share a float32 factor.

DeepSeek-V3 keeps W[output, input] as NAME, float8, and the factors as NAME_scale_inv, float32; squares at the ends are
cut. Source: DeepSeek-V3, 2024, section 3.3.2.
"""

from functools import partial

import numpy as np

from jaxllm.hf.checkpoint import Stored, Tensors

SIDE = 128


def scaled(tensors: Tensors) -> Tensors:
    """Return tensors with each FP8 weight as what it means with its factors, float32.

    Raises:
      ValueError: weight and factors do not fit together.
    """
    stored = dict(tensors.stored)
    for name, factors in tensors.stored.items():
        stem = name.removesuffix("_scale_inv")
        weight = stored.get(stem)
        if stem == name or weight is None:
            continue
        squares = tuple(-(-length // SIDE) for length in weight.shape)
        if (
            (weight.dtype, factors.dtype) != ("float8_e4m3fn", "float32")
            or len(squares) != 2
            or factors.shape != squares
        ):
            raise ValueError(
                f"{tensors.origin}: {stem} {weight.dtype}{list(weight.shape)} and {name} {factors.dtype}"
                f"{list(factors.shape)} are no FP8 weight: float8_e4m3fn and a float32 for each {SIDE} x {SIDE} of it"
            )
        del stored[name]
        stored[stem] = Stored(weight.shape, "float32", partial(_read, weight, factors))
    return tensors.holding(stored)


def _read(weight: Stored, factors: Stored) -> np.ndarray:
    whole, factors = weight.read().astype(np.float32), factors.read()
    for i, row in enumerate(factors):  # in place: as large as the weight, factors would take a second copy
        whole[i * SIDE : (i + 1) * SIDE] *= np.repeat(row, SIDE)[: whole.shape[1]]
    return whole
