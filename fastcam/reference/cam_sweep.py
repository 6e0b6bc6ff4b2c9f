"""Counts of true label, best class and thresholds exceeded, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam.reference.cam_label import best_label


def cam_sweep_fwd(
    scores: Tensor, target: Tensor, thresholds: Tensor, labels: Tensor, present: Tensor | None, num_classes: int,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    """Scores ``(B, n, H, W)``, true labels ``(B, H, W)``, ascending thresholds ``(T,)``, labels of channels ``(n,)`` ->
    counts int64 ``(C + 1, C + 1, T + 1)`` of true label, best label, number of thresholds below its score."""
    true = target.long()
    counts = true != ignore_index
    outside = true[counts & ((true < 0) | (true > num_classes))]
    if len(outside):
        raise ValueError(f"cam_sweep: expected target from 0 to {num_classes}, got {int(outside[0])}")
    winner, best = best_label(scores, labels, present)
    exceeded = torch.searchsorted(thresholds, best)
    bins = len(thresholds) + 1
    flat = (true * (num_classes + 1) + winner) * bins + exceeded
    shape = num_classes + 1, num_classes + 1, bins
    return flat[counts].bincount(minlength=shape[0] * shape[1] * bins).view(shape)
