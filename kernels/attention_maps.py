"""Triton kernels of ``attention_maps``: weights live in registers, sums are float32 in a fixed order, no atomics."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


def blocks(d: int, dtype: torch.dtype) -> dict[str, Any]:
    """Block sizes for ``d`` channels, at least the 16 that ``tl.dot`` wants, and how tensor cores multiply.

    16-bit numbers are tf32 numbers, so one product of these is enough; float32 takes three.
    """
    width = max(16, triton.next_power_of_2(d))
    side = 64 if width <= 64 else 32
    dot = "tf32x3" if dtype == torch.float32 else "tf32"
    return {"DOT": dot, "BLOCK_N": side, "BLOCK_M": side, "BLOCK_D": width}


@triton.jit
def _load_rows(ptr, rows, count, stride, d, D):
    """Rows of a matrix in float32, zeros beyond its end."""
    mask = (rows[:, None] < count) & (d[None, :] < D)
    return tl.load(ptr + rows[:, None] * stride + d[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_rows(ptr, x, rows, count, stride, d, D):
    mask = (rows[:, None] < count) & (d[None, :] < D)
    tl.store(ptr + rows[:, None] * stride + d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_maps_gradient(ptr, n, m, rows, skip, M):
    """Gradient of the maps at queries n and keys m, zero where there is no map."""
    mask = (n[:, None] < rows) & (m[None, :] >= skip) & (m[None, :] < M)
    return tl.load(ptr + n[:, None].to(tl.int64) * (M - skip) + (m[None, :] - skip), mask=mask, other=0.0)


@triton.jit(do_not_specialize=["N", "M", "D"])
def _attention_maps_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, N, M, D, scale,
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the attention of BLOCK_N queries of one head, with a running maximum over blocks of keys."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    q = _load_rows(q_ptr + head * N * D, n, N, D, d, D) * scale
    high = tl.full([BLOCK_N], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    out = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for m0 in range(0, M, BLOCK_M):
        m = m0 + tl.arange(0, BLOCK_M)
        k = _load_rows(k_ptr + head * M * D, m, M, D, d, D)
        scores = tl.dot(q, tl.trans(k), input_precision=DOT)
        scores = tl.where(m[None, :] < M, scores, float("-inf"))
        higher = tl.maximum(high, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(high - higher)
        total = total * shrink + tl.sum(weights, axis=1)
        v = _load_rows(v_ptr + head * M * D, m, M, D, d, D)
        out = out * shrink[:, None] + tl.dot(weights, v, input_precision=DOT)
        high = higher
    _store_rows(out_ptr + head * N * D, out / total[:, None], n, N, D, d, D)
    tl.store(lse_ptr + head * N + n, high + tl.log(total), mask=n < N)


@triton.jit(do_not_specialize=["H", "N", "M", "D", "rows", "skip"])
def _attention_maps_mean_kernel(
    q_ptr, k_ptr, lse_ptr, total_ptr, maps_ptr, H, N, M, D, rows, skip, scale, HAS_TOTAL: tl.constexpr,
    DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N rows and BLOCK_M columns of an image's maps, summed over its heads, written once."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = skip + tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    b = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mean = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for h in range(H):
        head = b * H + h
        q = _load_rows(q_ptr + head * N * D, n, rows, D, d, D) * scale
        k = _load_rows(k_ptr + head * M * D, m, M, D, d, D)
        lse = tl.load(lse_ptr + head * N + n, mask=n < rows, other=0.0)
        mean += tl.exp(tl.dot(q, tl.trans(k), input_precision=DOT) - lse[:, None])
    at = b * rows * (M - skip) + n[:, None].to(tl.int64) * (M - skip) + (m[None, :] - skip)
    mask = (n[:, None] < rows) & (m[None, :] < M)
    mean /= H
    if HAS_TOTAL:
        mean += tl.load(total_ptr + at, mask=mask, other=0.0)
    tl.store(maps_ptr + at, mean, mask=mask)


@triton.jit(do_not_specialize=["H", "N", "M", "D", "rows", "skip"])
def _attention_maps_bwd_queries_kernel(
    grad_ptr, grad_maps_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, inner_ptr, grad_q_ptr, H, N, M, D, rows, skip, scale,
    HAS_MAPS: tl.constexpr, DOT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_N queries of one head; first the sum over keys of weight times gradient."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    q = _load_rows(q_ptr + head * N * D, n, N, D, d, D) * scale
    grad = _load_rows(grad_ptr + head * N * D, n, N, D, d, D)
    lse = tl.load(lse_ptr + head * N + n, mask=n < N, other=0.0)
    inner = tl.zeros([BLOCK_N], tl.float32)
    grad_q = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for step in range(2):
        for m0 in range(0, M, BLOCK_M):
            m = m0 + tl.arange(0, BLOCK_M)
            k = _load_rows(k_ptr + head * M * D, m, M, D, d, D)
            v = _load_rows(v_ptr + head * M * D, m, M, D, d, D)
            weights = tl.exp(tl.dot(q, tl.trans(k), input_precision=DOT) - lse[:, None])
            weights = tl.where(m[None, :] < M, weights, 0.0)
            grad_weights = tl.dot(grad, tl.trans(v), input_precision=DOT)
            if HAS_MAPS:
                of_image = grad_maps_ptr + head // H * rows * (M - skip)
                grad_weights += _load_maps_gradient(of_image, n, m, rows, skip, M) / H
            if step == 0:
                inner += tl.sum(weights * grad_weights, axis=1)
            else:
                grad_scores = weights * (grad_weights - inner[:, None])
                grad_q += tl.dot(grad_scores, k, input_precision=DOT)
    _store_rows(grad_q_ptr + head * N * D, grad_q * scale, n, N, D, d, D)
    tl.store(inner_ptr + head * N + n, inner, mask=n < N)


@triton.jit(do_not_specialize=["H", "N", "M", "D", "rows", "skip"])
def _attention_maps_bwd_keys_kernel(
    grad_ptr, grad_maps_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, inner_ptr, grad_k_ptr, grad_v_ptr, H, N, M, D, rows, skip,
    scale, HAS_MAPS: tl.constexpr, DOT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the gradients of BLOCK_M keys and values of one head, summed over all queries."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    k = _load_rows(k_ptr + head * M * D, m, M, D, d, D)
    v = _load_rows(v_ptr + head * M * D, m, M, D, d, D)
    grad_k = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for n0 in range(0, N, BLOCK_N):
        n = n0 + tl.arange(0, BLOCK_N)
        q = _load_rows(q_ptr + head * N * D, n, N, D, d, D) * scale
        grad = _load_rows(grad_ptr + head * N * D, n, N, D, d, D)
        lse = tl.load(lse_ptr + head * N + n, mask=n < N, other=float("inf"))  # no weight beyond the last query
        inner = tl.load(inner_ptr + head * N + n, mask=n < N, other=0.0)
        weights = tl.exp(tl.dot(q, tl.trans(k), input_precision=DOT) - lse[:, None])
        grad_weights = tl.dot(grad, tl.trans(v), input_precision=DOT)
        if HAS_MAPS:
            of_image = grad_maps_ptr + head // H * rows * (M - skip)
            grad_weights += _load_maps_gradient(of_image, n, m, rows, skip, M) / H
        grad_v += tl.dot(tl.trans(weights), grad, input_precision=DOT)
        grad_scores = weights * (grad_weights - inner[:, None])
        grad_k += tl.dot(tl.trans(grad_scores), q, input_precision=DOT)  # q holds the scale
    _store_rows(grad_k_ptr + head * M * D, grad_k, m, M, D, d, D)
    _store_rows(grad_v_ptr + head * M * D, grad_v, m, M, D, d, D)


def attention_maps_fwd(
    q: Tensor, k: Tensor, v: Tensor, total: Tensor | None, rows: int, skip: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention ``(B, H, N, d)``, ``total`` plus the maps ``(B, rows, M - skip)``, log-sum-exp ``(B, H, N)``."""
    B, H, N, d = q.shape
    M = k.shape[2]
    out = q.new_empty((B, H, N, d))
    maps = q.new_empty((B, rows, M - skip), dtype=torch.float32)
    lse = q.new_empty((B, H, N), dtype=torch.float32)
    if lse.numel() == 0:
        return out, maps, lse
    q, k, v, size = q.contiguous(), k.contiguous(), v.contiguous(), blocks(d, q.dtype)
    _attention_maps_fwd_kernel[(triton.cdiv(N, size["BLOCK_N"]), B * H)](q, k, v, out, lse, N, M, d, scale, **size)
    if maps.numel() > 0:
        grid = (triton.cdiv(rows, size["BLOCK_N"]), triton.cdiv(M - skip, size["BLOCK_M"]), B)
        added = maps if total is None else total.contiguous()
        _attention_maps_mean_kernel[grid](
            q, k, lse, added, maps, H, N, M, d, rows, skip, scale, HAS_TOTAL=total is not None, **size
        )
    return out, maps, lse


