"""Scores of objects: average precision over regions (mAP^r), best overlap, points, and responses.

B. Hariharan, P. Arbelaez, R. Girshick, J. Malik, "Simultaneous Detection and Segmentation", ECCV 2014.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcam.io import Instances

THRESHOLDS = (0.25, 0.5, 0.75)


def mask_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union ``(N, M)`` of bool masks ``(N, H, W)`` and ``(M, H, W)``; of two empty ones 0.

    Cost: one product of 0/1 matrices, 2 N M H W operations. Counts are exact up to 2^24 pixels.
    """
    x, y = a.flatten(1).float(), b.flatten(1).float()
    both = x @ y.T
    return both / (x.sum(1)[:, None] + y.sum(1)[None] - both).clamp(min=1e-10)


def match_greedily(overlap: Tensor, threshold: float) -> Tensor:
    """Which detections hit: each in turn takes the object that it overlaps most of those that are left.

    Args:
        overlap: ``(N, M)``, the best detection first.
        threshold: a hit overlaps by at least this.

    Returns:
        bool ``(N,)``.
    """
    left = overlap.clone()
    hits = torch.zeros(len(overlap), dtype=torch.bool)
    for i in range(len(overlap)):
        if left.shape[1] and (best := int(left[i].argmax())) >= 0 and left[i, best] >= threshold:
            hits[i] = True
            left[:, best] = -1
    return hits


def average_precision(scores: Tensor, hits: Tensor, positives: int) -> float:
    """Area under the precision-recall curve, where precision at a recall is the best at this or a larger one.

    Args:
        scores: of the detections, ``(N,)``, in any order; of equal ones the first counts as the better.
        hits: bool ``(N,)``.
        positives: what there was to find.

    Returns:
        From 0 to 1; NaN where there was nothing to find.
    """
    if positives == 0:
        return float("nan")
    found = hits[scores.argsort(descending=True, stable=True)].double().cumsum(0)
    precision = found / torch.arange(1, len(found) + 1)
    best = precision.flip(0).cummax(0)[0].flip(0) if len(found) else precision
    gained = found.diff(prepend=found.new_zeros(1))
    return float((best * gained).sum() / positives)


class InstanceScores:
    """Average precision and best overlap of objects, gathered image by image.

    Args:
        num_classes: C.
        thresholds: overlaps from which on a detection hits.

    Example:
        >>> scores = InstanceScores(1)
        >>> mask = torch.ones(1, 2, 2, dtype=torch.bool)
        >>> scores.update(Instances(mask, torch.tensor([0]), torch.tensor([0.5])), mask, torch.tensor([0]))
        >>> scores.average_precision().tolist()
        [[1.0, 1.0, 1.0]]
    """

    def __init__(self, num_classes: int, thresholds: Sequence[float] = THRESHOLDS) -> None:
        self.thresholds = tuple(thresholds)
        self.objects = [0] * num_classes
        self._best: list[list[Tensor]] = [[] for _ in range(num_classes)]
        self._scores: list[list[Tensor]] = [[] for _ in range(num_classes)]
        self._hits: list[list[Tensor]] = [[] for _ in range(num_classes)]  # (n, T) each

    def update(self, found: Instances, masks: Tensor, classes: Tensor, ignored: Tensor | None = None) -> None:
        """Adds an image.

        Args:
            found: the detections.
            masks: of the true objects, bool ``(M, H, W)``.
            classes: theirs, int64 ``(M,)``, from 0 to C - 1.
            ignored: bool ``(H, W)``: pixels that count neither for an object nor for a detection; a detection with more
                than half of its pixels there does not count at all.

        Raises:
            ValueError: masks of two sizes.
        """
        if found.masks.shape[1:] != masks.shape[1:]:
            raise ValueError(
                f"InstanceScores: expected masks of one size, got {tuple(found.masks.shape[1:])} and "
                f"{tuple(masks.shape[1:])}"
            )
        detected, scores, labels = found.masks, found.scores, found.classes
        if ignored is not None:
            area = detected.flatten(1).sum(1)
            detected, masks = detected & ~ignored, masks & ~ignored
            counts = 2 * detected.flatten(1).sum(1) >= area
            detected, scores, labels = detected[counts], scores[counts], labels[counts]
        order = scores.argsort(descending=True, stable=True)
        detected, scores, labels = detected[order], scores[order], labels[order]
        for k in {*labels.tolist(), *classes.tolist()}:
            overlap = mask_iou(detected[labels == k], masks[classes == k])
            self.objects[k] += overlap.shape[1]
            best = overlap.amax(0) if len(overlap) else overlap.new_zeros(overlap.shape[1])
            self._best[k].append(best)
            self._scores[k].append(scores[labels == k])
            hits = [match_greedily(overlap, threshold) for threshold in self.thresholds]
            self._hits[k].append(torch.stack(hits, dim=1))

    def average_precision(self) -> Tensor:
        """AP^r ``(C, T)`` of every class at every threshold; NaN for a class without objects."""
        rows = []
        for scores, hits, count in zip(self._scores, self._hits, self.objects, strict=True):
            score = torch.cat(scores) if scores else torch.zeros(0)
            hit = torch.cat(hits) if hits else torch.zeros(0, len(self.thresholds), dtype=torch.bool)
            rows.append([average_precision(score, column, count) for column in hit.T])
        return torch.tensor(rows, dtype=torch.float64)

    def best_overlap(self) -> Tensor:
        """Mean over a class's objects of the largest IoU with a detection of it ``(C,)``; NaN without objects."""
        return torch.stack(
            [torch.cat(b).double().mean() if b else torch.tensor(torch.nan).double() for b in self._best]
        )


