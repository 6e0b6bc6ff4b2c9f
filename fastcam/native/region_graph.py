"""Launcher of ``csrc/cpu/region_graph.cpp``."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import _C

MOST = 2**24 - 1


def region_graph_fwd(labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Labels ``(B, H, W)`` -> of all images one behind the other edges ``(E, 2)``, borders ``(E,)``, areas and
    perimeters ``(S,)``; numbers of edges and of regions of each image ``(B, 2)``."""
    B, H, W = labels.shape
    if labels.numel():
        low, high = (int(v) for v in labels.aminmax())
        if low < 0 or high > MOST:
            raise ValueError(f"region_graph: expected labels from 0 to {MOST}, got {low if low < 0 else high}")
    l = labels.to(torch.int32).contiguous()
    graph = _C.RegionGraph(l.data_ptr(), B, H, W, torch.get_num_threads())
    E, S = graph.edges, graph.regions
    edges, border, area, perimeter, counts = (
        torch.empty(size, dtype=torch.int64) for size in ((E, 2), (E,), (S,), (S,), (B, 2))
    )
    graph.copy_to(*(t.data_ptr() for t in (edges, border, area, perimeter, counts)))
    return edges, border, area, perimeter, counts
