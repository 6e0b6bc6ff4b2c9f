"""Triton kernels of ``path_affinity``: one launch forward, two backward, no atomics."""

from __future__ import annotations

from functools import cache
from itertools import accumulate, chain

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcam._paths import paths

BLOCK_N = 256  # pixels of a program


@triton.jit
def _edge_at(edge_ptr, at, mask):
    """Edges clamped to [0, 1]; NaN stays."""
    e = tl.load(edge_ptr + at, mask=mask, other=0.0).to(tl.float32)
    return tl.where(e > 1, 1.0, tl.where(e < 0, 0.0, e))


@triton.jit(do_not_specialize=["H", "W", "P"])
def _path_affinity_fwd_kernel(
    edge_ptr, offsets_ptr, starts_ptr, out_ptr, winner_ptr, H, W, P,
    BLOCK_N: tl.constexpr, WINNERS: tl.constexpr,
):  # fmt: skip
    """One program: the p-th pair of BLOCK_N sources. With WINNERS, the number in the path of its first pixel that holds
    the maximum, -1 where there is no pair."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    p, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    y, x = n // W, n % W
    start, end = tl.load(starts_ptr + p), tl.load(starts_ptr + p + 1)
    to_y, to_x = y + tl.load(offsets_ptr + 2 * start), x + tl.load(offsets_ptr + 2 * start + 1)
    inside = (to_y < H) & (to_x >= 0) & (to_x < W)
    largest = tl.full([BLOCK_N], -1.0, tl.float32)
    winner = tl.full([BLOCK_N], -1, tl.int32)
    for i in range(start, end):
        dy, dx = tl.load(offsets_ptr + 2 * i), tl.load(offsets_ptr + 2 * i + 1)
        e = _edge_at(edge_ptr, b * H * W + n + dy * W + dx, inside)
        winner = tl.where(e > largest, i - start, winner)
        largest = tl.where((e > largest) | (e != e), e, largest)
    at = (b * P + p) * H * W + n
    if WINNERS:
        tl.store(winner_ptr + at, tl.where(inside & (largest == largest), winner, -1), mask=n < H * W)
    else:
        out = tl.where(inside, 1 - largest, 0.0)
        tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=n < H * W)


@triton.jit(do_not_specialize=["H", "W", "P"])
def _path_affinity_bwd_kernel(
    grad_ptr, edge_ptr, offsets_ptr, starts_ptr, winner_ptr, grad_edge_ptr, H, W, P, BLOCK_N: tl.constexpr
):
    """One program: the gradient of BLOCK_N edges, from all pairs whose maximum they hold."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1).to(tl.int64)
    y, x = n // W, n % W
    total = tl.zeros([BLOCK_N], tl.float32)
    for p in range(P):
        start, end = tl.load(starts_ptr + p), tl.load(starts_ptr + p + 1)
        for i in range(start, end):
            dy, dx = tl.load(offsets_ptr + 2 * i), tl.load(offsets_ptr + 2 * i + 1)
            source = (n < H * W) & (y >= dy) & (x >= dx) & (x - dx < W)
            at = (b * P + p) * H * W + n - dy * W - dx
            mine = tl.load(winner_ptr + at, mask=source, other=-1) == i - start
            total -= tl.load(grad_ptr + at, mask=mine, other=0.0).to(tl.float32)
    edge = tl.load(edge_ptr + b * H * W + n, mask=n < H * W, other=-1.0).to(tl.float32)
    total = tl.where((edge >= 0) & (edge <= 1), total, 0.0)
    tl.store(grad_edge_ptr + b * H * W + n, total.to(grad_edge_ptr.dtype.element_ty), mask=n < H * W)


def path_affinity_fwd(edge: Tensor, radius: int) -> Tensor:
    """``edge (B, H, W)`` -> ``(B, P, H, W)``."""
    offsets, starts = _tables(radius, edge.device)
    (B, H, W), P = edge.shape, len(starts) - 1
    out = edge.new_empty((B, P, H, W))
    if out.numel() > 0:
        grid = (triton.cdiv(H * W, BLOCK_N), P, B)
        _path_affinity_fwd_kernel[grid](
            edge.contiguous(), offsets, starts, out, starts, H, W, P, BLOCK_N=BLOCK_N, WINNERS=False
        )
    return out


def path_affinity_bwd(grad: Tensor, edge: Tensor, radius: int) -> Tensor:
    """Gradient of ``edge``. Holds one int16 a pair."""
    offsets, starts = _tables(radius, edge.device)
    (B, H, W), P = edge.shape, len(starts) - 1
    grad_edge = edge.new_empty((B, H, W))
    if grad.numel() == 0:
        return grad_edge.zero_()
    e, tiles = edge.contiguous(), triton.cdiv(H * W, BLOCK_N)
    winner = torch.empty((B, P, H, W), dtype=torch.int16, device=edge.device)
    _path_affinity_fwd_kernel[(tiles, P, B)](
        e, offsets, starts, grad_edge, winner, H, W, P, BLOCK_N=BLOCK_N, WINNERS=True
    )
    _path_affinity_bwd_kernel[(tiles, B)](
        grad.contiguous(), e, offsets, starts, winner, grad_edge, H, W, P, BLOCK_N=BLOCK_N
    )
    return grad_edge


@cache
def _tables(radius: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The offsets of all paths one after the other, and where each path starts; the last number ends the last one."""
    every = paths(radius)
    offsets = torch.tensor(list(chain.from_iterable(every)), dtype=torch.int32, device=device)
    return offsets, torch.tensor([0, *accumulate(map(len, every))], dtype=torch.int32, device=device)
