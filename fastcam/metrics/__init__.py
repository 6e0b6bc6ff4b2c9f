"""Scores of label maps, CAMs and tags."""

from fastcam.metrics.segmentation import (
    ConfusionMatrix,
    cam_threshold_sweep,
    fp_fn,
    iou,
    mean_iou,
    tag_average_precision,
)

__all__ = ["ConfusionMatrix", "cam_threshold_sweep", "fp_fn", "iou", "mean_iou", "tag_average_precision"]
