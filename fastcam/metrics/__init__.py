"""Scores of label maps, CAMs, objects and tags."""

from fastcam.metrics.instances import (
    InstanceScores,
    average_precision,
    mask_boxes,
    mask_iou,
    match_greedily,
    point_hits,
    response_correlation,
)
from fastcam.metrics.segmentation import (
    ConfusionMatrix,
    cam_threshold_sweep,
    fp_fn,
    iou,
    mean_iou,
    tag_average_precision,
)

__all__ = [
    "ConfusionMatrix",
    "InstanceScores",
    "average_precision",
    "cam_threshold_sweep",
    "fp_fn",
    "iou",
    "mask_boxes",
    "mask_iou",
    "match_greedily",
    "mean_iou",
    "point_hits",
    "response_correlation",
    "tag_average_precision",
]
