"""Steps of a random walk over the pairs of pixels within a radius, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._chebyshev import coefficients, walk_degree
from fastcam._paths import crop, destinations, sources


def random_walk_fwd(x: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, method: str) -> Tensor:
    """``x (B, C, H, W)`` times T^steps, with ``affinity (B, P, H, W)``; ``method`` as in :func:`_walk`."""
    return _walk(x, affinity, radius, beta, steps, method, transposed=False)


def random_walk_bwd(grad: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, method: str) -> Tensor:
    """Gradient of ``x``: ``grad`` times the transpose of T^steps."""
    return _walk(grad, affinity, radius, beta, steps, method, transposed=True)


def _walk(
    x: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, method: str, *, transposed: bool
) -> Tensor:
    """``"steps"``: T^steps step by step; ``"chebyshev"``: its Chebyshev sum, where that is shorter."""
    degree = walk_degree(method, steps, affinity.shape[1], x.shape[2] * x.shape[3])
    work = torch.promote_types(x.dtype, torch.float32)
    a = affinity.to(work).clamp(0, 1) ** beta
    y = x.to(work).clone(memory_format=torch.contiguous_format)
    divisor = _neighbours(torch.ones_like(y[:, :1]), a, radius)

    def step(y: Tensor) -> Tensor:
        return _neighbours(y / divisor, a, radius) if transposed else _neighbours(y, a, radius) / divisor

    if degree == steps:
        for _ in range(steps):
            y = step(y)
        return y.to(x.dtype)
    c = coefficients(steps, degree)
    before, now = y, step(y)
    total = c[0] * before + c[1] * now
    for k in range(2, degree + 1):
        before, now = now, 2 * step(now) - before
        total += c[k] * now
    return total.to(x.dtype)


def _neighbours(y: Tensor, a: Tensor, radius: int) -> Tensor:
    """Sum over all neighbours, weighted by their affinity, and the pixel itself: the symmetric matrix times ``y``."""
    out = y.clone()
    for p, offset in enumerate(destinations(radius)):
        window = sources(offset, *y.shape[2:])
        weight = crop(a[:, p, None], window)
        crop(out, window).addcmul_(weight, crop(y, window, offset))
        crop(out, window, offset).addcmul_(weight, crop(y, window))
    return out
