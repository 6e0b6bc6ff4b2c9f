"""Weighted sums of features over regions, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def region_pool_fwd(x: Tensor, w: Tensor, normalize: str, eps: float) -> tuple[Tensor, Tensor]:
    """Pooled features ``(B, K, D)`` of ``x (B, D, H, W)``, and what :func:`_effective` needs: ``(B, K)``.

    That is the logarithm of the softmax's divisor, or the factor of the weights.
    """
    work = torch.promote_types(x.dtype, torch.float32)
    w_flat = w.to(work).flatten(2)
    if normalize == "softmax":
        r = torch.logsumexp(w_flat, dim=2)
    elif normalize == "sum":
        r = 1 / (w_flat.sum(dim=2) + eps)
    else:
        r = w_flat.new_full(w_flat.shape[:2], 1 / max(1, w_flat.shape[2]) if normalize == "area" else 1.0)
    out = torch.matmul(_effective(w_flat, r, normalize), x.to(work).flatten(2).mT)
    return out.to(x.dtype), r


def region_pool_bwd(
    grad: Tensor, x: Tensor, w: Tensor, out: Tensor, r: Tensor, normalize: str
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``w``.

    With the effective weights m: dx = sum_k m_k g_k. Where m = r w, dw = r g . x, and under "sum", whose r depends on
    w, r g . (x - out); where m is a softmax, m g . (x - out).
    """
    work = r.dtype
    g, x_flat, w_flat = grad.to(work), x.to(work).flatten(2), w.to(work).flatten(2)
    m = _effective(w_flat, r, normalize)
    grad_m = torch.matmul(g, x_flat)
    if normalize in ("softmax", "sum"):
        grad_m = grad_m - (g * out.to(work)).sum(-1, keepdim=True)
    grad_w = grad_m * (m if normalize == "softmax" else r[:, :, None])
    return torch.matmul(g.mT, m).reshape(x.shape).to(x.dtype), grad_w.reshape(w.shape).to(w.dtype)


def _effective(w_flat: Tensor, r: Tensor, normalize: str) -> Tensor:
    """The weights that features are multiplied by."""
    return (w_flat - r[:, :, None]).exp() if normalize == "softmax" else w_flat * r[:, :, None]
