"""Colours as whole numbers, the same on every machine and backend.

CIE L*a*b* (D65) of 8-bit sRGB in half units, from two tables and integer arithmetic: a superpixel's label and a
histogram's bin are decisions, and those must not hang on how a machine rounds a cube root.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

STEPS = 8191  # linear light is counted in this many steps
F_BITS = 14  # fractional bits of CIE's function f
OFFSET = 256  # of a and b, so that they are positive: 0 <= 2 a + OFFSET < 512
# Rows X, Y, Z of the sRGB matrix divided by the white point, in 1 / 4096; each row adds up to 4096, so greys have a = b
# = 0.
MATRIX = ((1777, 1541, 778), (871, 2929, 296), (73, 448, 3575))


@lru_cache(maxsize=1)
def tables() -> tuple[Tensor, Tensor]:
    """int32 ``(256,)`` linear light of an 8-bit value in 1 / STEPS, and ``(STEPS + 1,)`` CIE's f of it in 2^-F_BITS."""
    encoded = [v / 255 for v in range(256)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in encoded]
    light = [i / STEPS for i in range(STEPS + 1)]
    f = [t ** (1 / 3) if t > (6 / 29) ** 3 else t * 841 / 108 + 4 / 29 for t in light]
    return (
        torch.tensor([round(STEPS * v) for v in linear], dtype=torch.int32),
        torch.tensor([round(2**F_BITS * v) for v in f], dtype=torch.int32),
    )


def rgb_to_lab(image: Tensor) -> Tensor:
    """uint8 RGB ``(B, 3, H, W)`` -> int32 of that shape: round(2 L), round(2 a) + 256, round(2 b) + 256."""
    gamma, f = (t.to(image.device) for t in tables())
    rgb = gamma[image.long()]
    fx, fy, fz = (f[((rgb[:, 0] * r + rgb[:, 1] * g + rgb[:, 2] * b + 2048) >> 12).long()] for r, g, b in MATRIX)
    half = 1 << F_BITS - 1
    return torch.stack(
        [
            (232 * fy + half >> F_BITS) - 32,
            (1000 * (fx - fy) + half >> F_BITS) + OFFSET,
            (400 * (fy - fz) + half >> F_BITS) + OFFSET,
        ],
        dim=1,
    )


def to_bytes(op: str, image: Tensor) -> Tensor:
    """An image in 0..255 as uint8, rounded and clipped.

    Raises:
        ValueError: a NaN.
    """
    if image.dtype == torch.uint8:
        return image
    if torch.isnan(image).any():
        raise ValueError(f"{op}: expected an image without NaN")
    return image.round().clamp(0, 255).to(torch.uint8)
