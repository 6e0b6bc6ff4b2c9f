"""Launcher of ``csrc/cpu/random_walk.cpp``. 16-bit inputs are converted to float32 first."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import _C
from fastcam._chebyshev import coefficients, walk_degree
from fastcam._paths import destinations

MOST = 64  # whole exponents up to this are products in C++, all others torch's power


def random_walk_fwd(x: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, method: str) -> Tensor:
    """``x (B, C, H, W)`` times T^steps, with ``affinity (B, P, H, W)``."""
    return _walk(x, affinity, radius, beta, steps, method, transposed=False)


def random_walk_bwd(grad: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, method: str) -> Tensor:
    """Gradient of ``x``: ``grad`` times the transpose of T^steps."""
    return _walk(grad, affinity, radius, beta, steps, method, transposed=True)


def _walk(
    x: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, method: str, *, transposed: bool
) -> Tensor:
    work = torch.promote_types(x.dtype, torch.float32)
    (B, C, H, W), P = x.shape, affinity.shape[1]
    degree = walk_degree(method, steps, P, H * W)
    chebyshev = degree < steps
    shares = coefficients(steps, degree) if chebyshev else [0.0] * steps + [1.0]
    y, a, power = x.to(work).contiguous(), affinity.to(work), int(beta)
    if power != beta or power > MOST:
        a, power = a.clamp(0, 1) ** beta, 1
    a = a.contiguous()
    offsets, weights = torch.tensor(destinations(radius), dtype=torch.int64), torch.tensor(shares, dtype=torch.float64)
    out = torch.empty_like(y)
    _C.random_walk(
        y.data_ptr(), a.data_ptr(), offsets.data_ptr(), weights.data_ptr(), out.data_ptr(), work == torch.float64,
        B, C, P, H, W, radius, power, degree, chebyshev, transposed, torch.get_num_threads(),
    )  # fmt: skip
    return out.to(x.dtype)
