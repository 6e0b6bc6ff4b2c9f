"""Reductions over regions in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def region_reduce_fwd(x: Tensor, labels: Tensor, num_regions: int, reduce: str) -> tuple[Tensor, Tensor]:
    """``(B, C, H, W)``, labels ``(B, H, W)`` -> ``(B, S, C)``, and what the backward wants.

    That is the area of each region ``(B, S)``, or for a maximum the pixel that has it ``(B, S, C)``, -1 for none.
    """
    B, C = x.shape[:2]
    work = torch.promote_types(x.dtype, torch.float32)
    at = _slots(labels, num_regions)
    flat = x.to(work).flatten(2).mT.contiguous()  # (B, N, C)
    if reduce == "max":
        index = at[:, :, None].expand(-1, -1, C)
        best = flat.new_full((B, num_regions + 1, C), -torch.inf).scatter_reduce_(1, index, flat, "amax")
        of_pixel = best.gather(1, index)
        wins = (flat == of_pixel) | (flat.isnan() & of_pixel.isnan())
        N = flat.shape[1]
        pixel = torch.where(wins, torch.arange(N, device=x.device)[:, None], N)
        first = pixel.new_full((B, num_regions + 1, C), N).scatter_reduce_(1, index, pixel, "amin")
        return best[:, :-1].to(x.dtype).contiguous(), torch.where(first == N, -1, first)[:, :-1].contiguous()
    # float64: a sum over a large region in float32 loses digits
    sums = torch.zeros(B, num_regions + 1, C, dtype=torch.float64, device=x.device)
    sums.scatter_add_(1, at[:, :, None].expand(-1, -1, C), flat.double())
    area = torch.zeros(B, num_regions + 1, dtype=torch.int64, device=x.device).scatter_add_(1, at, torch.ones_like(at))
    out, area = sums[:, :-1], area[:, :-1].contiguous()
    if reduce == "mean":
        out = out / area.clamp(min=1)[:, :, None]
    return out.to(x.dtype).contiguous(), area


def region_reduce_bwd(grad: Tensor, labels: Tensor, stat: Tensor, reduce: str) -> Tensor:
    """Gradient of the values ``(B, C, H, W)`` from that of the result ``(B, S, C)``."""
    B, S, C = grad.shape
    _, H, W = labels.shape
    work = torch.promote_types(grad.dtype, torch.float32)
    g = grad.to(work)
    if reduce == "max":
        out = g.new_zeros(B, C, H * W + 1).scatter_(2, stat.mT.remainder(H * W + 1), g.mT)[:, :, :-1]
        return out.reshape(B, C, H, W).to(grad.dtype).contiguous()
    if reduce == "mean":
        g = g / stat.clamp(min=1)[:, :, None]
    padded = torch.cat([g, g.new_zeros(B, 1, C)], 1)
    out = padded.gather(1, _slots(labels, S)[:, :, None].expand(-1, -1, C))
    return out.mT.reshape(B, C, H, W).to(grad.dtype).contiguous()


def region_reduce_hist(x: Tensor, labels: Tensor, num_regions: int, bins: int, low: float, high: float) -> Tensor:
    """How many values of each region lie in each bin, int64 ``(B, S, C, bins)``."""
    B, C = x.shape[:2]
    if x.is_floating_point():
        v = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
        counts = ~v.isnan()
        bin_of = ((v - low) * (bins / (high - low))).floor().clamp(0, bins - 1).nan_to_num(0).long()
    else:
        bin_of = x.long().flatten(2)
        counts = (bin_of >= 0) & (bin_of < bins)
        bin_of = bin_of.clamp(0, bins - 1)
    at = (_slots(labels, num_regions)[:, None] * C + torch.arange(C, device=x.device)[:, None]) * bins + bin_of
    out = torch.zeros(B, (num_regions + 1) * C * bins, dtype=torch.int64, device=x.device)
    out.scatter_add_(1, at.flatten(1), counts.flatten(1).long())
    return out.view(B, num_regions + 1, C, bins)[:, :-1].contiguous()


def _slots(labels: Tensor, S: int) -> Tensor:
    """Each pixel's region ``(B, N)``, and S for those that have none."""
    l = labels.long().flatten(1)
    if l.device.type == "cpu" and l.numel() and int(l.max()) >= S:
        raise ValueError(f"region_reduce: expected labels below num_regions {S}, got {int(l.max())}")
    return torch.where((l >= 0) & (l < S), l, S)
