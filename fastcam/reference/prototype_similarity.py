"""Cosine similarity of every feature with every prototype, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def prototype_similarity_fwd(x: Tensor, p: Tensor, relu: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Similarity ``(B, K, H, W)``, and ``1 / max(norm, eps)`` of ``x (B, D, H, W)``: ``(B, H, W)``."""
    work = torch.promote_types(x.dtype, torch.float32)
    x_norm = torch.linalg.vector_norm(x, dim=1, dtype=work)
    r = 1 / x_norm.clamp_min(eps)
    p_hat = p.to(work) / torch.linalg.vector_norm(p, dim=-1, keepdim=True, dtype=work).clamp_min(eps)
    s = torch.matmul(p_hat, x.to(work).flatten(2)).unflatten(-1, x.shape[2:]) * r[:, None]
    return (s.relu() if relu else s).to(x.dtype), r


def prototype_similarity_bwd(
    grad: Tensor, x: Tensor, p: Tensor, out: Tensor, r: Tensor, relu: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``p``.

    With x_hat = x r: d(x_hat . p_hat) / dx = r (p_hat - x_hat s), and r p_hat where |x| <= eps; p alike.
    """
    work = r.dtype
    x_hat = (x.to(work) * r[:, None]).flatten(2)
    s, g, r_flat = out.to(work).flatten(2), grad.to(work).flatten(2), r.flatten(1)[:, None]
    if relu:
        g = torch.where(s > 0, g, 0)
    p_norm = torch.linalg.vector_norm(p, dim=-1, keepdim=True, dtype=work)
    p_hat = p.to(work) / p_norm.clamp_min(eps)
    inside = (r_flat * eps < 1 - 1e-6).to(work)  # the norm, not eps, was the divisor
    grad_x = r_flat * (torch.matmul(p_hat.mT, g) - x_hat * (g * s).sum(1, keepdim=True) * inside)
    grad_p_hat = torch.matmul(g, x_hat.mT)  # (B, K, D)
    if p.ndim == 2:
        grad_p_hat = grad_p_hat.sum(0)
    radial = (grad_p_hat * p_hat).sum(-1, keepdim=True) * p_hat * (p_norm > eps)
    grad_p = (grad_p_hat - radial) / p_norm.clamp_min(eps)
    return grad_x.reshape(x.shape).to(x.dtype), grad_p.to(p.dtype)