def attention_maps_bwd(
    grad: Tensor, grad_maps: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, skip: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``; ``lse`` is what the forward returned."""
    B, H, N, d = q.shape
    M = k.shape[2]
    grads = [t.new_empty(t.shape) for t in (q, k, v)]
    if lse.numel() == 0:
        return grads[0], grads[1].zero_(), grads[2].zero_()
    grad, q, k, v, size = grad.contiguous(), q.contiguous(), k.contiguous(), v.contiguous(), blocks(d, q.dtype)
    inner = torch.empty_like(lse)
    rows = 0 if grad_maps is None else grad_maps.shape[1]
    of_maps = lse if grad_maps is None else grad_maps.contiguous()
    sizes, has = (H, N, M, d, rows, skip, scale), {"HAS_MAPS": grad_maps is not None and grad_maps.numel() > 0}
    _attention_maps_bwd_queries_kernel[(triton.cdiv(N, size["BLOCK_N"]), B * H)](
        grad, of_maps, q, k, v, lse, inner, grads[0], *sizes, **has, **size
    )
    _attention_maps_bwd_keys_kernel[(triton.cdiv(M, size["BLOCK_M"]), B * H)](
        grad, of_maps, q, k, v, lse, inner, grads[1], grads[2], *sizes, **has, **size
    )
    return grads[0], grads[1], grads[2]
