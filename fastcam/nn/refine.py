"""Pixel-adaptive refinement inside single-stage training: the module, and the rules that make labels of its masks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.ops.pixel_refine import pixel_refine

DILATIONS = (1, 2, 4, 8, 12, 24)


class Refine(nn.Module):
    """PAR (AFA, ToCo) or PAMR (1-stage-wseg) as a module without parameters.

    Args:
        mode: ``"par"`` or ``"pamr"``, see :func:`fastcam.pixel_refine`.
        dilations: of the neighbourhoods.
        iterations: number of averages.
    """

    def __init__(
        self, mode: Literal["par", "pamr"] = "par", *, dilations: Sequence[int] = DILATIONS, iterations: int = 10
    ) -> None:
        super().__init__()
        self.mode, self.dilations, self.iterations = mode, tuple(dilations), iterations

    def forward(self, masks: Tensor, image: Tensor) -> Tensor:
        """Masks ``(B, C, h, w)``, resized to the image ``(B, K, H, W)`` (bilinear, corners aligned), then refined.

        Gradients flow to the masks only; detach them where they serve as labels. PAMR's authors resize the image to the
        masks instead: do that before the call.
        """
        if masks.shape[2:] != image.shape[2:]:
            masks = F.interpolate(masks, image.shape[2:], mode="bilinear", align_corners=True)
        return pixel_refine(
            masks, image.to(masks.dtype), mode=self.mode, dilations=self.dilations, iterations=self.iterations
        )

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return f"{self.mode!r}, dilations={self.dilations}, iterations={self.iterations}"


def confident_labels(
    masks: Tensor,
    present: Tensor | None = None,
    *,
    background: float = 0.7,
    foreground: float = 0.6,
    least: float = 0.2,
    ignore_index: int = 255,
) -> Tensor:
    """Labels from refined masks where exactly one class is confident (Araslanov and Roth, CVPR 2020).

    A class claims the pixels strictly above max(``least``, share of its own maximum); pixels that no class or several
    claim are ignored.

    Args:
        masks: ``(B, C + 1, H, W)``, background first.
        present: bool or float ``(B, C)``; absent classes claim nothing. ``None``: all are present.
        background: share of the maximum for the background.
        foreground: share of the maximum for the other classes.
        least: lower bound of all thresholds.
        ignore_index: label of ignored pixels.

    Returns:
        int64 ``(B, H, W)``.
    """
    if masks.ndim != 4 or (present is not None and present.shape != (masks.shape[0], masks.shape[1] - 1)):
        raise ValueError(
            "confident_labels: expected masks (B, C + 1, H, W) and present (B, C), "
            f"got {tuple(masks.shape)} and {None if present is None else tuple(present.shape)}"
        )
    share = masks.new_full((masks.shape[1], 1, 1), foreground)
    share[0] = background
    claimed = masks > (masks.amax((2, 3), keepdim=True) * share).clamp_min(least)
    if present is not None:
        claimed[:, 1:] &= (present > 0)[:, :, None, None]
    return torch.where(claimed.sum(1) == 1, claimed.int().argmax(1), ignore_index)


def two_threshold_labels(
    refine: Refine,
    cams: Tensor,
    image: Tensor,
    present: Tensor,
    *,
    high: float = 0.7,
    low: float = 0.25,
    boxes: Tensor | None = None,
    ignore_index: int = 255,
) -> Tensor:
    """Labels from CAMs refined against a high and a low background score (AFA, Ru et al., CVPR 2022; ToCo, CVPR 2023).

    For each background score: at half the size, the softmax over background and present classes is refined and resized
    back, and the largest wins. A pixel gets its class where that beats the high background, 0 where not even the low
    one is beaten, and is ignored in between. The defaults are ToCo's; AFA's are 0.55 and 0.35.

    Args:
        refine: the refinement, PAR in the papers.
        cams: ``(B, C, H, W)`` in [0, 1].
        image: ``(B, 3, H, W)``, not normalised (any scale).
        present: bool or float ``(B, C)``.
        high: background score that a class must beat.
        low: background score below which a pixel is background.
        boxes: int ``(B, 4)``, top, bottom, left, right of the part that is not padding; the rest is ignored.
        ignore_index: label of ignored pixels.

    Returns:
        int64 ``(B, H, W)``: 0, class + 1, or ``ignore_index``.
    """
    if cams.ndim != 4 or image.shape[2:] != cams.shape[2:] or present.shape != cams.shape[:2]:
        raise ValueError(
            "two_threshold_labels: expected cams (B, C, H, W), image (B, 3, H, W) and present (B, C), "
            f"got {tuple(cams.shape)}, {tuple(image.shape)} and {tuple(present.shape)}"
        )
    C, H, W = cams.shape[1:]
    half = max(1, H // 2), max(1, W // 2)
    small = F.interpolate(cams, half, mode="bilinear", align_corners=False)
    absent = (present <= 0)[:, :, None, None]
    planes = []
    for score in (high, low):
        scores = torch.cat([torch.full_like(small[:, :1], score), small.masked_fill(absent, -torch.inf)], 1)
        planes.append(scores.softmax(1))
    refined = refine(torch.cat(planes, 1), F.interpolate(image, half, mode="bilinear", align_corners=False))
    full = F.interpolate(refined, (H, W), mode="bilinear", align_corners=False)
    strict, loose = (x.max(1).indices for x in (full[:, : C + 1], full[:, C + 1 :]))
    label = torch.where(strict > 0, strict, torch.where(loose > 0, ignore_index, 0))
    if boxes is None:
        return label
    y, x = torch.arange(H, device=cams.device)[:, None], torch.arange(W, device=cams.device)
    top, bottom, left, right = boxes[:, :, None, None].unbind(1)
    return torch.where((y >= top) & (y < bottom) & (x >= left) & (x < right), label, ignore_index)


def affinity_labels(label: Tensor, *, stride: int = 16, ignore_index: int = 255, ignore_self: bool = True) -> Tensor:
    """Whether each pair of pixels has one label, on a coarse grid: what AFA and ToCo train affinities on.

    Args:
        label: integers ``(B, H, W)``.
        stride: of the grid.
        ignore_index: label that is ignored; pairs with one such pixel get it too.
        ignore_self: whether a pixel and itself are ignored (ToCo) or alike (AFA).

    Returns:
        int64 ``(B, N, N)`` with ``N = (H // stride) (W // stride)``: 1 where labels are equal, 0 where they differ, or
        ``ignore_index``.
    """
    if label.ndim != 3 or stride < 1:
        raise ValueError(
            f"affinity_labels: expected label (B, H, W) and stride >= 1, got {tuple(label.shape)} and {stride}"
        )
    H, W = label.shape[1:]
    coarse = label[:, : H // stride * stride : stride, : W // stride * stride : stride].flatten(1)
    ignored = coarse == ignore_index
    pairs = (coarse[:, :, None] == coarse[:, None]).long()
    pairs = pairs.masked_fill(ignored[:, :, None] | ignored[:, None], ignore_index)
    if ignore_self:
        pairs.diagonal(dim1=1, dim2=2).fill_(ignore_index)
    return pairs
