"""Launchers of ``csrc/cpu/region_pool.cpp``. 16-bit inputs are converted to float32 first."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import _C
from fastcam.native._memory import empty

NAMES = ("none", "sum", "area", "softmax")


def region_pool_fwd(x: Tensor, w: Tensor, normalize: str, eps: float) -> tuple[Tensor, Tensor]:
    """Pooled features ``(B, K, D)``, and what the backward needs of every region, ``(B, K)``."""
    work = torch.promote_types(x.dtype, torch.float32)
    B, D, H, W = x.shape
    K = w.shape[1]
    x_work, w_work = (t.to(work).contiguous() for t in (x, w))
    out, r = torch.empty((B, K, D), dtype=work), torch.empty((B, K), dtype=work)
    _C.region_pool_fwd(
        x_work.data_ptr(), w_work.data_ptr(), out.data_ptr(), r.data_ptr(), work == torch.float64,
        B, D, H * W, K, NAMES.index(normalize), eps, torch.get_num_threads(),
    )  # fmt: skip
    return out.to(x.dtype), r


def region_pool_bwd(
    grad: Tensor, x: Tensor, w: Tensor, out: Tensor, r: Tensor, normalize: str
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``w``; ``out`` and ``r`` are what the forward returned."""
    work = r.dtype
    B, D, H, W = x.shape
    K = w.shape[1]
    g, x_work, w_work, f = (t.to(work).contiguous() for t in (grad, x, w, out))
    grad_x, grad_w = empty(x_work.shape, x_work.dtype), empty(w_work.shape, w_work.dtype)
    _C.region_pool_bwd(
        g.data_ptr(), x_work.data_ptr(), w_work.data_ptr(), f.data_ptr(), r.data_ptr(), grad_x.data_ptr(),
        grad_w.data_ptr(), work == torch.float64, B, D, H * W, K, NAMES.index(normalize), torch.get_num_threads(),
    )  # fmt: skip
    return grad_x.to(x.dtype), grad_w.to(w.dtype)
