"""Triton kernels of ``pairwise_max``: products and their maximum in one pass, gradients without atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def blocks() -> dict[str, int]:
    """Block sizes: queries, support features, and how many numbers of each are multiplied at a time."""
    return {"BLOCK_N": 64, "BLOCK_M": 64, "BLOCK_D": 32}


@triton.jit(do_not_specialize=["N", "M", "D"])
def _pairwise_max_fwd_kernel(
    q_ptr, s_ptr, mask_ptr, s_norm_ptr, value_ptr, index_ptr, N, M, D, q_stride_b, q_stride_d, q_stride_n,
    s_stride_b, s_stride_d, s_stride_n, eps,
    COSINE: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N queries of an image against all its support features, the best so far in registers."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1).to(tl.int64)
    best = tl.full([BLOCK_N], float("-inf"), tl.float32)
    place = tl.full([BLOCK_N], -1, tl.int32)
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        dot = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        squares = tl.zeros([BLOCK_N], tl.float32)
        for d0 in range(0, D, BLOCK_D):
            d = d0 + tl.arange(0, BLOCK_D)
            q = tl.load(
                q_ptr + b * q_stride_b + d[:, None] * q_stride_d + n[None, :] * q_stride_n,
                mask=(d[:, None] < D) & (n[None, :] < N), other=0.0,
            ).to(tl.float32)  # fmt: skip
            s = tl.load(
                s_ptr + b * s_stride_b + d[None, :] * s_stride_d + m[:, None].to(tl.int64) * s_stride_n,
                mask=(d[None, :] < D) & (m[:, None] < M), other=0.0,
            ).to(tl.float32)  # fmt: skip
            dot += tl.dot(s, q, input_precision="ieee")
            if COSINE:
                squares += tl.sum(q * q, axis=0)
        if COSINE:
            s_norm = tl.load(s_norm_ptr + b * M + m, mask=m < M, other=0.0)
            dot = dot / (s_norm[:, None] * tl.sqrt(squares)[None, :] + eps)
        used = m < M
        if MASKED:
            used = used & (tl.load(mask_ptr + b * M + m, mask=m < M, other=0) != 0)
        # NaN counts as the largest: it is replaced by infinity to be found, and comes back where a NaN was chosen.
        nan = (dot != dot) & used[:, None]
        key = tl.where(used[:, None], dot, float("-inf"))
        key = tl.where(nan, float("inf"), key)
        any_nan = tl.max(nan.to(tl.int32), axis=0) > 0
        top = tl.max(key, axis=0)
        chosen = tl.where(any_nan[None, :], nan, (key == top[None, :]) & used[:, None])
        here = tl.min(tl.where(chosen, m[:, None], 2147483647), axis=0)
        top = tl.where(any_nan, float("nan"), top)
        found = here < 2147483647
        better = found & ((place < 0) | (top > best) | (any_nan & (best == best)))
        best = tl.where(better, top, best)
        place = tl.where(better, here, place)
    best = tl.where(place < 0, 0.0, best)
    tl.store(value_ptr + b * N + n, best.to(value_ptr.dtype.element_ty), mask=n < N)
    tl.store(index_ptr + b * N + n, place.to(tl.int64), mask=n < N)


@triton.jit(do_not_specialize=["N", "M", "D"])
def _pairwise_max_bwd_support_kernel(
    order_ptr, start_ptr, q_ptr, s_ptr, to_q_ptr, radial_ptr, grad_s_ptr, N, M, D, BLOCK_D: tl.constexpr
):
    """One program: BLOCK_D numbers of the gradient of a support feature, summed over the queries that chose it.

    q (B, N, D) and s, grad_s (B, M, D) are contiguous; order (B, N) sorts the queries by their choice, start (B, M + 1)
    says where in it every choice begins.
    """
    m = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b = tl.program_id(2).to(tl.int64)
    total = tl.zeros([BLOCK_D], tl.float32)
    radial = 0.0
    first = tl.load(start_ptr + b * (M + 1) + m)
    last = tl.load(start_ptr + b * (M + 1) + m + 1)
    for i in range(first, last):
        n = tl.load(order_ptr + b * N + i)
        q = tl.load(q_ptr + (b * N + n) * D + d, mask=d < D, other=0.0).to(tl.float32)
        total += tl.load(to_q_ptr + b * N + n) * q
        radial += tl.load(radial_ptr + b * N + n)
    at = (b * M + m) * D + d
    total -= radial * tl.load(s_ptr + at, mask=d < D, other=0.0).to(tl.float32)
    tl.store(grad_s_ptr + at, total.to(grad_s_ptr.dtype.element_ty), mask=d < D)


def pairwise_max_fwd(
    query: Tensor, support: Tensor, mask: Tensor | None, cosine: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Largest similarity ``(B, N)`` of ``query (B, D, N)`` over ``support (B, D, M)``; its place, int64 ``(B, N)``."""
    B, D, N = query.shape
    M = support.shape[2]
    value, index = query.new_empty((B, N)), torch.empty((B, N), dtype=torch.int64, device=query.device)
    if B * N == 0:
        return value, index
    size = blocks()
    s_norm = torch.linalg.vector_norm(support, dim=1, dtype=torch.float32)
    used = s_norm if mask is None else mask.contiguous().view(torch.int8)  # not read without a mask
    _pairwise_max_fwd_kernel[(triton.cdiv(N, size["BLOCK_N"]), B)](
        query, support, used, s_norm, value, index, N, M, D, *query.stride(), *support.stride(), eps,
        COSINE=cosine, MASKED=mask is not None, **size,
    )  # fmt: skip
    return value, index


def pairwise_max_bwd(
    grad: Tensor, query: Tensor, support: Tensor, indices: Tensor, cosine: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``query`` and ``support``: what is linear in the number of queries is torch's."""
    B, D, N = query.shape
    M = support.shape[2]
    if B * D * N * M == 0:
        return query.new_zeros((B, D, N)), support.new_zeros((B, D, M))
    q, s = query.float(), support.float()
    s_best = s.gather(2, indices.clamp_min(0)[:, None].expand_as(q))
    g = torch.where(indices < 0, 0, grad.float())
    radial_q, radial_s = torch.zeros_like(g), torch.zeros_like(g)
    if cosine:
        q_norm, s_norm = (torch.linalg.vector_norm(t, dim=1) for t in (q, s_best))
        d = q_norm * s_norm + eps
        slope = g * (q * s_best).sum(1) / d.square()  # g c / d
        g = g / d
        tiny = torch.finfo(torch.float32).tiny
        radial_q, radial_s = slope * s_norm / q_norm.clamp_min(tiny), slope * q_norm / s_norm.clamp_min(tiny)
    grad_q = g[:, None] * s_best - radial_q[:, None] * q
    chosen, order = indices.contiguous().sort(dim=1, stable=True)
    start = torch.searchsorted(chosen, torch.arange(M + 1, device=q.device).expand(B, M + 1).contiguous())
    rows_q, rows_s = query.mT.contiguous(), support.mT.contiguous()
    grad_s = torch.empty_like(rows_s)
    _pairwise_max_bwd_support_kernel[(M, triton.cdiv(D, 64), B)](
        order, start, rows_q, rows_s, g.contiguous(), radial_s.contiguous(), grad_s, N, M, D, BLOCK_D=64
    )
    return grad_q.to(query.dtype), grad_s.mT.contiguous()
