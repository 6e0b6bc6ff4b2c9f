"""Launchers of ``csrc/cpu/window_reduce.cpp``. 16-bit inputs are converted to float32 first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcam import _C
from fastcam.native._memory import empty


def window_reduce_fwd(x: Tensor, labels: Tensor, rings: Sequence[float], by_count: bool) -> tuple[Tensor, Tensor]:
    """Means ``(B, K, H, W)``, and the reciprocal of every pixel's divisor ``(B, H, W)``."""
    work = torch.promote_types(x.dtype, torch.float32)
    (B, K, H, W), x_work, y = x.shape, x.to(work).contiguous(), labels.contiguous()
    weights = torch.tensor(rings, dtype=torch.float64)
    out, r = empty(x_work.shape, work), torch.empty((B, H, W), dtype=work)
    _C.window_reduce_fwd(
        x_work.data_ptr(), y.data_ptr(), weights.data_ptr(), out.data_ptr(), r.data_ptr(), work == torch.float64,
        B, K, H, W, len(rings) - 1, by_count, torch.get_num_threads(),
    )  # fmt: skip
    return out.to(x.dtype), r


def window_reduce_bwd(grad: Tensor, labels: Tensor, r: Tensor, rings: Sequence[float]) -> Tensor:
    """Gradient of ``x``; ``r`` is what the forward returned."""
    (B, K, H, W), g, y = grad.shape, grad.to(r.dtype).contiguous(), labels.contiguous()
    weights = torch.tensor(rings, dtype=torch.float64)
    grad_x = empty(g.shape, r.dtype)
    _C.window_reduce_bwd(
        g.data_ptr(), y.data_ptr(), weights.data_ptr(), r.data_ptr(), grad_x.data_ptr(), r.dtype == torch.float64,
        B, K, H, W, len(rings) - 1, torch.get_num_threads(),
    )  # fmt: skip
    return grad_x.to(grad.dtype)
