"""Triton kernels of ``region_pool``: three launches at most, sums in float32, no atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT = 4096  # pixels whose share of a region one program sums


def blocks(K: int) -> dict[str, int]:
    """Block sizes for ``K`` regions. ``tl.dot`` wants at least 16 of everything."""
    return {"BLOCK_N": 64, "BLOCK_D": 32, "BLOCK_K": min(max(16, triton.next_power_of_2(K)), 64)}


@triton.jit(do_not_specialize=["N", "D", "K", "splits"])
def _region_pool_fwd_kernel(
    x_ptr, w_ptr, shift_ptr, parts_ptr, N, D, K, splits, x_stride_b, x_stride_d, x_stride_n,
    w_stride_b, w_stride_k, w_stride_n,
    SOFTMAX: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: sum over SPLIT pixels of one image of BLOCK_D features, weighted for BLOCK_K regions."""
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b = tl.program_id(2).to(tl.int64) // splits
    first = (tl.program_id(2).to(tl.int64) % splits) * SPLIT
    shift = tl.load(shift_ptr + b * K + k, mask=k < K, other=0.0)
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for n0 in range(0, SPLIT, BLOCK_N):
        n = first + n0 + tl.arange(0, BLOCK_N)
        inside = (k[:, None] < K) & (n[None, :] < N)
        w = tl.load(
            w_ptr + b * w_stride_b + k[:, None] * w_stride_k + n[None, :] * w_stride_n, mask=inside, other=0.0
        ).to(tl.float32)
        if SOFTMAX:
            w = tl.where(inside, tl.exp(w - shift[:, None]), 0.0)
        x = tl.load(
            x_ptr + b * x_stride_b + d[None, :] * x_stride_d + n[:, None] * x_stride_n,
            mask=(d[None, :] < D) & (n[:, None] < N), other=0.0,
        ).to(tl.float32)  # fmt: skip
        total += tl.dot(w, x, input_precision="ieee")
    at = (tl.program_id(2).to(tl.int64) * K + k[:, None]) * D + d[None, :]
    tl.store(parts_ptr + at, total, mask=(k[:, None] < K) & (d[None, :] < D))


