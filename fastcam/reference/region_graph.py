"""Region adjacency in plain PyTorch: sort the pairs of neighbouring labels and count equal ones."""

from __future__ import annotations

import torch
from torch import Tensor


def region_graph_fwd(labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Labels ``(B, H, W)`` -> of all images one behind the other edges ``(E, 2)``, borders ``(E,)``, areas and
    perimeters ``(S,)``; numbers of edges and of regions of each image ``(B, 2)``."""
    l = labels.long()
    if l.numel() and (int(l.min()) < 0 or int(l.max()) > 2**24 - 1):
        bad = int(l.min()) if int(l.min()) < 0 else int(l.max())
        raise ValueError(f"region_graph: expected labels from 0 to {2**24 - 1}, got {bad}")
    parts = [_one(image) for image in l]
    counts = torch.tensor([[len(e), len(a)] for e, _, a, _ in parts], device=l.device).view(-1, 2)
    empty = l.new_zeros(0)
    columns = zip(*parts, strict=True) if parts else ([empty.view(0, 2)], [empty], [empty], [empty])
    edges, border, area, perimeter = (torch.cat(list(column)) for column in columns)
    return edges, border, area, perimeter, counts


def _one(l: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    S = int(l.max()) + 1 if l.numel() else 0
    first = torch.cat([l[:, :-1].flatten(), l[:-1].flatten()])
    second = torch.cat([l[:, 1:].flatten(), l[1:].flatten()])
    differ = first != second
    low, high = torch.minimum(first, second)[differ], torch.maximum(first, second)[differ]
    key, border = torch.unique(low * S + high, return_counts=True)
    edges = torch.stack([key // max(S, 1), key % max(S, 1)], dim=1)
    frame = torch.cat([l[:1].flatten(), l[-1:].flatten(), l[:, :1].flatten(), l[:, -1:].flatten()])
    perimeter = frame.bincount(minlength=S).index_add_(0, edges.T.flatten(), border.repeat(2))
    return edges, border, l.flatten().bincount(minlength=S), perimeter
