"""Affinity of pixels by the strongest boundary between them, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._paths import Offset, Window, crop, paths, sources


def path_affinity_fwd(edge: Tensor, radius: int) -> Tensor:
    """``edge (B, H, W)`` -> ``(B, P, H, W)``: 1 - maximum over the path, 0 where the destination is outside."""
    B, H, W = edge.shape
    e = edge.clamp(0, 1).to(torch.promote_types(edge.dtype, torch.float32))
    out = e.new_zeros((B, len(paths(radius)), H, W))
    for p, path in enumerate(paths(radius)):
        window = sources(path[0], H, W)
        crop(out[:, p], window).copy_(1 - _largest(e, path, window))
    return out.to(edge.dtype)


def path_affinity_bwd(grad: Tensor, edge: Tensor, radius: int) -> Tensor:
    """The gradient of a pair goes, negated, to the first pixel of its path that holds the maximum."""
    H, W = edge.shape[1:]
    e = edge.clamp(0, 1).to(torch.promote_types(edge.dtype, torch.float32))
    grad_edge = torch.zeros_like(e)
    for p, path in enumerate(paths(radius)):
        window = sources(path[0], H, W)
        largest = _largest(e, path, window)
        left = crop(grad[:, p], window).to(e.dtype)
        for offset in path:
            here = crop(e, window, offset) == largest
            crop(grad_edge, window, offset).sub_(torch.where(here, left, 0))
            left = torch.where(here, 0, left)
    return torch.where((edge >= 0) & (edge <= 1), grad_edge, 0).to(edge.dtype)


def _largest(e: Tensor, path: tuple[Offset, ...], window: Window) -> Tensor:
    largest = crop(e, window, path[0])
    for offset in path[1:]:
        largest = torch.maximum(largest, crop(e, window, offset))
    return largest
