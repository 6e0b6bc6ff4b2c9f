"""Triton kernels of ``prototype_similarity``: three launches at most, sums in float32, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT = 4096  # pixels whose share of a prototype's gradient one program sums


def blocks(K: int) -> dict[str, int]:
    """Block sizes for ``K`` prototypes. ``tl.dot`` wants at least 16 of everything."""
    return {"BLOCK_N": 64, "BLOCK_D": 32, "BLOCK_K": min(max(16, triton.next_power_of_2(K)), 64)}


@triton.jit(do_not_specialize=["N", "D", "K"])
def _prototype_similarity_fwd_kernel(
    x_ptr, p_ptr, out_ptr, r_ptr, N, D, K, x_stride_b, x_stride_d, x_stride_n, p_stride_b, eps,
    RELU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N pixels of an image against BLOCK_K unit prototypes. Reads its pixels' features once."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1).to(tl.int64)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    dot = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        x = tl.load(
            x_ptr + b * x_stride_b + d[:, None] * x_stride_d + n[None, :] * x_stride_n,
            mask=(d[:, None] < D) & (n[None, :] < N), other=0.0,
        ).to(tl.float32)  # fmt: skip
        p = tl.load(
            p_ptr + b * p_stride_b + k[:, None] * D + d[None, :], mask=(k[:, None] < K) & (d[None, :] < D), other=0.0
        )
        dot += tl.dot(p, x, input_precision="ieee")
        squares += tl.sum(x * x, axis=0)
    norm = tl.sqrt(squares)
    r = 1.0 / tl.where(norm < eps, eps, norm)
    out = dot * r[None, :]
    if RELU:
        out = tl.where(out < 0, 0.0, out)  # NaN stays NaN
    mask = (k[:, None] < K) & (n[None, :] < N)
    tl.store(out_ptr + (b * K + k[:, None]) * N + n[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)
    if tl.program_id(2) == 0:
        tl.store(r_ptr + b * N + n, r, mask=n < N)


@triton.jit(do_not_specialize=["N", "D", "K"])
def _prototype_similarity_bwd_features_kernel(
    grad_ptr, x_ptr, p_ptr, out_ptr, r_ptr, grad_x_ptr, N, D, K, x_stride_b, x_stride_d, x_stride_n, p_stride_b, eps,
    RELU: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_D features of BLOCK_N pixels, summed over all prototypes."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b = tl.program_id(2).to(tl.int64)
    total = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    radial = tl.zeros([BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        at = (b * K + k[:, None]) * N + n[None, :]
        mask = (k[:, None] < K) & (n[None, :] < N)
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        s = tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            g = tl.where(s > 0, g, 0.0)
        p = tl.load(
            p_ptr + b * p_stride_b + k[None, :] * D + d[:, None], mask=(k[None, :] < K) & (d[:, None] < D), other=0.0
        )
        total += tl.dot(p, g, input_precision="ieee")
        radial += tl.sum(g * s, axis=0)
    r = tl.load(r_ptr + b * N + n, mask=n < N, other=0.0)
    mask = (d[:, None] < D) & (n[None, :] < N)
    x = tl.load(x_ptr + b * x_stride_b + d[:, None] * x_stride_d + n[None, :] * x_stride_n, mask=mask, other=0.0)
    radial = tl.where(r * eps < 1 - 1e-6, radial * r, 0.0)  # no radial part where eps was the divisor
    grad_x = r[None, :] * (total - x.to(tl.float32) * radial[None, :])
    at = (b * D + d[:, None]) * N + n[None, :]
    tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "D", "K"])
def _prototype_similarity_bwd_prototypes_kernel(
    grad_ptr, x_ptr, out_ptr, r_ptr, parts_ptr, N, D, K, splits, x_stride_b, x_stride_d, x_stride_n,
    RELU: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: sum over SPLIT pixels of one image of the gradient of BLOCK_K unit prototypes, BLOCK_D features."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b = tl.program_id(2).to(tl.int64) // splits
    first = (tl.program_id(2).to(tl.int64) % splits) * SPLIT
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for n0 in range(0, SPLIT, BLOCK_N):
        n = first + n0 + tl.arange(0, BLOCK_N)
        at = (b * K + k[:, None]) * N + n[None, :]
        mask = (k[:, None] < K) & (n[None, :] < N)
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if RELU:
            g = tl.where(tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32) > 0, g, 0.0)
        g = g * tl.load(r_ptr + b * N + n, mask=n < N, other=0.0)[None, :]
        x = tl.load(
            x_ptr + b * x_stride_b + d[None, :] * x_stride_d + n[:, None] * x_stride_n,
            mask=(d[None, :] < D) & (n[:, None] < N), other=0.0,
        ).to(tl.float32)  # fmt: skip
        total += tl.dot(g, x, input_precision="ieee")
    at = (tl.program_id(2).to(tl.int64) * K + k[:, None]) * D + d[None, :]
    tl.store(parts_ptr + at, total, mask=(k[:, None] < K) & (d[None, :] < D))


def prototype_similarity_fwd(x: Tensor, p: Tensor, relu: bool, eps: float) -> tuple[Tensor, Tensor]:
    """Similarity ``(B, K, H, W)``, and ``1 / max(norm, eps)`` of ``x (B, D, H, W)``: ``(B, H, W)``."""
    B, D, H, W = x.shape
    K, N = p.shape[-2], H * W
    out = x.new_empty((B, K, H, W))
    r = x.new_empty((B, H, W), dtype=torch.float32)
    if r.numel() == 0:
        return out, r
    flat, (p_hat, _) = x.flatten(2), _normalize(p, eps)
    size = blocks(K)
    grid = (triton.cdiv(N, size["BLOCK_N"]), B, max(1, triton.cdiv(K, size["BLOCK_K"])))
    _prototype_similarity_fwd_kernel[grid](
        flat, p_hat, out, r, N, D, K, *flat.stride(), _batch_stride(p_hat), eps, RELU=relu, **size
    )
    return out, r


def prototype_similarity_bwd(
    grad: Tensor, x: Tensor, p: Tensor, out: Tensor, r: Tensor, relu: bool, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``p``; ``out`` and ``r`` are what the forward returned."""
    B, D, H, W = x.shape
    K, N = p.shape[-2], H * W
    grad_x = x.new_empty((B, D, H, W))
    if grad_x.numel() == 0 or K == 0:
        return grad_x.zero_(), torch.zeros_like(p)
    g, flat, (p_hat, p_norm) = grad.contiguous(), x.flatten(2), _normalize(p, eps)
    size, splits = blocks(K), triton.cdiv(N, SPLIT)
    tiles_n, tiles_d, tiles_k = (triton.cdiv(n, size[b]) for n, b in ((N, "BLOCK_N"), (D, "BLOCK_D"), (K, "BLOCK_K")))
    _prototype_similarity_bwd_features_kernel[(tiles_n, tiles_d, B)](
        g, flat, p_hat, out, r, grad_x, N, D, K, *flat.stride(), _batch_stride(p_hat), eps, RELU=relu, **size
    )
    parts = x.new_empty((B, splits, K, D), dtype=torch.float32)
    _prototype_similarity_bwd_prototypes_kernel[(tiles_k, tiles_d, B * splits)](
        g, flat, out, r, parts, N, D, K, splits, *flat.stride(), RELU=relu, SPLIT=SPLIT, **size
    )
    grad_p_hat = parts.sum((0, 1) if p.ndim == 2 else 1)
    radial = (grad_p_hat * p_hat).sum(-1, keepdim=True) * p_hat * (p_norm > eps)
    return grad_x, ((grad_p_hat - radial) / p_norm.clamp_min(eps)).to(p.dtype)


def _normalize(p: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Prototypes of unit length, contiguous, and their norms, both float32."""
    norm = torch.linalg.vector_norm(p, dim=-1, keepdim=True, dtype=torch.float32)
    return (p.float() / norm.clamp_min(eps)).contiguous(), norm


def _batch_stride(p_hat: Tensor) -> int:
    """From one image's prototypes to the next one's: 0 where all share one set."""
    return p_hat.stride(0) if p_hat.ndim == 3 else 0
