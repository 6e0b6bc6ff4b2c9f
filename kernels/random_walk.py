"""Triton kernels of ``random_walk``: two launches for the symmetric stencil, then one a multiplication. Weights and
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
def _random_walk_root_kernel(affinity_ptr, offsets_ptr, root_ptr, H, W, P, beta, BLOCK_N: tl.constexpr):
    """One program: square roots of the column sums of BLOCK_N pixels."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1).to(tl.int64)
    y, x = n // W, n % W
    total = tl.full([BLOCK_N], 1.0, tl.float32)
    for p in range(0, P):
        dy, dx = tl.load(offsets_ptr + 2 * p), tl.load(offsets_ptr + 2 * p + 1)
        at = (b * P + p) * H * W + n
        total += _power_at(affinity_ptr, at, (y + dy < H) & (x + dx >= 0) & (x + dx < W), beta)
        before = (n < H * W) & (y >= dy) & (x >= dx) & (x - dx < W)
        total += _power_at(affinity_ptr, at - dy * W - dx, before, beta)
    tl.store(root_ptr + b * H * W + n, tl.sqrt(total), mask=n < H * W)


@triton.jit(do_not_specialize=["H", "W", "P"])
def _random_walk_scale_kernel(affinity_ptr, offsets_ptr, root_ptr, weight_ptr, H, W, P, beta, BLOCK_N: tl.constexpr):
    """One program: the p-th weight of BLOCK_N pixels in the symmetric stencil, 0 where it leaves the image."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    p, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    dy, dx = tl.load(offsets_ptr + 2 * p), tl.load(offsets_ptr + 2 * p + 1)
    inside = (n // W + dy < H) & (n % W + dx >= 0) & (n % W + dx < W)
    w = _power_at(affinity_ptr, (b * P + p) * H * W + n, inside, beta)
    here = tl.load(root_ptr + b * H * W + n, mask=inside, other=1.0)
    there = tl.load(root_ptr + b * H * W + n + dy * W + dx, mask=inside, other=1.0)
    tl.store(weight_ptr + (b * P + p) * H * W + n, tl.where(inside, w / (here * there), 0.0), mask=n < H * W)


@triton.jit(do_not_specialize=["H", "W", "P", "C"])
def _random_walk_step_kernel(
    now_ptr, weight_ptr, root_ptr, offsets_ptr, last_ptr, total_ptr, H, W, P, C, share,
    RECURSION: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: one multiplication for BLOCK_C channels of BLOCK_N pixels; ``last = S now`` or, in the recursion,
    ``2 S now - last``; ``total += share * last``."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    y, x = n // W, n % W
    channel = c[:, None] < C
    at = (b * C + c[:, None]) * H * W + n[None, :]
    mask = channel & (n[None, :] < H * W)
    root = tl.load(root_ptr + b * H * W + n, mask=n < H * W, other=1.0)
    out = tl.load(now_ptr + at, mask=mask, other=0.0) / (root * root)[None, :]
    for p in range(0, P):
        dy, dx = tl.load(offsets_ptr + 2 * p), tl.load(offsets_ptr + 2 * p + 1)
        jump = dy * W + dx
        after = (y + dy < H) & (x + dx >= 0) & (x + dx < W)
        before = (n < H * W) & (y >= dy) & (x >= dx) & (x - dx < W)
        weight = weight_ptr + (b * P + p) * H * W + n
        w, v = tl.load(weight, mask=after, other=0.0), tl.load(weight - jump, mask=before, other=0.0)
        out += w[None, :] * tl.load(now_ptr + at + jump, mask=channel & after[None, :], other=0.0)
        out += v[None, :] * tl.load(now_ptr + at - jump, mask=channel & before[None, :], other=0.0)
    if RECURSION:
        out = 2 * out - tl.load(last_ptr + at, mask=mask, other=0.0)
    tl.store(last_ptr + at, out, mask=mask)
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
    root = x.new_empty((B, 1, H, W), dtype=torch.float32)
    weight = x.new_empty((B, P, H, W), dtype=torch.float32)
    _random_walk_root_kernel[(tiles, B)](a, offsets, root, H, W, P, beta, BLOCK_N=size["BLOCK_N"])
    if P > 0:
        _random_walk_scale_kernel[(tiles, P, B)](a, offsets, root, weight, H, W, P, beta, BLOCK_N=size["BLOCK_N"])
    now = (x.float() / root if transposed else x.float() * root).contiguous()
    total, last = shares[0] * now, torch.empty_like(now)
    grid = (tiles, triton.cdiv(C, size["BLOCK_C"]), B)
    for k in range(1, degree + 1):
        _random_walk_step_kernel[grid](
            now, weight, root, offsets, last, total, H, W, P, C, shares[k], RECURSION=chebyshev and k > 1, **size
        )
        now, last = last, now
    return (total * root if transposed else total / root).to(x.dtype)


@cache
def _offsets(radius: int, device: torch.device) -> Tensor:
    return torch.tensor(destinations(radius), dtype=torch.int32, device=device)
