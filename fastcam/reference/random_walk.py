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
    """``"steps"``: T^steps step by step; ``"chebyshev"``: its Chebyshev sum, where that is shorter.

    Written with differences of neighbours, which vanish where maps have become constant: sums of products would make
    the same rounding error there at every step. T_{k+1} = 2 T T_k - T_{k-1} becomes, with d_k = T_k - T_{k-1},
    d_{k+1} = d_k + 2 (T - 1) T_k.
    """
    degree = walk_degree(method, steps, affinity.shape[1], x.shape[2] * x.shape[3])
    work = torch.promote_types(x.dtype, torch.float32)
    a = affinity.to(work).clamp(0, 1) ** beta
    y = x.to(work).clone(memory_format=torch.contiguous_format)
    sums = _column_sums(a, radius)
    if transposed:  # T' = D^-1 T D with the column sums D
        y = y / sums
    if degree == steps:
        for _ in range(steps):
            y = y + _change(y, a, radius) / sums
        total = y
    else:
        c = coefficients(steps, degree)
        difference = _change(y, a, radius) / sums
        total = c[0] * y
        for k in range(1, degree + 1):
            if k > 1:
                difference = difference + 2 * _change(y, a, radius) / sums
            y = y + difference
            total += c[k] * y
    return (total * sums if transposed else total).to(x.dtype)


def _column_sums(a: Tensor, radius: int) -> Tensor:
    """Affinities to all neighbours and, 1, to the pixel itself, added: ``(B, 1, H, W)``."""
    B, _, H, W = a.shape
    sums = a.new_ones((B, 1, H, W))
    for p, offset in enumerate(destinations(radius)):
        window = sources(offset, H, W)
        weight = crop(a[:, p, None], window)
        crop(sums, window).add_(weight)
        crop(sums, window, offset).add_(weight)
    return sums


def _change(y: Tensor, a: Tensor, radius: int) -> Tensor:
    """Differences of all neighbours and the pixel, weighted by their affinity."""
    out = torch.zeros_like(y)
    for p, offset in enumerate(destinations(radius)):
        window = sources(offset, *y.shape[2:])
        flow = crop(a[:, p, None], window) * (crop(y, window, offset) - crop(y, window))
        crop(out, window).add_(flow)
        crop(out, window, offset).sub_(flow)
    return out
