"""Launchers of ``csrc/cpu/prototype_similarity.cpp``. 16-bit inputs are converted to float32 first."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import _C
from fastcam.native._memory import empty


def prototype_similarity_fwd(x: Tensor, p: Tensor, relu: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Similarity ``(B, K, H, W)``, and ``1 / max(norm, eps)`` of ``x (B, D, H, W)``: ``(B, H, W)``."""
    work = torch.promote_types(x.dtype, torch.float32)
    B, D, H, W = x.shape
    K = p.shape[-2]
    x_work, p_work = (t.to(work).contiguous() for t in (x, p))
    out = empty((B, K, H, W), work)
    r = torch.empty((B, H, W), dtype=work)
    _C.prototype_similarity_fwd(
        x_work.data_ptr(), p_work.data_ptr(), out.data_ptr(), r.data_ptr(), work == torch.float64,
        B, D, H * W, K, p.ndim == 3, relu, eps, torch.get_num_threads(),
    )  # fmt: skip
    return out.to(x.dtype), r


def prototype_similarity_bwd(
    grad: Tensor, x: Tensor, p: Tensor, out: Tensor, r: Tensor, relu: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``p``; ``out`` and ``r`` are what the forward returned."""
    work = r.dtype
    B, D, H, W = x.shape
    K = p.shape[-2]
    g, x_work, p_work, s = (t.to(work).contiguous() for t in (grad, x, p, out))
    grad_x, weights, grad_p = (empty(t.shape, t.dtype) for t in (x_work, g, p_work))
    _C.prototype_similarity_bwd(
        g.data_ptr(), x_work.data_ptr(), p_work.data_ptr(), s.data_ptr(), r.data_ptr(),
        grad_x.data_ptr(), weights.data_ptr(), grad_p.data_ptr(), work == torch.float64,
        B, D, H * W, K, p.ndim == 3, relu, eps, torch.get_num_threads(),
    )  # fmt: skip
    return grad_x.to(x.dtype), grad_p.to(p.dtype)
