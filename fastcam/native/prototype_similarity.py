"""Launchers of ``csrc/cpu/prototype_similarity.cpp``. 16-bit inputs are converted to float32 first."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import _C


def prototype_similarity_fwd(x: Tensor, p: Tensor, relu: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Similarity ``(B, K, H, W)``, and ``1 / max(norm, eps)`` of ``x (B, D, H, W)``: ``(B, H, W)``."""
    work = torch.promote_types(x.dtype, torch.float32)
    B, D, H, W = x.shape
    K = p.shape[-2]
    x_work = x.to(work).contiguous()
    p_hat, _ = _normalize(p.to(work), eps)
    out = torch.empty((B, K, H, W), dtype=work)
    r = torch.empty((B, H, W), dtype=work)
    _C.prototype_similarity_fwd(
        x_work.data_ptr(), p_hat.data_ptr(), out.data_ptr(), r.data_ptr(), work == torch.float64,
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
    g, x_work, s = (t.to(work).contiguous() for t in (grad, x, out))
    p_hat, p_norm = _normalize(p.to(work), eps)
    grad_x, weights, grad_p_hat = torch.empty_like(x_work), torch.empty_like(g), torch.empty_like(p_hat)
    _C.prototype_similarity_bwd(
        g.data_ptr(), x_work.data_ptr(), p_hat.data_ptr(), s.data_ptr(), r.data_ptr(),
        grad_x.data_ptr(), weights.data_ptr(), grad_p_hat.data_ptr(), work == torch.float64,
        B, D, H * W, K, p.ndim == 3, relu, eps, torch.get_num_threads(),
    )  # fmt: skip
    radial = (grad_p_hat * p_hat).sum(-1, keepdim=True) * p_hat * (p_norm > eps)
    return grad_x.to(x.dtype), ((grad_p_hat - radial) / p_norm.clamp_min(eps)).to(p.dtype)


def _normalize(p: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(p, dim=-1, keepdim=True)
    return (p / norm.clamp_min(eps)).contiguous(), norm
