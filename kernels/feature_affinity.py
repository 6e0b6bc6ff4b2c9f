"""Triton kernels of ``feature_affinity``: one launch each way, sums in float32, no atomics."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcam._paths import destinations


def blocks(D: int) -> dict[str, int]:
    """Block sizes for ``D`` features."""
    return {"BLOCK_N": 128, "BLOCK_D": min(16, triton.next_power_of_2(D))}


@triton.jit
def _has_source(y, x, dy, dx, H, W, margin):
    """Whether pixel (y, x) is the source of a pair with destination (dy, dx) away."""
    rows = (y >= 0) & (y < H - tl.maximum(dy, margin))
    return rows & (x >= tl.maximum(-dx, margin)) & (x < W - tl.maximum(dx, margin))


@triton.jit(do_not_specialize=["H", "W", "D", "P", "margin"])
def _feature_affinity_fwd_kernel(
    f_ptr, offsets_ptr, out_ptr, H, W, D, P, margin, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One program: the p-th pair of BLOCK_N sources. Programs of one block of sources follow each other."""
    p, b = tl.program_id(0), tl.program_id(2).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    dy, dx = tl.load(offsets_ptr + 2 * p), tl.load(offsets_ptr + 2 * p + 1)
    pair = _has_source(n // W, n % W, dy, dx, H, W, margin)
    total = tl.zeros([BLOCK_N], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = d0 + tl.arange(0, BLOCK_D)
        at = (b * D + d[:, None]) * H * W + n[None, :]
        mask = (d[:, None] < D) & pair[None, :]
        here = tl.load(f_ptr + at, mask=mask, other=0.0).to(tl.float32)
        there = tl.load(f_ptr + at + dy * W + dx, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(tl.abs(here - there), axis=0)
    out = tl.where(pair, tl.exp(-total / D), 0.0)
    tl.store(out_ptr + (b * P + p) * H * W + n, out.to(out_ptr.dtype.element_ty), mask=n < H * W)


@triton.jit(do_not_specialize=["H", "W", "D", "P", "margin"])
def _feature_affinity_bwd_kernel(
    grad_ptr, f_ptr, out_ptr, offsets_ptr, grad_f_ptr, H, W, D, P, margin,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: the gradient of BLOCK_D features of BLOCK_N pixels, as sources and as destinations."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    b = tl.program_id(2).to(tl.int64)
    y, x = n // W, n % W
    mask = (d[:, None] < D) & (n[None, :] < H * W)
    at = (b * D + d[:, None]) * H * W + n[None, :]
    here = tl.load(f_ptr + at, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_D, BLOCK_N], tl.float32)
    for p in range(P):
        dy, dx = tl.load(offsets_ptr + 2 * p), tl.load(offsets_ptr + 2 * p + 1)
        for role in tl.static_range(2):
            source = _has_source(y - role * dy, x - role * dx, dy, dx, H, W, margin)
            pair = (b * P + p) * H * W + n - role * (dy * W + dx)
            g = tl.load(grad_ptr + pair, mask=source, other=0.0).to(tl.float32)
            w = g * tl.load(out_ptr + pair, mask=source, other=0.0).to(tl.float32) / D
            other = at + (1 - 2 * role) * (dy * W + dx)
            there = tl.load(f_ptr + other, mask=mask & source[None, :], other=0.0).to(tl.float32)
            sign = (here > there).to(tl.float32) - (here < there).to(tl.float32)
            total -= tl.where(source[None, :], w[None, :] * sign, 0.0)
    tl.store(grad_f_ptr + at, total.to(grad_f_ptr.dtype.element_ty), mask=mask)


def feature_affinity_fwd(features: Tensor, radius: int, margin: int) -> Tensor:
    """``features (B, D, H, W)`` -> ``(B, P, H, W)``."""
    offsets = _offsets(radius, features.device)
    (B, D, H, W), P = features.shape, len(offsets)
    out = features.new_empty((B, P, H, W))
    if out.numel() > 0:
        size = blocks(D)
        _feature_affinity_fwd_kernel[(P, triton.cdiv(H * W, size["BLOCK_N"]), B)](
            features.contiguous(), offsets, out, H, W, D, P, margin, **size
        )
    return out


def feature_affinity_bwd(grad: Tensor, features: Tensor, out: Tensor, radius: int, margin: int) -> Tensor:
    """Gradient of ``features``; ``out`` is what the forward returned."""
    offsets = _offsets(radius, features.device)
    (B, D, H, W), P = features.shape, len(offsets)
    grad_f = features.new_empty((B, D, H, W))
    if grad_f.numel() > 0:
        size = blocks(D)
        _feature_affinity_bwd_kernel[(triton.cdiv(H * W, size["BLOCK_N"]), triton.cdiv(D, size["BLOCK_D"]), B)](
            grad.contiguous(), features.contiguous(), out, offsets, grad_f, H, W, D, P, margin, **size
        )
    return grad_f


@cache
def _offsets(radius: int, device: torch.device) -> Tensor:
    return torch.tensor(destinations(radius), dtype=torch.int32, device=device)
