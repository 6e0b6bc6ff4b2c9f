"""Triton kernel of ``window_reduce``: one launch each way, sums in float32, no atomics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor


def blocks(K: int) -> dict[str, int]:
    """Block sizes for ``K`` planes."""
    return {"BLOCK_N": 64, "BLOCK_K": min(16, triton.next_power_of_2(K))}


@triton.jit(do_not_specialize=["H", "W", "K", "reach"])
def _window_reduce_kernel(
    x_ptr, labels_ptr, rings_ptr, r_ptr, out_ptr, H, W, K, reach, x_stride_b, x_stride_k, x_stride_h, x_stride_w,
    BACKWARD: tl.constexpr, BY_COUNT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: the sums of BLOCK_N pixels in BLOCK_K planes. Forward, it writes r, by which it multiplies them;
    backward, r multiplies what is summed."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    b = tl.program_id(2).to(tl.int64)
    inside = n < H * W
    y, x = n // W, n % W
    labels_ptr += b * H * W
    r_ptr += b * H * W
    centre = tl.load(labels_ptr + n, mask=inside, other=-1)
    total = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    divisor = tl.zeros([BLOCK_N], tl.float32)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            ny, nx = y + dy, x + dx
            there = inside & (ny >= 0) & (ny < H) & (nx >= 0) & (nx < W)
            label = tl.load(labels_ptr + ny * W + nx, mask=there, other=-1)
            same = there & (label == centre) & (centre >= 0)
            weight = tl.load(rings_ptr + tl.maximum(tl.maximum(dy, -dy), tl.maximum(dx, -dx)))
            at = b * x_stride_b + k[:, None] * x_stride_k + (ny * x_stride_h + nx * x_stride_w)[None, :]
            value = tl.load(x_ptr + at, mask=(k[:, None] < K) & same[None, :], other=0.0).to(tl.float32)
            if BACKWARD:
                value *= tl.load(r_ptr + ny * W + nx, mask=same, other=0.0)[None, :]
            else:
                divisor += tl.where(same, 1.0 if BY_COUNT else weight, 0.0)
            total += value * weight
    if not BACKWARD:
        r = tl.where(centre >= 0, 1 / tl.where(centre >= 0, divisor, 1.0), 0.0)
        total *= r[None, :]
        if tl.program_id(1) == 0:
            tl.store(r_ptr + n, r, mask=inside)
    mask = (k[:, None] < K) & inside[None, :]
    at = (b * K + k[:, None]) * H * W + n[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


def window_reduce_fwd(x: Tensor, labels: Tensor, rings: Sequence[float], by_count: bool) -> tuple[Tensor, Tensor]:
    """Means ``(B, K, H, W)``, and the reciprocal of every pixel's divisor ``(B, H, W)``."""
    r = x.new_zeros(labels.shape, dtype=torch.float32)
    return _launch(x, labels, r, rings, backward=False, by_count=by_count), r


def window_reduce_bwd(grad: Tensor, labels: Tensor, r: Tensor, rings: Sequence[float]) -> Tensor:
    """Gradient of ``x``; ``r`` is what the forward returned."""
    return _launch(grad, labels, r, rings, backward=True, by_count=False)


def _launch(x: Tensor, labels: Tensor, r: Tensor, rings: Sequence[float], *, backward: bool, by_count: bool) -> Tensor:
    B, K, H, W = x.shape
    out = x.new_empty(x.shape)
    if labels.numel() == 0:
        return out
    size, reach = blocks(K), min(len(rings) - 1, max(H, W) - 1)
    _window_reduce_kernel[(triton.cdiv(H * W, size["BLOCK_N"]), max(1, triton.cdiv(K, size["BLOCK_K"])), B)](
        x, labels.contiguous(), _table(tuple(rings), x.device), r, out, H, W, K, reach, *x.stride(),
        BACKWARD=backward, BY_COUNT=by_count, **size,
    )  # fmt: skip
    return out


@cache
def _table(rings: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(rings, dtype=torch.float32, device=device)
