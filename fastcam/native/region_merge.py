"""Launchers of ``csrc/cpu/region_merge.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import _C
from fastcam._lab import tables, to_bytes

WEIGHTS = {"content_border": 0, "content": 1, "mean_color": 2}
CRITERIA = {"adaptive": 0, "best_first": 1}


def region_merge_describe(image: Tensor, labels: Tensor, sizes: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """RGB ``(B, 3, H, W)``, labels ``(B, H, W)``, sizes ``(B, 2)`` -> Lab sums ``(S, 3)``, counts ``(S, 3 bins)``."""
    B, _, H, W = image.shape
    rgb, l = to_bytes("region_merge", image).contiguous(), labels.to(torch.int32).contiguous()
    S = int(sizes[:, 1].sum())
    sums, hist = torch.zeros(S, 3, dtype=torch.float64), torch.zeros(S, 3 * bins, dtype=torch.float64)
    gamma, f = tables()
    _C.region_merge_describe(
        rgb.data_ptr(), l.data_ptr(), gamma.data_ptr(), f.data_ptr(), sizes.contiguous().data_ptr(), sums.data_ptr(),
        hist.data_ptr(), B, H * W, bins, torch.get_num_threads(),
    )  # fmt: skip
    return sums, hist


def region_merge_fwd(
    edges: Tensor, border: Tensor, area: Tensor, perimeter: Tensor, sums: Tensor, hist: Tensor, sizes: Tensor,
    channels: int, weight: str, criterion: str, start: float, stop: float, factor: float, fraction: float,
    penalty: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Graphs and descriptors of all images one behind the other -> merges ``(S, 3)``, their numbers ``(S, 2)``, and how
    many each image has ``(B,)``."""
    S, B = len(area), len(sizes)
    merges = torch.zeros(S, 3, dtype=torch.int64)
    numbers = torch.zeros(S, 2, dtype=torch.float64)
    counts = torch.zeros(B, dtype=torch.int64)
    tensors = [t.contiguous() for t in (edges, border, area, perimeter, sums, hist, sizes)]
    _C.region_merge_fwd(
        *(t.data_ptr() for t in tensors), merges.data_ptr(), numbers.data_ptr(), counts.data_ptr(), B, hist.shape[1],
        channels, WEIGHTS[weight], CRITERIA[criterion], start, stop, factor, fraction, penalty, torch.get_num_threads(),
    )  # fmt: skip
    return merges, numbers, counts
