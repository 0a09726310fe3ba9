"""MXFP4 weights: blocks of 32 numbers of four bits (E2M1) that share a power of two (E8M0).

gpt-oss keeps W[expert, input, output] as NAME_blocks, uint8 [expert, output, input / 32, 16], where the lower half of a
byte is the earlier of two inputs, and NAME_scales, uint8 [expert, output, input / 32].

Source: Open Compute Project 2023, Microscaling Formats (MX) v1.0, sections 5.3.3 and 5.4.1.
"""

from functools import cache, partial

import ml_dtypes
import numpy as np

from jaxllm.hf.checkpoint import Stored, Tensors

BLOCK = 32
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_SCALES = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32("nan"))


@cache
def _table() -> np.ndarray:
    """Return what each scale and byte mean, [256 * 256]: two bfloat16, whose bits are one number."""
    codes, values = np.arange(256), np.concatenate([_VALUES, -_VALUES])
    with np.errstate(over="ignore"):
        pairs = _SCALES[:, None, None] * values[np.stack([codes & 15, codes >> 4], axis=1)]
        return pairs.astype(ml_dtypes.bfloat16).view(np.uint32).reshape(-1)


def unpacked(tensors: Tensors) -> Tensors:
    """Return tensors with each pair of blocks and scales as the weight that they mean: bfloat16, which is exact.

    Raises:
      ValueError: blocks and scales do not fit together, or the weight is there as well.
    """
    stored = dict(tensors.stored)
    for name, blocks in tensors.stored.items():
        stem = name.removesuffix("_blocks")
        scales = stored.get(f"{stem}_scales")
        if stem == name or scales is None:
            continue
        shape, dtypes = scales.shape, {blocks.dtype, scales.dtype}
        if stem in stored or len(shape) != 3 or blocks.shape != (*shape, BLOCK // 2) or dtypes != {"uint8"}:
            raise ValueError(
                f"{tensors.origin}: {name} {list(blocks.shape)} and {stem}_scales {list(shape)} are no MXFP4 weight: "
                f"uint8 blocks [experts, outputs, inputs / {BLOCK}, {BLOCK // 2}], a scale for each, and no {stem}"
            )
        del stored[name], stored[f"{stem}_scales"]
        stored[stem] = Stored((shape[0], BLOCK * shape[2], shape[1]), "bfloat16", partial(_read, blocks, scales))
    return tensors.holding(stored)


def _read(blocks: Stored, scales: Stored) -> np.ndarray:
    packed, exponents = blocks.read(), scales.read()
    whole = np.empty(packed.shape, np.uint32)
    for i in range(len(whole)):  # places in the table take more memory than what is there
        whole[i] = _table()[exponents[i].astype(np.uint16)[..., None] << 8 | packed[i]]
    return whole.view(ml_dtypes.bfloat16).reshape(*packed.shape[:2], -1).swapaxes(1, 2)
