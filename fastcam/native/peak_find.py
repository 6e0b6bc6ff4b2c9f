"""Launcher of ``csrc/cpu/peak_find.cpp``. 16-bit inputs are converted to float32 first."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import _C

RULES = ("median", "mean", "max", "constant")


def peak_find_fwd(maps: Tensor, window: int, rule: str, constant: float) -> Tensor:
    """Peaks int64 ``(n, 4)`` of ``maps (B, C, H, W)``; ``rule``: median, mean, max or constant."""
    if maps.numel() == 0:
        return torch.zeros(0, 4, dtype=torch.int64)
    work = torch.promote_types(maps.dtype, torch.float32)
    x = maps.to(work).contiguous()
    B, C, H, W = x.shape
    reach = window // 2
    most = -(-H // (reach + 1)) * -(-W // (reach + 1))  # two peaks are further apart than that
    places = torch.empty((B * C, most + 1), dtype=torch.int64)
    counts = torch.empty(B * C, dtype=torch.int64)
    _C.peak_find_fwd(
        x.data_ptr(), places.data_ptr(), counts.data_ptr(), work == torch.float64, B * C, H, W, most, window,
        RULES.index(rule), constant, torch.get_num_threads(),
    )  # fmt: skip
    peaks = torch.empty((int(counts.sum()), 4), dtype=torch.int64)
    _C.peak_find_list(places.data_ptr(), counts.data_ptr(), peaks.data_ptr(), B, C, W, most)
    return peaks
