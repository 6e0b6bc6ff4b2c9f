"""Scores of volumes: Dice of every label, and how far its surfaces lie apart (HD95)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def dice(confusion: Tensor, empty: float = 1.0) -> Tensor:
    """Dice of every label, ``2 |P and G| / (|P| + |G|)``.

    Args:
        confusion: counts `(..., K, K)`, rows true.
        empty: value of a label that is neither predicted nor true.

    Returns:
        float64 `(..., K)`.
    """
    counts = confusion.double()
    both = counts.diagonal(dim1=-2, dim2=-1)
    total = counts.sum(-1) + counts.sum(-2)
    return torch.where(total > 0, 2 * both / total.clamp(min=1), empty)


def hausdorff_95(pred: Tensor | np.ndarray, target: Tensor | np.ndarray, spacing: Sequence[float] = ()) -> float:
    """The 95th percentile of the distances between two surfaces, both ways together, as MedPy measures it.

    The surface of a set is what an erosion by one pixel (neighbours share a side) takes away; beyond the border of the
    array nothing is set. Percentiles are interpolated linearly.

    Cost: two exact distance transforms (scipy) of the box around both sets.

    Args:
        pred: bool `(H, W)` or `(S, H, W)`, or any number of axes.
        target: likewise.
        spacing: distance of neighbours along each axis; empty for 1, which gives pixels.

    Returns:
        A distance in the unit of `spacing`; infinity if one set is empty, NaN if both are.

    Raises:
        ValueError: other shapes, dtypes or spacings.
    """
    a, b = (np.asarray(mask) for mask in (pred, target))
    steps = tuple(spacing) or (1.0,) * a.ndim
    if a.shape != b.shape or a.dtype != np.bool_ or b.dtype != np.bool_:
        raise ValueError(
            f"hausdorff_95: expected two bool arrays of one shape, got {a.dtype} {a.shape}, {b.dtype} {b.shape}"
        )
    if len(steps) != a.ndim or not all(math.isfinite(step) and step > 0 for step in steps):
        raise ValueError(f"hausdorff_95: expected {a.ndim} positive spacings, got {tuple(spacing)}")
    if not a.any() or not b.any():
        return math.inf if a.any() or b.any() else math.nan
    from scipy import ndimage

    where = np.nonzero(a | b)
    box = tuple(slice(axis.min(), axis.max() + 1) for axis in where)
    edges = [mask[box] & ~ndimage.binary_erosion(mask[box]) for mask in (a, b)]
    away = [ndimage.distance_transform_edt(~edge, sampling=steps) for edge in edges]
    return float(np.percentile(np.concatenate([away[1][edges[0]], away[0][edges[1]]]), 95))


class VolumeScores:
    """Dice and HD95 of volumes, one after the other.

    Args:
        num_labels: number K of labels, the background included.
        ignore_index: true label whose pixels count as background in truth and prediction.

    Attributes:
        names: of the volumes seen.
        dice: float64 `(K,)` of each, over all its slices; 1 for a label that is neither predicted nor true.
        slice_dice: the same, as the mean over its slices.
        hd95: float64 `(K,)` of each: as :func:`hausdorff_95`; NaN for the background.
    """

    def __init__(self, num_labels: int, ignore_index: int = 255) -> None:
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.names: list[str] = []
        self.dice: list[Tensor] = []
        self.slice_dice: list[Tensor] = []
        self.hd95: list[Tensor] = []

    def update(self, name: str, pred: Tensor, target: Tensor, spacing: Sequence[float] = (1.0, 1.0, 1.0)) -> None:
        """Adds a volume.

        Args:
            name: its name.
            pred: labels `(S, H, W)`, integers 0 to K - 1.
            target: likewise, or `ignore_index`.
            spacing: distance of slices, rows and columns.

        Raises:
            ValueError: other shapes, or labels out of range.
        """
        if pred.ndim != 3 or pred.shape != target.shape or pred.numel() == 0:
            raise ValueError(
                f"VolumeScores: expected pred and target (S, H, W), got {tuple(pred.shape)}, {tuple(target.shape)}"
            )
        unknown = target == self.ignore_index
        p, t = (labels.masked_fill(unknown, 0).long().flatten(1) for labels in (pred, target))
        for what, labels in (("pred", p), ("target", t)):
            if int(labels.min()) < 0 or int(labels.max()) >= self.num_labels:
                came = f"{int(labels.min())} to {int(labels.max())}"
                raise ValueError(f"VolumeScores: expected labels 0 to {self.num_labels - 1} in {what}, got {came}")
        cells = self.num_labels**2
        pairs = t * self.num_labels + p + cells * torch.arange(len(p), device=p.device)[:, None]
        counts = pairs.flatten().bincount(minlength=cells * len(p)).view(len(p), self.num_labels, self.num_labels).cpu()
        self.names.append(name)
        self.dice.append(dice(counts.sum(0)))
        self.slice_dice.append(dice(counts).mean(0))
        planes = [labels.view(pred.shape).cpu() for labels in (p, t)]
        distances = [hausdorff_95(planes[0] == k, planes[1] == k, spacing) for k in range(1, self.num_labels)]
        self.hd95.append(torch.tensor([math.nan, *distances], dtype=torch.float64))
