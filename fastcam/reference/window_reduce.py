"""Weighted means over the pixels of a window that have the centre's label, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def window_reduce_fwd(x: Tensor, labels: Tensor, rings: Sequence[float], by_count: bool) -> tuple[Tensor, Tensor]:
    """Means ``(B, K, H, W)`` of ``x``, and the reciprocal of every pixel's divisor ``(B, H, W)``, 0 without a label.

    ``labels`` int32 ``(B, H, W)``, negative where there is none; ``rings``: the weight at each chessboard distance.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    ones = torch.ones(labels.shape, dtype=work, device=x.device)
    divisor = _gather(ones[:, None], labels, [1.0] * len(rings) if by_count else rings)[:, 0]
    r = torch.where(labels >= 0, 1 / divisor, 0)
    return (_gather(x.to(work), labels, rings) * r[:, None]).to(x.dtype), r


def window_reduce_bwd(grad: Tensor, labels: Tensor, r: Tensor, rings: Sequence[float]) -> Tensor:
    """Gradient of ``x``: weights and choice of pixels are symmetric, so it is the same sum, of what was divided."""
    g = torch.where(labels[:, None] >= 0, grad.to(r.dtype) * r[:, None], 0)
    return _gather(g, labels, rings).to(grad.dtype)


def _gather(x: Tensor, labels: Tensor, rings: Sequence[float]) -> Tensor:
    """At every pixel with a label, the weighted sum over the pixels of its window with the same label; else 0."""
    H, W = labels.shape[1:]
    out = torch.zeros_like(x, memory_format=torch.contiguous_format)
    reach = len(rings) - 1
    for dy in range(-min(reach, H - 1), min(reach, H - 1) + 1):
        for dx in range(-min(reach, W - 1), min(reach, W - 1) + 1):
            here = ..., slice(max(0, -dy), H - max(0, dy)), slice(max(0, -dx), W - max(0, dx))
            there = ..., slice(max(0, dy), H - max(0, -dy)), slice(max(0, dx), W - max(0, -dx))
            same = (labels[here] == labels[there]) & (labels[here] >= 0)
            # A choice, not a product with 0: what is not a number must not leave its label.
            out[here] += torch.where(same[:, None], x[there], 0) * rings[max(abs(dy), abs(dx))]
    return out
