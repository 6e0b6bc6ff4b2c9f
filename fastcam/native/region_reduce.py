"""Launcher of ``csrc/cpu/region_reduce.cpp``, which takes 16-bit values as float32."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import _C

REDUCE = {"mean": 0, "sum": 1, "max": 2}
KIND = {torch.float32: 0, torch.float64: 1, torch.int64: 2}


def region_reduce_fwd(x: Tensor, labels: Tensor, num_regions: int, reduce: str) -> tuple[Tensor, Tensor]:
    """``(B, C, H, W)``, labels ``(B, H, W)`` -> ``(B, S, C)``, and what the backward wants.

    That is the area of each region ``(B, S)``, or for a maximum the pixel that has it ``(B, S, C)``, -1 for none.
    """
    B, C, H, W = x.shape
    work = torch.promote_types(x.dtype, torch.float32)
    values, l = x.to(work).contiguous(), labels.long().contiguous()
    out = torch.empty((B, num_regions, C), dtype=work)
    stat = torch.empty((B, num_regions, *((C,) if reduce == "max" else ())), dtype=torch.int64)
    outside = _C.region_reduce_fwd(
        values.data_ptr(), l.data_ptr(), out.data_ptr(), stat.data_ptr(), work == torch.float64, B, C, H * W,
        num_regions, REDUCE[reduce], torch.get_num_threads(),
    )  # fmt: skip
    _refuse(outside, num_regions)
    return out.to(x.dtype), stat


def region_reduce_bwd(grad: Tensor, labels: Tensor, stat: Tensor, reduce: str) -> Tensor:
    """Gradient of the values ``(B, C, H, W)`` from that of the result ``(B, S, C)``."""
    B, S, C = grad.shape
    _, H, W = labels.shape
    work = torch.promote_types(grad.dtype, torch.float32)
    g, l = grad.to(work).contiguous(), labels.long().contiguous()
    out = torch.empty((B, C, H, W), dtype=work)
    _C.region_reduce_bwd(
        g.data_ptr(), l.data_ptr(), stat.contiguous().data_ptr(), out.data_ptr(), work == torch.float64, B, C, H * W, S,
        REDUCE[reduce], torch.get_num_threads(),
    )  # fmt: skip
    return out.to(grad.dtype)


def region_reduce_hist(x: Tensor, labels: Tensor, num_regions: int, bins: int, low: float, high: float) -> Tensor:
    """How many values of each region lie in each bin, int64 ``(B, S, C, bins)``."""
    B, C, H, W = x.shape
    work = torch.promote_types(x.dtype, torch.float32) if x.is_floating_point() else torch.int64
    values, l = x.to(work).contiguous(), labels.long().contiguous()
    out = torch.zeros((B, num_regions, C, bins), dtype=torch.int64)
    outside = _C.region_reduce_hist(
        values.data_ptr(), l.data_ptr(), out.data_ptr(), KIND[work], B, C, H * W, num_regions, bins, low, high,
        torch.get_num_threads(),
    )  # fmt: skip
    _refuse(outside, num_regions)
    return out


def _refuse(outside: int, num_regions: int) -> None:
    if outside >= 0:
        raise ValueError(f"region_reduce: expected labels below num_regions {num_regions}, got {outside}")
