"""Scores of label maps by one accumulated confusion matrix.

Rows are the true labels, columns the predicted ones: `confusion[t, p]` counts pixels. Counts are int64: one COCO split
has more background pixels than 32 bits can count.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torchmetrics import Metric

from fastcam.io import CamSet
from fastcam.ops.cam_sweep import cam_sweep

Absent = Literal["skip", "zero", "gt_only"]


class ConfusionMatrix(Metric):
    """Counts of (true label, predicted label) over all pixels seen, summed over processes.

    Args:
        num_labels: number K of labels, the background included.
        ignore_index: true label that never counts.
        predicted_ignore: what a *predicted* `ignore_index` means: `"refuse"` raises; `"background"` counts as label 0
            (IRN's way); `"skip"` leaves the pixel out (AFA's way, which flatters labels that ignore much).
        kwargs: passed on to `torchmetrics.Metric`.

    Example:
        >>> confusion = ConfusionMatrix(2)
        >>> confusion.update(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 255]))
        >>> confusion.compute()
        tensor([[1, 1],
                [0, 0]])
    """

    is_differentiable = False
    full_state_update = False
    confusion: Tensor

    def __init__(
        self,
        num_labels: int,
        ignore_index: int = 255,
        predicted_ignore: Literal["refuse", "background", "skip"] = "refuse",
        **kwargs: object,
    ) -> None:
        super().__init__(**kwargs)
        if predicted_ignore not in ("refuse", "background", "skip"):
            raise ValueError(
                f"ConfusionMatrix: expected predicted_ignore refuse, background or skip, got {predicted_ignore!r}"
            )
        self.num_labels = num_labels
        self.ignore_index = ignore_index
        self.predicted_ignore = predicted_ignore
        self.add_state("confusion", torch.zeros(num_labels, num_labels, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, pred: Tensor, target: Tensor) -> None:
        """Adds label maps.

        Args:
            pred: predicted labels, integers of any shape.
            target: true labels, integers of the same shape.

        Raises:
            ValueError: different shapes, float dtypes, or labels outside `[0, num_labels)`. Where the true label is
                ignored any prediction goes.
        """
        if pred.shape != target.shape or pred.is_floating_point() or target.is_floating_point():
            raise ValueError(
                "ConfusionMatrix: expected pred and target of one shape and integer dtypes, got "
                f"{pred.dtype} {tuple(pred.shape)}, {target.dtype} {tuple(target.shape)}"
            )
        counts = target != self.ignore_index
        pred, target = pred[counts].long(), target[counts].long()
        if self.predicted_ignore == "background":
            pred = pred.masked_fill(pred == self.ignore_index, 0)
        elif self.predicted_ignore == "skip":
            kept = pred != self.ignore_index
            pred, target = pred[kept], target[kept]
        self._check("target", target)
        self._check("pred", pred)
        self.confusion += (
            (target * self.num_labels + pred).bincount(minlength=self.num_labels**2).view_as(self.confusion)
        )

    def compute(self) -> Tensor:
        """Counts so far, int64 `(K, K)`."""
        return self.confusion

    def _check(self, name: str, labels: Tensor) -> None:
        outside = labels[(labels < 0) | (labels >= self.num_labels)]
        if len(outside):
            hint = "; choose predicted_ignore" if name == "pred" and int(outside[0]) == self.ignore_index else ""
            raise ValueError(
                f"ConfusionMatrix: expected {name} from 0 to {self.num_labels - 1}, got {int(outside[0])}{hint}"
            )


def iou(confusion: Tensor, absent: Absent = "skip") -> Tensor:
    """Intersection over union of every label: `TP / (T + P - TP)`.

    Published figures differ in what a label without pixels counts (only visible on subsets):

    Args:
        confusion: counts `(K, K)`, rows true.
        absent: `"skip"`: NaN where the union is empty (chainercv, IRN). `"gt_only"`: NaN where the label is never
            true, even if it was predicted (AFA, ToCo). `"zero"`: 0 where the union is empty (SEAM, MCTformer).

    Returns:
        float64 `(K,)`.
    """
    if absent not in ("skip", "zero", "gt_only"):
        raise ValueError(f"iou: expected absent skip, zero or gt_only, got {absent!r}")
    both, true, union = _counts(confusion)
    ratio = both / union  # 0 / 0 = NaN
    if absent == "zero":
        return ratio.nan_to_num(0)
    return ratio.masked_fill(true == 0, torch.nan) if absent == "gt_only" else ratio


def mean_iou(confusion: Tensor, absent: Absent = "skip") -> float:
    """Mean of `iou` over the labels that are not NaN; NaN if there is none."""
    return float(iou(confusion, absent).nanmean())


def fp_fn(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """False positives and false negatives of every label as fractions of the union, as IRN prints them: `fp + fn + IoU
    = 1`.

    Returns:
        Two float64 `(K,)`, NaN where the union is empty.
    """
    both, true, union = _counts(confusion)
    return (union - true) / union, (true - both) / union


def _counts(confusion: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    counts = confusion.double()
    both, true = counts.diagonal(), counts.sum(1)
    return both, true, true + counts.sum(0) - both


def cam_threshold_sweep(
    camset: CamSet, target: Tensor, thresholds: Sequence[float] | Tensor, num_classes: int, ignore_index: int = 255
) -> Tensor:
    """Confusion of `argmax([t; maps])` with the true labels for every constant background `t`: `fastcam.cam_sweep` of
    the stored maps at the size of the image.

    Args:
        camset: maps of one image; a stored background is not used.
        target: true labels `(H, W)`, integers.
        thresholds: T numbers in any order. They are compared in the dtype of the maps.
        num_classes: C.
        ignore_index: true label that does not count.

    Returns:
        int64 `(T, C + 1, C + 1)`, rows true, in the order of `thresholds`.

    Raises:
        ValueError: `target` has another size than the image or labels outside `[0, C]`, or a key lies outside `[0, C)`.
    """
    if tuple(target.shape) != tuple(camset.size) or target.is_floating_point():
        raise ValueError(
            f"cam_threshold_sweep: expected integer target {tuple(camset.size)}, "
            f"got {target.dtype} {tuple(target.shape)}"
        )
    scores = camset.scores(0.0)[None, 1:]
    return cam_sweep(
        scores, target[None], thresholds, num_classes=num_classes, keys=camset.keys, ignore_index=ignore_index
    )


def tag_average_precision(scores: Tensor, tags: Tensor) -> Tensor:
    """Average precision of every class at image level (its mean is the mAP).

    Args:
        scores: float `(N, C)`, larger is surer.
        tags: 0 or 1 `(N, C)`.

    Returns:
        float `(C,)`; NaN for classes without a positive image. Take `.nanmean()` for the mAP.
    """
    from torchmetrics.functional.classification import binary_average_precision

    columns = [
        binary_average_precision(score, tag) if tag.any() else score.new_tensor(torch.nan)
        for score, tag in zip(scores.T, tags.T.long(), strict=True)
    ]
    return torch.stack(columns)
