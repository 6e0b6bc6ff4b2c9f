"""Scores of label maps, CAMs, objects, tags and rankings."""

from fastcam.metrics.instances import (
    InstanceScores,
    average_precision,
    mask_boxes,
    mask_iou,
    match_greedily,
    point_hits,
    response_correlation,
)
from fastcam.metrics.retrieval import bootstrap_interval, ranking_average_precision, recall_at, ukbench_hits
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
    "bootstrap_interval",
    "cam_threshold_sweep",
    "fp_fn",
    "iou",
    "mask_boxes",
    "mask_iou",
    "match_greedily",
    "mean_iou",
    "point_hits",
    "ranking_average_precision",
    "recall_at",
    "response_correlation",
    "tag_average_precision",
    "ukbench_hits",
]