def mask_boxes(masks: Tensor) -> Tensor:
    """Boxes int64 ``(M, 4)`` of bool masks ``(M, H, W)``: first row, first column, last row, last column.

    Raises:
        ValueError: a mask without pixels.
    """
    if not masks.flatten(1).any(dim=1).all():
        raise ValueError("mask_boxes: expected masks with at least one pixel each, got an empty one")
    sides = []
    for axis in (2, 1):
        line = masks.any(dim=axis).int()
        sides.append((line.argmax(dim=1), line.shape[1] - 1 - line.flip(1).argmax(dim=1)))
    (top, bottom), (left, right) = sides
    return torch.stack([top, left, bottom, right], dim=1)


def point_hits(points: Tensor, classes: Tensor, boxes: Tensor, box_classes: Tensor) -> Tensor:
    """Which points lie in a box of their class: the hits of pointwise localisation, for :func:`average_precision`.

    Args:
        points: ``(n, 2)``: row, column.
        classes: ``(n,)``.
        boxes: ``(M, 4)`` as :func:`mask_boxes` gives them.
        box_classes: ``(M,)``.

    Returns:
        bool ``(n,)``.
    """
    inside = (points[:, None] >= boxes[None, :, :2]) & (points[:, None] <= boxes[None, :, 2:])
    return (inside.all(dim=2) & (classes[:, None] == box_classes)).any(dim=1)


def response_correlation(prm: Tensor, classes: Tensor, masks: Tensor, mask_classes: Tensor) -> Tensor:
    """Largest share of each response map that lies in one object of its class; PRM counts a hit above one half.

    Args:
        prm: non-negative ``(n, H, W)``.
        classes: ``(n,)``.
        masks: bool ``(M, H, W)``.
        mask_classes: ``(M,)``.

    Returns:
        ``(n,)``; 0 where there is no response or no object of the class.
    """
    response = prm.flatten(1)
    total = response.sum(dim=1, keepdim=True)
    share = response @ masks.flatten(1).to(prm.dtype).T / torch.where(total > 0, total, 1)
    share = share * (classes[:, None] == mask_classes)
    return share.amax(dim=1) if len(masks) else prm.new_zeros(len(prm))
