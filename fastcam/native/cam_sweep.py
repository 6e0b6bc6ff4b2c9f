"""Launcher of ``csrc/cpu/cam_sweep.cpp``, which takes 16-bit scores as float32."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import _C
from fastcam.native.cam_fuse import address


def cam_sweep_fwd(
    scores: Tensor, target: Tensor, thresholds: Tensor, labels: Tensor, present: Tensor | None, num_classes: int,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    """Scores ``(B, n, H, W)``, true labels ``(B, H, W)``, ascending thresholds ``(T,)``, labels of channels ``(n,)`` ->
    counts int64 ``(C + 1, C + 1, T + 1)`` of true label, best label, number of thresholds below its score."""
    B, n, H, W = scores.shape
    work = torch.promote_types(scores.dtype, torch.float32)
    x, true = scores.to(work).contiguous(), target.long().contiguous()
    planes, numbers = thresholds.to(work).contiguous(), labels.contiguous()
    mask = None if present is None else present.contiguous()
    counts = torch.zeros((num_classes + 1, num_classes + 1, len(planes) + 1), dtype=torch.int64)
    outside = _C.cam_sweep_fwd(
        x.data_ptr(), true.data_ptr(), planes.data_ptr(), numbers.data_ptr(), address(mask), counts.data_ptr(),
        work == torch.float64, B, n, H * W, num_classes, len(planes), ignore_index, torch.get_num_threads(),
    )  # fmt: skip
    if outside != ignore_index:
        raise ValueError(f"cam_sweep: expected target from 0 to {num_classes}, got {outside}")
    return counts