@triton.jit(do_not_specialize=["N", "D", "K"])
def _region_pool_bwd_features_kernel(
    grad_ptr, w_ptr, r_ptr, grad_x_ptr, N, D, K, w_stride_b, w_stride_k, w_stride_n,
    SOFTMAX: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_D features of BLOCK_N pixels, summed over all regions."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b = tl.program_id(2).to(tl.int64)
    total = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    for k0 in range(0, K, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        inside = (k[:, None] < K) & (n[None, :] < N)
        r = tl.load(r_ptr + b * K + k, mask=k < K, other=0.0)
        w = tl.load(
            w_ptr + b * w_stride_b + k[:, None] * w_stride_k + n[None, :] * w_stride_n, mask=inside, other=0.0
        ).to(tl.float32)
        if SOFTMAX:
            w = tl.where(inside, tl.exp(w - r[:, None]), 0.0)
        else:
            w = w * r[:, None]
        g = tl.load(
            grad_ptr + (b * K + k[None, :]) * D + d[:, None], mask=(k[None, :] < K) & (d[:, None] < D), other=0.0
        ).to(tl.float32)
        total += tl.dot(g, w, input_precision="ieee")
    at = (b * D + d[:, None]) * N + n[None, :]
    mask = (d[:, None] < D) & (n[None, :] < N)
    tl.store(grad_x_ptr + at, total.to(grad_x_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["N", "D", "K"])
def _region_pool_bwd_weights_kernel(
    grad_ptr, x_ptr, w_ptr, out_ptr, r_ptr, grad_w_ptr, N, D, K, x_stride_b, x_stride_d, x_stride_n,
    w_stride_b, w_stride_k, w_stride_n, SOFTMAX: tl.constexpr, CENTRED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of the weights of BLOCK_N pixels in BLOCK_K regions. Reads its features once."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1).to(tl.int64)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    dot = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    along = tl.zeros([BLOCK_K], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        at = (b * K + k[:, None]) * D + d[None, :]
        mask = (k[:, None] < K) & (d[None, :] < D)
        g = tl.load(grad_ptr + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(
            x_ptr + b * x_stride_b + d[:, None] * x_stride_d + n[None, :] * x_stride_n,
            mask=(d[:, None] < D) & (n[None, :] < N), other=0.0,
        ).to(tl.float32)  # fmt: skip
        dot += tl.dot(g, x, input_precision="ieee")
        if CENTRED:
            along += tl.sum(g * tl.load(out_ptr + at, mask=mask, other=0.0).to(tl.float32), axis=1)
    r = tl.load(r_ptr + b * K + k, mask=k < K, other=0.0)
    inside = (k[:, None] < K) & (n[None, :] < N)
    grad_w = dot - along[:, None]
    if SOFTMAX:
        w = tl.load(
            w_ptr + b * w_stride_b + k[:, None] * w_stride_k + n[None, :] * w_stride_n, mask=inside, other=0.0
        ).to(tl.float32)
        grad_w = grad_w * tl.where(inside, tl.exp(w - r[:, None]), 0.0)
    else:
        grad_w = grad_w * r[:, None]
    tl.store(grad_w_ptr + (b * K + k[:, None]) * N + n[None, :], grad_w.to(grad_w_ptr.dtype.element_ty), mask=inside)


def region_pool_fwd(x: Tensor, w: Tensor, normalize: str, eps: float) -> tuple[Tensor, Tensor]:
    """Pooled features ``(B, K, D)``, and what the backward needs of every region, ``(B, K)``."""
    B, D, H, W = x.shape
    K, N = w.shape[1], H * W
    flat_x, flat_w = x.flatten(2), w.flatten(2)
    ones = torch.ones((B, K), dtype=torch.float32, device=x.device)
    if normalize == "softmax":
        r = torch.logsumexp(flat_w.float(), dim=2)
    elif normalize == "sum":
        r = 1 / (flat_w.sum(dim=2, dtype=torch.float32) + eps)
    else:
        r = ones / max(1, N) if normalize == "area" else ones
    if B * K * D * N == 0:
        return x.new_zeros((B, K, D)), r
    size, splits = blocks(K), triton.cdiv(N, SPLIT)
    parts = x.new_empty((B, splits, K, D), dtype=torch.float32)
    grid = (triton.cdiv(K, size["BLOCK_K"]), triton.cdiv(D, size["BLOCK_D"]), B * splits)
    softmax = normalize == "softmax"
    _region_pool_fwd_kernel[grid](
        flat_x, flat_w, r, parts, N, D, K, splits, *flat_x.stride(), *flat_w.stride(),
        SOFTMAX=softmax, SPLIT=SPLIT, **size,
    )  # fmt: skip
    out = parts.sum(1)
    return (out if softmax else out * r[:, :, None]).to(x.dtype), r


def region_pool_bwd(
    grad: Tensor, x: Tensor, w: Tensor, out: Tensor, r: Tensor, normalize: str
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``w``; ``out`` and ``r`` are what the forward returned."""
    B, D, H, W = x.shape
    K, N = w.shape[1], H * W
    grad_x, grad_w = x.new_empty((B, D, H, W)), w.new_empty((B, K, H, W))
    if B * K * D * N == 0:
        return grad_x.zero_(), grad_w.zero_()
    g, flat_x, flat_w = grad.contiguous(), x.flatten(2), w.flatten(2)
    size, softmax = blocks(K), normalize == "softmax"
    tiles_n, tiles_d, tiles_k = (triton.cdiv(n, size[b]) for n, b in ((N, "BLOCK_N"), (D, "BLOCK_D"), (K, "BLOCK_K")))
    _region_pool_bwd_features_kernel[(tiles_n, tiles_d, B)](
        g, flat_w, r, grad_x, N, D, K, *flat_w.stride(), SOFTMAX=softmax, **size
    )
    _region_pool_bwd_weights_kernel[(tiles_n, B, tiles_k)](
        g, flat_x, flat_w, out, r, grad_w, N, D, K, *flat_x.stride(), *flat_w.stride(),
        SOFTMAX=softmax, CENTRED=normalize in ("softmax", "sum"), **size,
    )  # fmt: skip
    return grad_x, grad_w
