"""Maps spread along the similarity of features, in plain PyTorch: the affinity exists a strip of columns at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

STRIP_ELEMENTS = 1 << 24  # 64 MiB of float32 affinities at a time


def correlation_propagate_fwd(x: Tensor, f: Tensor, steps: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Propagated maps ``(B, C, H, W)``; maps after each but the last step ``(steps - 1, B, C, H, W)``; divisors
    ``(B, H, W)``."""
    g, _ = _unit(f, eps)
    maps = [x.to(g.dtype).flatten(2)]
    divisor = g.new_empty((g.shape[0], g.shape[2]))
    for _ in range(steps):
        columns = []
        for j, affinity in _strips(g):
            divisor[:, j] = affinity.sum(dim=1) + eps
            columns.append(torch.matmul(maps[-1], affinity) / divisor[:, None, j])
        maps.append(torch.cat(columns, dim=2) if columns else torch.empty_like(maps[-1]))
    between = torch.stack(maps[1:-1]) if steps > 1 else maps[0].new_empty((0, *maps[0].shape))
    B, _, H, W = x.shape
    return maps[-1].reshape(x.shape).to(x.dtype), between.reshape(steps - 1, *x.shape), divisor.reshape(B, H, W)


def correlation_propagate_bwd(
    grad: Tensor, x: Tensor, f: Tensor, out: Tensor, between: Tensor, divisor: Tensor, steps: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``f``.

    With y_t = (y_{t-1} R) / s, R = relu(g^T g), s its column sums plus eps, and h_t = dy_t / s: dy_{t-1} = h_t R, for R
    is symmetric, and dR_ij = sum_t y_{t-1,i} h_{t,j} - y_{t,j} h_{t,j}. A row of ones below the y and one of the last
    term below the h make that one product u_i . v_j. Last, dg = g E with E_ij = (u_i . v_j + u_j . v_i) [R_ij > 0].
    """
    g, norm = _unit(f, eps)
    maps = [x.to(g.dtype), *between, out.to(g.dtype)]
    maps = [y.flatten(2) for y in maps]
    s = divisor.flatten(1)[:, None]
    h = [grad.to(g.dtype).flatten(2) / s]  # of the last step first
    for _ in range(steps - 1):
        strips = [torch.matmul(h[-1], affinity) for _, affinity in _strips(g)]
        h.append((torch.cat(strips, dim=2) if strips else h[-1]) / s)
    h.reverse()
    u = torch.cat([*maps[:-1], torch.ones_like(s)], dim=1)
    v = torch.cat([*h, -sum((a * b).sum(1, keepdim=True) for a, b in zip(h, maps[1:], strict=True))], dim=1)
    grad_x, grad_g = torch.empty_like(maps[0]), torch.empty_like(g)
    for j, affinity in _strips(g):
        grad_x[:, :, j] = torch.matmul(h[0], affinity)
        inner = torch.matmul(u.mT, v[:, :, j]) + torch.matmul(v.mT, u[:, :, j])
        grad_g[:, :, j] = torch.matmul(g, torch.where(affinity > 0, inner, 0))
    radial = (grad_g * g).sum(1, keepdim=True) * (norm + eps) / norm.clamp_min(torch.finfo(g.dtype).tiny)
    grad_f = (grad_g - g * radial) / (norm + eps)
    return grad_x.reshape(x.shape).to(x.dtype), grad_f.reshape(f.shape).to(f.dtype)


def _unit(f: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Features ``(B, D, N)`` divided by norm plus ``eps``, and their norms ``(B, 1, N)``."""
    flat = f.to(torch.promote_types(f.dtype, torch.float32)).flatten(2)
    norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    return flat / (norm + eps), norm


def _strips(g: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Columns of the affinity ``relu(g^T g)``, ``(B, N, width)`` at a time, and which ones they are."""
    B, _, N = g.shape
    width = max(1, STRIP_ELEMENTS // max(1, B * N))
    for first in range(0, N, width):
        j = slice(first, min(N, first + width))
        yield j, F.relu(torch.matmul(g.mT, g[:, :, j]))
