"""Scores of few-shot segmentation: mIoU over novel classes and FB-IoU, from counts added up over fixed episodes.

Intersections and unions are summed over episodes before they are divided; the mean of the episodes' own IoU is another
number. Intervals draw episodes again with replacement (bootstrap): they say what other episodes of the same images
would have given, not what another training would.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcam.metrics.intervals import quantile_interval

IGNORE_INDEX = 255


def episode_counts(pred: Tensor, target: Tensor) -> Tensor:
    """Pixels of one episode: intersection and union of the background and of the class.

    Args:
        pred: 0 or 1 (or bool), any shape.
        target: 0, 1, or 255 where a pixel does not count; the same shape.

    Returns:
        int64 ``(2, 2)``: rows background and class; columns intersection and union.

    Raises:
        ValueError: different shapes, float dtypes, or other values.

    Example:
        >>> episode_counts(torch.tensor([0, 1, 1, 0]), torch.tensor([0, 1, 0, 255]))
        tensor([[1, 2],
                [1, 2]])
    """
    if pred.shape != target.shape or pred.is_floating_point() or target.is_floating_point():
        raise ValueError(
            "episode_counts: expected pred and target of one shape and integer dtypes, got "
            f"{pred.dtype} {tuple(pred.shape)}, {target.dtype} {tuple(target.shape)}"
        )
    known = target != IGNORE_INDEX
    pred, target = pred[known].long(), target[known].long()
    for name, labels in (("pred", pred), ("target", target)):
        outside = labels[(labels < 0) | (labels > 1)]
        if len(outside):
            raise ValueError(f"episode_counts: expected {name} of 0 and 1, got {int(outside[0])}")
    rows = [((pred == k) & (target == k), (pred == k) | (target == k)) for k in (0, 1)]
    return torch.stack([torch.stack([both.sum(), either.sum()]) for both, either in rows])


class FewShotScores(NamedTuple):
    """Scores of a set of episodes; leading axes, if any, are those of the counts.

    Attributes:
        iou: float64 ``(..., C)``, of every class; NaN without a pixel in any of its episodes.
        mean_iou: float64 ``(...)``, mean over the classes that have one.
        fb_iou: float64 ``(...)``, mean of the IoU of background and class over all episodes, whatever their class.
    """

    iou: Tensor
    mean_iou: Tensor
    fb_iou: Tensor


def few_shot_scores(sums: Tensor) -> FewShotScores:
    """Scores of counts summed over the episodes of each class.

    Args:
        sums: ``(..., C, 2, 2)``, see :func:`episode_counts`.
    """
    sums = sums.double()
    iou = sums[..., 1, 0] / sums[..., 1, 1]  # 0 / 0 = NaN
    total = sums.sum(-3)
    return FewShotScores(iou, iou.nanmean(-1), (total[..., 0] / total[..., 1]).nanmean(-1))


def class_sums(counts: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts of episodes added up by class: ``(N, 2, 2)`` and int64 ``(N,)`` to ``(C, 2, 2)``."""
    return counts.new_zeros(num_classes, 2, 2).index_add_(0, labels, counts)


def bootstrap_sums(counts: Tensor, labels: Tensor, num_classes: int, draws: int = 2000, seed: int = 0) -> Tensor:
    """Counts of episodes drawn with replacement, as many of every class as there were, added up by class.

    Equal seeds draw equal episodes, so that two methods on the same episodes are compared pair by pair.

    Args:
        counts: ``(N, 2, 2)``, see :func:`episode_counts`.
        labels: class of every episode, int64 ``(N,)``, 0 to C - 1.
        num_classes: C.
        draws: number of sets of episodes.
        seed: of the draw.

    Returns:
        float64 ``(draws, C, 2, 2)``.
    """
    generator = torch.Generator().manual_seed(seed)
    sums = torch.zeros(draws, num_classes, 2, 2, dtype=torch.float64)
    for k in range(num_classes):
        own = counts[labels == k].double().flatten(1)
        n = len(own)
        if n:
            drawn = torch.randint(n, (draws, n), generator=generator)
            times = torch.zeros(draws, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(draws, n).double())
            sums[:, k] = (times @ own).unflatten(1, (2, 2))
    return sums


def paired_difference(
    counts: Tensor, others: Tensor, labels: Tensor, num_classes: int, draws: int = 2000, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """How much better one method is than another on the same episodes.

    Args:
        counts: of the method ``(N, 2, 2)``.
        others: of the other method on the same episodes in the same order.
        labels: class of every episode, int64 ``(N,)``.
        num_classes: C.
        draws: number of bootstrap sets.
        seed: of the draw.

    Returns:
        For ``"mean_iou"`` and ``"fb_iou"`` the difference and its 95 % interval.
    """
    result = {}
    plain = [few_shot_scores(class_sums(c, labels, num_classes)) for c in (counts, others)]
    drawn = [few_shot_scores(bootstrap_sums(c, labels, num_classes, draws, seed)) for c in (counts, others)]
    for name in ("mean_iou", "fb_iou"):
        difference = float(getattr(plain[0], name) - getattr(plain[1], name))
        result[name] = (difference, *quantile_interval(getattr(drawn[0], name) - getattr(drawn[1], name)))
    return result
