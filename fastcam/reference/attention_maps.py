"""Attention that also sums its mean over heads, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_maps_fwd(
    q: Tensor, k: Tensor, v: Tensor, total: Tensor | None, rows: int, skip: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention ``(B, H, N, d)``, ``total`` plus the maps ``(B, rows, M - skip)``, log-sum-exp ``(B, H, N)``."""
    work = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(work) @ k.to(work).mT * scale
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp_()
    maps = weights[:, :, :rows, skip:].mean(1)
    return (weights @ v.to(work)).to(q.dtype), maps if total is None else maps.add_(total), lse


def attention_maps_bwd(
    grad: Tensor, grad_maps: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, skip: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``; the weights A are computed again from ``lse``.

    With W the gradient of A, ``grad v^T`` plus a share 1 / H of ``grad_maps``: the scores' gradient is
    ``A (W - sum(A W))``, the sum over keys.
    """
    work = lse.dtype
    q_work, k_work, v_work, g = (t.to(work) for t in (q, k, v, grad))
    weights = (q_work @ k_work.mT * scale - lse[..., None]).exp_()
    grad_v = weights.mT @ g
    grad_weights = g @ v_work.mT
    if grad_maps is not None:
        grad_weights[:, :, : grad_maps.shape[1], skip:] += grad_maps[:, None] / q.shape[1]
    inner = (grad_weights * weights).sum(-1, keepdim=True)
    grad_scores = (grad_weights - inner) * weights * scale
    return (grad_scores @ k_work).to(q.dtype), (grad_scores.mT @ q_work).to(q.dtype), grad_v.to(q.dtype)
