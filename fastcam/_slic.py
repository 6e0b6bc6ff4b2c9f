"""What the backends of ``superpixel_slic`` share: the grid of centres, and contours as whole numbers."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

FARTHEST = 30200  # what distance in the plane and contours on the way count at most


class Grid(NamedTuple):
    """Rows and columns of centres, how far each looks to every side, and which rows an iteration looks at."""

    rows: int
    columns: int
    reach: int
    stride: int


def grid(H: int, W: int, n_segments: int) -> Grid:
    """The grid of about ``n_segments`` centres on an image of ``H x W`` pixels, both positive."""
    rows = min(max(1, round(math.sqrt(n_segments * H / W))), H, n_segments)
    columns = min(max(1, round(n_segments / rows)), W)
    while rows * columns > 65535:
        columns -= 1
    reach = max(-(-H // rows), -(-W // columns))
    return Grid(rows, columns, reach, min(3, max(1, reach // 4)))


def spread(H: int, W: int, centres: int, compactness: float) -> float:
    """What a pixel of distance counts in half units of colour: 2 m / S."""
    return 2 * compactness * math.sqrt(centres / (H * W))


def crossing_cost(contour: Tensor, weight: float) -> Tensor:
    """What a contour ``(B, H, W)`` in [0, 1] costs whoever crosses it, int16 in half units of colour.

    Raises:
        ValueError: a NaN.
    """
    if torch.isnan(contour).any():
        raise ValueError("superpixel_slic: expected a contour without NaN")
    return (2 * weight * contour.double().clamp(0, 1)).round().clamp(max=FARTHEST).to(torch.int16)
