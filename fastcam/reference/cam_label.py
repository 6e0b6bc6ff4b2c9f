"""Labels from class activation maps of several views, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcam.reference.cam_fuse import cam_fuse_fwd


def cam_label_fwd(
    cams: Sequence[Tensor], labels: Tensor, background: float, present: Tensor | None, *policy: Any
) -> Tensor:
    """Views ``(B, C, h_s, w_s)``, labels of channels ``(C,)`` -> labels ``(B, H, W)``, both uint8."""
    work = torch.promote_types(cams[0].dtype, torch.float32)
    scores, _ = cam_fuse_fwd([cam.to(work) for cam in cams], present, *policy)
    winner, best = best_label(scores, labels, present)
    return torch.where(best > background, winner, 0)


def best_label(scores: Tensor, labels: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Label of the best present channel of ``(B, C, H, W)``, the first among equals, and its score, or -inf."""
    scores = scores.nan_to_num(torch.inf, torch.inf, -torch.inf)
    if present is not None:
        scores = torch.where(present[:, :, None, None], scores, -torch.inf)
    if scores.shape[1] == 0:
        shape = scores.shape[0], *scores.shape[2:]
        return labels.new_zeros(shape), scores.new_full(shape, -torch.inf)
    best, channel = scores.max(1)
    return labels[channel], best
