"""Launchers of ``csrc/cpu/pairwise_max.cpp``. 16-bit inputs are converted to float32 first."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import _C
from fastcam.native._memory import empty


def pairwise_max_fwd(
    query: Tensor, support: Tensor, mask: Tensor | None, cosine: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Largest similarity ``(B, N)`` of ``query (B, D, N)`` over ``support (B, D, M)``; its place, int64 ``(B, N)``."""
    work = torch.promote_types(query.dtype, torch.float32)
    B, D, N = query.shape
    q, s = (t.to(work).contiguous() for t in (query, support))
    used = mask.contiguous() if mask is not None else None
    value, index = torch.empty((B, N), dtype=work), torch.empty((B, N), dtype=torch.int64)
    _C.pairwise_max_fwd(
        q.data_ptr(), s.data_ptr(), 0 if used is None else used.data_ptr(), value.data_ptr(), index.data_ptr(),
        work == torch.float64, B, D, N, s.shape[2], cosine, eps, torch.get_num_threads(),
    )  # fmt: skip
    return value.to(query.dtype), index


def pairwise_max_bwd(
    grad: Tensor, query: Tensor, support: Tensor, indices: Tensor, cosine: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``query`` and ``support``; ``indices`` are what the forward returned."""
    work = torch.promote_types(query.dtype, torch.float32)
    B, D, N = query.shape
    g, q, s = (t.to(work).contiguous() for t in (grad, query, support))
    index = indices.contiguous()
    grad_q, grad_s = empty(q.shape, q.dtype), empty(s.shape, s.dtype)
    _C.pairwise_max_bwd(
        g.data_ptr(), q.data_ptr(), s.data_ptr(), index.data_ptr(), grad_q.data_ptr(), grad_s.data_ptr(),
        work == torch.float64, B, D, N, s.shape[2], cosine, eps, torch.get_num_threads(),
    )  # fmt: skip
    return grad_q.to(query.dtype), grad_s.to(support.dtype)
