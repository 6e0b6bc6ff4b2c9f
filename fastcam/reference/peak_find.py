"""Local maxima of maps in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def map_thresholds(x: Tensor, rule: str, constant: float) -> Tensor:
    """What a peak must reach, float64 ``(B, C)``, of maps ``(B, C, N)``, N at least 1."""
    if rule == "constant":
        return torch.full(x.shape[:2], constant, dtype=torch.float64, device=x.device)
    if rule == "median":
        return x.median(dim=2)[0].double()
    largest = x.amax(dim=2).double()
    return largest if rule == "max" else torch.minimum(x.double().mean(dim=2), largest)


def peak_find_fwd(maps: Tensor, window: int, rule: str, constant: float) -> Tensor:
    """Peaks int64 ``(n, 4)`` of ``maps (B, C, H, W)``; ``rule``: median, mean, max or constant."""
    if maps.numel() == 0:
        return torch.zeros(0, 4, dtype=torch.int64, device=maps.device)
    x = maps.to(torch.promote_types(maps.dtype, torch.float32))
    x = torch.where(x.isnan(), -torch.inf, x)
    reach = window // 2
    W = x.shape[3]
    rows = F.max_pool2d(F.pad(x, (reach, reach), value=-torch.inf), (1, window), 1)
    beside = F.max_pool2d(F.pad(x, (reach, reach), value=-torch.inf), (1, reach), 1)  # of every `reach` in a row
    left, right = beside[..., :W], beside[..., reach + 1 :]
    stacked = F.max_pool2d(F.pad(rows, (0, 0, reach, reach), value=-torch.inf), (reach, 1), 1)
    above, below = stacked[..., : x.shape[2], :], stacked[..., reach + 1 :, :]
    peak = (x > above) & (x > left) & (x >= right) & (x >= below)
    return (peak & (x >= map_thresholds(x.flatten(2), rule, constant)[:, :, None, None])).nonzero().contiguous()
