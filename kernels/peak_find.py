"""Triton kernel of ``peak_find``: which pixels are peaks, in one pass after the thresholds of the maps."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcam.reference.peak_find import map_thresholds


def blocks() -> dict[str, int]:
    """Pixels of a program."""
    return {"BLOCK_N": 256}


@triton.jit(do_not_specialize=["C", "H", "W", "reach"])
def _peak_find_fwd_kernel(
    maps_ptr, threshold_ptr, peak_ptr, C, H, W, maps_stride_b, maps_stride_c, maps_stride_h, maps_stride_w, reach,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_N pixels of a map, each compared with the window around it."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    plane = tl.program_id(1).to(tl.int64)
    y, x = n // W, n % W
    inside = n < H * W
    base = maps_ptr + plane // C * maps_stride_b + plane % C * maps_stride_c
    at = base + y * maps_stride_h + x * maps_stride_w
    centre = tl.load(at, mask=inside, other=float("-inf")).to(tl.float32)
    before = tl.full([BLOCK_N], float("-inf"), tl.float32)
    after = tl.full([BLOCK_N], float("-inf"), tl.float32)
    for dy in range(-reach, reach + 1):
        for dx in range(-reach, reach + 1):
            there = inside & (y + dy >= 0) & (y + dy < H) & (x + dx >= 0) & (x + dx < W)
            value = tl.load(at + dy * maps_stride_h + dx * maps_stride_w, mask=there, other=float("-inf"))
            value = value.to(tl.float32)  # a NaN is larger than nothing
            first = (dy < 0) | ((dy == 0) & (dx < 0))
            last = (dy > 0) | ((dy == 0) & (dx > 0))
            before = tl.where(first & (value > before), value, before)
            after = tl.where(last & (value > after), value, after)
    least = tl.load(threshold_ptr + plane)
    peak = (centre > before) & (centre >= after) & (centre >= least)
    tl.store(peak_ptr + plane * H * W + n, peak.to(tl.int8), mask=inside)


def peak_find_fwd(maps: Tensor, window: int, rule: str, constant: float) -> Tensor:
    """Peaks int64 ``(n, 4)`` of ``maps (B, C, H, W)``; ``rule``: median, mean, max or constant."""
    if maps.numel() == 0:
        return torch.zeros(0, 4, dtype=torch.int64, device=maps.device)
    B, C, H, W = maps.shape
    planes = maps.flatten(2).float()
    exact = map_thresholds(torch.where(planes.isnan(), -torch.inf, planes), rule, constant)
    least = exact.float()  # the smallest float32 that is not below it
    least = torch.where(least.double() < exact, least.nextafter(torch.full_like(least, torch.inf)), least)
    peak = torch.empty((B, C, H, W), dtype=torch.int8, device=maps.device)
    sizes = blocks()
    _peak_find_fwd_kernel[triton.cdiv(H * W, sizes["BLOCK_N"]), B * C](
        maps, least.contiguous(), peak, C, H, W, *maps.stride(), window // 2, **sizes
    )
    return peak.nonzero().contiguous()
