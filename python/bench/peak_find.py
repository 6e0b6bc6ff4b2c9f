"""Peaks against max pooling with indices and a median, as PRM's authors find them, and scikit-image."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastcam import peak_find
from fastcam.bench._harness import Case, CaseIterator, compiled


def pooled(maps: Tensor) -> Tensor:
    """Max pooling of a map padded with -inf; a peak is its own window's maximum and at least the median."""
    H, W = maps.shape[2:]
    _, place = F.max_pool2d(F.pad(maps, (1, 1, 1, 1), value=-torch.inf), 3, 1, return_indices=True)
    rows, columns = torch.arange(1, H + 1), torch.arange(1, W + 1)
    own = (rows[:, None] * (W + 2) + columns).to(maps.device)
    median = maps.flatten(2).median(dim=2)[0][:, :, None, None]
    return ((place == own) & (maps >= median)).nonzero()


def cases(device: str) -> CaseIterator:
    """PRM's maps in training and at inference, VOC and Cityscapes images, smooth maps and noise."""
    g = torch.Generator().manual_seed(0)
    for B, C, H, W, coarse in (
        (16, 20, 112, 112, 14),
        (1, 20, 28, 28, None),
        (1, 20, 375, 500, 24),
        (1, 20, 375, 500, None),
        (1, 19, 1024, 2048, 64),
    ):
        if coarse is None:
            maps, kind = torch.randn(B, C, H, W, generator=g), "noise"
        else:
            small = torch.randn(B, C, coarse, coarse * W // H, generator=g)
            maps, kind = F.interpolate(small, (H, W), mode="bicubic", align_corners=True), "smooth"
        maps = maps.to(device)
        runners: dict[str, Callable[[], Any]] = {
            "fastcam": lambda maps=maps: peak_find(maps),
            "max_pool2d, median": lambda maps=maps: pooled(maps),
        }
        if device == "cuda":
            runners["fastcam triton"] = lambda maps=maps: peak_find(maps, backend="triton")
        else:
            fused = compiled(pooled)
            runners["max_pool2d, median, torch.compile"] = lambda maps=maps, fused=fused: fused(maps)
            try:
                from skimage.feature import peak_local_max
            except ModuleNotFoundError:
                pass
            else:
                planes = maps.flatten(0, 1).numpy()
                runners["scikit-image"] = lambda planes=planes, find=peak_local_max: [
                    find(p, min_distance=1, threshold_abs=np.median(p), exclude_border=False) for p in planes
                ]
        yield Case(
            name=f"B {B}, C {C}, {H} x {W}, {kind}, float32, window 3, median",
            runners=runners,
            expected=lambda maps=maps: pooled(maps),
            moved=4 * maps.numel(),
            operations=6 * maps.numel(),
            unchecked={"scikit-image": "a list a map, sorted by value; plateaus are peaks as a whole"},
        )
