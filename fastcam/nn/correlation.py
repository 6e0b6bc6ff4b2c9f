"""Pixel correlation: maps spread along the similarity of features (the PCM of SEAM and SFC)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

CHUNK_ELEMENTS = 1 << 24  # 64 MiB of float32 affinities at a time


def pixel_correlation(maps: Tensor, features: Tensor, steps: int = 1, *, eps: float = 1e-5) -> Tensor:
    r"""Propagates maps by the affinity of features.

    .. math:: g = \frac{f}{\|f\|_2 + \epsilon},\quad R = \mathrm{ReLU}(g^\top g),\quad
              A_{ij} = \frac{R_{ij}}{\sum_i R_{ij} + \epsilon},\quad M' = M A \cdots A

    (SEAM, Wang et al., CVPR 2020, eq. 5, with one step; SFC uses two.) Every result is a weighted mean of the input, so
    constants stay.

    Cost: ``2 B N^2 (D + C steps)`` operations. With gradients the ``(B, N, N)`` affinity is kept; without, it is made
    in blocks of columns of at most 64 MiB and again at every step.

    Args:
        maps: ``(B, C, H, W)``.
        features: ``(B, D, H, W)``, unnormalised. A pixel whose feature is zero gives 0.
        steps: number of multiplications.
        eps: added to norms and sums.

    Returns:
        ``(B, C, H, W)``.
    """
    if (
        maps.ndim != 4
        or features.ndim != 4
        or maps.shape[0] != features.shape[0]
        or maps.shape[2:] != features.shape[2:]
    ):
        raise ValueError(
            "pixel_correlation: expected maps (B, C, H, W), features (B, D, H, W), "
            f"got {tuple(maps.shape)}, {tuple(features.shape)}"
        )
    g = features.flatten(2)
    g = g / (torch.linalg.vector_norm(g, dim=1, keepdim=True) + eps)
    x = maps.flatten(2)
    batch, _, n = g.shape
    grad = torch.is_grad_enabled() and (maps.requires_grad or features.requires_grad)
    width = n if grad else max(1, CHUNK_ELEMENTS // max(1, batch * n))
    if width >= n:
        affinity = F.relu(g.transpose(1, 2) @ g)
        affinity = affinity / (affinity.sum(dim=1, keepdim=True) + eps)
        for _ in range(steps):
            x = x @ affinity
        return x.view(maps.shape)
    for _ in range(steps):
        columns = []
        for g_j in g.split(width, dim=2):
            affinity = F.relu(g.transpose(1, 2) @ g_j)
            columns.append((x @ affinity) / (affinity.sum(dim=1, keepdim=True) + eps))
        x = torch.cat(columns, dim=2)
    return x.view(maps.shape)
