"""Triton kernels of ``random_walk``: one launch for the column sums, then one a multiplication. Affinities and
maps of one image take a few megabytes, so multiplications read them from the second-level cache."""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcam._chebyshev import coefficients, walk_degree
from fastcam._paths import destinations


def blocks(C: int) -> dict[str, int]:
    """Block sizes for ``C`` channels: each weight that is read serves a block of channels."""
    return {"BLOCK_N": 128, "BLOCK_C": min(8, triton.next_power_of_2(C))}


@triton.jit
def _power_at(affinity_ptr, at, mask, beta):
    """Affinities clamped to [0, 1], to the power beta."""
    a = tl.load(affinity_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return tl.exp2(beta * tl.log2(tl.where(a > 1, 1.0, tl.where(a < 0, 0.0, a))))


@triton.jit(do_not_specialize=["H", "W", "P"])
def _random_walk_weights_kernel(affinity_ptr, offsets_ptr, weight_ptr, H, W, P, beta, BLOCK_N: tl.constexpr):
    """One program: the p-th weight of BLOCK_N pixels, 0 where it leaves the image."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    p, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dy, dx = tl.load(offsets_ptr + 2 * p), tl.load(offsets_ptr + 2 * p + 1)
    inside = (n // W + dy < H) & (n % W + dx >= 0) & (n % W + dx < W)
    at = (b * P + p) * H * W + n
    a = tl.load(affinity_ptr + at, mask=inside, other=0.0).to(tl.float32)
    a = tl.exp2(beta * tl.log2(tl.where(a > 1, 1.0, tl.where(a < 0, 0.0, a))))
    tl.store(weight_ptr + at, tl.where(inside, a, 0.0), mask=n < H * W)


@triton.jit(do_not_specialize=["H", "W", "P"])
def _random_walk_sums_kernel(weight_ptr, offsets_ptr, sums_ptr, H, W, P, BLOCK_N: tl.constexpr):
    """One program: the column sums of BLOCK_N pixels."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1).to(tl.int64)
    y, x = n // W, n % W
    total = tl.full([BLOCK_N], 1.0, tl.float32)
    for p in range(P):
        dy, dx = tl.load(offsets_ptr + 2 * p), tl.load(offsets_ptr + 2 * p + 1)
        at = (b * P + p) * H * W + n
        total += tl.load(weight_ptr + at, mask=n < H * W, other=0.0)
        before = (n < H * W) & (y >= dy) & (x >= dx) & (x - dx < W)
        total += tl.load(weight_ptr + at - dy * W - dx, mask=before, other=0.0)
    tl.store(sums_ptr + b * H * W + n, total, mask=n < H * W)


@triton.jit(do_not_specialize=["H", "W", "P", "C"])
def _random_walk_step_kernel(
    now_ptr, weight_ptr, sums_ptr, offsets_ptr, next_ptr, difference_ptr, total_ptr, H, W, P, C, share,
    RECURSION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: one multiplication for BLOCK_C channels of BLOCK_N pixels, as the reference writes it:
    ``difference = (T - 1) now``, twice that on top of what it was in the recursion; ``next = now + difference``;
    ``total += share * next``."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    y, x = n // W, n % W
    channel = c[:, None] < C
    at = (b * C + c[:, None]) * H * W + n[None, :]
    mask = channel & (n[None, :] < H * W)
    here = tl.load(now_ptr + at, mask=mask, other=0.0)
    change = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for p in range(P):
        dy, dx = tl.load(offsets_ptr + 2 * p), tl.load(offsets_ptr + 2 * p + 1)
        jump = dy * W + dx
        after = (y + dy < H) & (x + dx >= 0) & (x + dx < W)
        before = (n < H * W) & (y >= dy) & (x >= dx) & (x - dx < W)
        weight = weight_ptr + (b * P + p) * H * W + n
        w, v = tl.load(weight, mask=after, other=0.0), tl.load(weight - jump, mask=before, other=0.0)
        change += w[None, :] * (tl.load(now_ptr + at + jump, mask=channel & after[None, :], other=0.0) - here)
        change += v[None, :] * (tl.load(now_ptr + at - jump, mask=channel & before[None, :], other=0.0) - here)
    change = change / tl.load(sums_ptr + b * H * W + n, mask=n < H * W, other=1.0)[None, :]
    if RECURSION:
        change = 2 * change + tl.load(difference_ptr + at, mask=mask, other=0.0)
    tl.store(difference_ptr + at, change, mask=mask)
    out = here + change
    tl.store(next_ptr + at, out, mask=mask)
    if share != 0:
        tl.store(total_ptr + at, tl.load(total_ptr + at, mask=mask, other=0.0) + share * out, mask=mask)


def random_walk_fwd(x: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, method: str) -> Tensor:
    """``x (B, C, H, W)`` times T^steps, with ``affinity (B, P, H, W)``."""
    return _walk(x, affinity, radius, beta, steps, method, transposed=False)


def random_walk_bwd(grad: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, method: str) -> Tensor:
    """Gradient of ``x``: ``grad`` times the transpose of T^steps."""
    return _walk(grad, affinity, radius, beta, steps, method, transposed=True)


def _walk(
    x: Tensor, affinity: Tensor, radius: int, beta: float, steps: int, method: str, *, transposed: bool
) -> Tensor:
    (B, C, H, W), P = x.shape, affinity.shape[1]
    if x.numel() == 0:
        return x.new_empty(x.shape)
    degree = walk_degree(method, steps, P, H * W)
    chebyshev = degree < steps
    shares = coefficients(steps, degree) if chebyshev else [0.0] * steps + [1.0]
    a, offsets, size = affinity.contiguous(), _offsets(radius, x.device), blocks(C)
    tiles = triton.cdiv(H * W, size["BLOCK_N"])
    sums = x.new_empty((B, 1, H, W), dtype=torch.float32)
    weight = x.new_empty((B, P, H, W), dtype=torch.float32)
    if P > 0:
        _random_walk_weights_kernel[(tiles, P, B)](a, offsets, weight, H, W, P, beta, BLOCK_N=size["BLOCK_N"])
    _random_walk_sums_kernel[(tiles, B)](weight, offsets, sums, H, W, P, BLOCK_N=size["BLOCK_N"])
    now = (x.float() / sums if transposed else x.float()).clone(memory_format=torch.contiguous_format)
    total, following, difference = shares[0] * now, torch.empty_like(now), torch.empty_like(now)
    grid = (tiles, triton.cdiv(C, size["BLOCK_C"]), B)
    for k in range(1, degree + 1):
        _random_walk_step_kernel[grid](
            now, weight, sums, offsets, following, difference, total, H, W, P, C, shares[k],
            RECURSION=chebyshev and k > 1, **size,
        )  # fmt: skip
        now, following = following, now
    return (total * sums if transposed else total).to(x.dtype)


@cache
def _offsets(radius: int, device: torch.device) -> Tensor:
    return torch.tensor(destinations(radius), dtype=torch.int32, device=device)
