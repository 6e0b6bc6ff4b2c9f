"""Launchers of ``csrc/cpu/correlation_propagate.cpp``. 16-bit inputs are converted to float32 first."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import _C
from fastcam.native._memory import empty


def correlation_propagate_fwd(x: Tensor, f: Tensor, steps: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Propagated maps ``(B, C, H, W)``; maps after each but the last step ``(steps - 1, B, C, H, W)``; divisors
    ``(B, H, W)``."""
    work = torch.promote_types(x.dtype, torch.float32)
    B, C, H, W = x.shape
    x_work, f_work = (t.to(work).contiguous() for t in (x, f))
    out, between = empty((B, C, H, W), work), empty((steps - 1, B, C, H, W), work)
    divisor = torch.empty((B, H, W), dtype=work)
    _C.correlation_propagate_fwd(
        x_work.data_ptr(), f_work.data_ptr(), out.data_ptr(), between.data_ptr(), divisor.data_ptr(),
        work == torch.float64, B, C, f.shape[1], H * W, steps, eps, torch.get_num_threads(),
    )  # fmt: skip
    return out.to(x.dtype), between, divisor


def correlation_propagate_bwd(
    grad: Tensor, x: Tensor, f: Tensor, out: Tensor, between: Tensor, divisor: Tensor, steps: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``f``; ``out``, ``between`` and ``divisor`` are what the forward returned."""
    work = divisor.dtype
    B, C, H, W = x.shape
    g, x_work, f_work, y = (t.to(work).contiguous() for t in (grad, x, f, out))
    grad_x, grad_f = empty(x_work.shape, work), empty(f_work.shape, work)
    _C.correlation_propagate_bwd(
        g.data_ptr(), x_work.data_ptr(), f_work.data_ptr(), y.data_ptr(), between.data_ptr(), divisor.data_ptr(),
        grad_x.data_ptr(), grad_f.data_ptr(), work == torch.float64,
        B, C, f.shape[1], H * W, steps, eps, torch.get_num_threads(),
    )  # fmt: skip
    return grad_x.to(x.dtype), grad_f.to(f.dtype)
