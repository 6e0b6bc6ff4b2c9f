"""Best match of every query over all support features, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24  # 64 MiB of float32 similarities at a time


def pairwise_max_fwd(
    query: Tensor, support: Tensor, mask: Tensor | None, cosine: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Largest similarity ``(B, N)`` of ``query (B, D, N)`` over ``support (B, D, M)``; its place, int64 ``(B, N)``."""
    work = torch.promote_types(query.dtype, torch.float32)
    B, _, N = query.shape
    M = support.shape[2]
    if M == 0:
        return query.new_zeros((B, N)), torch.full((B, N), -1, device=query.device)
    q, s = query.to(work), support.to(work)
    s_norm = torch.linalg.vector_norm(s, dim=1)
    values, indices = [], []
    for block in q.split(max(1, BLOCK_ELEMENTS // max(1, B * M)), dim=2):
        similarity = torch.matmul(block.mT, s)  # (B, n, M)
        if cosine:
            similarity /= torch.linalg.vector_norm(block, dim=1)[:, :, None] * s_norm[:, None] + eps
        if mask is not None:
            similarity.masked_fill_(~mask[:, None], -torch.inf)
        best, place = similarity.max(dim=2)
        values.append(best)
        indices.append(place)
    value, index = torch.cat(values, dim=1), torch.cat(indices, dim=1)
    if mask is not None:
        some = mask.any(dim=1, keepdim=True)
        value, index = torch.where(some, value, 0), torch.where(some, index, -1)
    return value.to(query.dtype), index


def pairwise_max_bwd(
    grad: Tensor, query: Tensor, support: Tensor, indices: Tensor, cosine: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``query`` and ``support``.

    With c = q . s / d, d = |q| |s| + eps: dq = g (s / d - c |s| q / (d |q|)), the last term 0 where q is 0; s alike, at
    the best matches only.
    """
    work = torch.promote_types(query.dtype, torch.float32)
    if support.shape[2] == 0:
        return torch.zeros_like(query, memory_format=torch.contiguous_format), support.new_zeros(support.shape)
    q, s = query.to(work), support.to(work)
    place = indices.clamp_min(0)[:, None].expand_as(q)
    g = torch.where(indices < 0, 0, grad.to(work))[:, None]
    s_best = s.gather(2, place)
    grad_q, grad_s_best = g * s_best, g * q
    if cosine:
        q_norm = torch.linalg.vector_norm(q, dim=1, keepdim=True)
        s_norm = torch.linalg.vector_norm(s_best, dim=1, keepdim=True)
        d = q_norm * s_norm + eps
        slope = g * (q * s_best).sum(1, keepdim=True) / d.square()  # g c / d
        tiny = torch.finfo(work).tiny
        grad_q = grad_q / d - slope * s_norm / q_norm.clamp_min(tiny) * q
        grad_s_best = grad_s_best / d - slope * q_norm / s_norm.clamp_min(tiny) * s_best
    grad_s = torch.zeros(s.shape, dtype=work, device=s.device).scatter_add_(2, place, grad_s_best)
    return grad_q.to(query.dtype), grad_s.to(support.dtype)
