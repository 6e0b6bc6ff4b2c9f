"""Launcher of ``csrc/cpu/superpixel_slic.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import _C
from fastcam._lab import tables, to_bytes
from fastcam._slic import crossing_cost, grid, spread


def superpixel_slic_fwd(
    image: Tensor, contour: Tensor | None, n_segments: int, compactness: float, contour_weight: float, iterations: int,
    connect: bool,
) -> Tensor:  # fmt: skip
    """RGB ``(B, 3, H, W)``, contour ``(B, H, W)`` -> superpixels int32 ``(B, H, W)``."""
    B, _, H, W = image.shape
    out = torch.empty((B, H, W), dtype=torch.int32)
    if image.numel() == 0:
        return out
    rgb = to_bytes("superpixel_slic", image).contiguous()
    cost = None if contour is None else crossing_cost(contour, contour_weight).contiguous()
    gamma, f = tables()
    rows, columns, reach, stride = grid(H, W, n_segments)
    _C.superpixel_slic_fwd(
        rgb.data_ptr(), 0 if cost is None else cost.data_ptr(), gamma.data_ptr(), f.data_ptr(), out.data_ptr(), B, H, W,
        rows, columns, reach, stride, spread(H, W, rows * columns, compactness), iterations, connect,
        torch.get_num_threads(),
    )  # fmt: skip
    return out
