"""Scores of label maps, CAMs, objects, tags, volumes, rankings and few-shot episodes."""

from fastcam.metrics.few_shot import (
    FewShotScores,
    bootstrap_sums,
    class_sums,
    episode_counts,
    few_shot_scores,
    paired_difference,
)
from fastcam.metrics.instances import (
    InstanceScores,
    average_precision,
    mask_boxes,
    mask_iou,
    match_greedily,
    point_hits,
    response_correlation,
)
from fastcam.metrics.intervals import bootstrap_interval, mean_interval, quantile_interval
from fastcam.metrics.retrieval import ranking_average_precision, recall_at, ukbench_hits
from fastcam.metrics.segmentation import (
    ConfusionMatrix,
    cam_threshold_sweep,
    fp_fn,
    iou,
    mean_iou,
    tag_average_precision,
)
from fastcam.metrics.volumes import VolumeScores, dice, hausdorff_95

__all__ = [
    "ConfusionMatrix",
    "FewShotScores",
    "InstanceScores",
    "VolumeScores",
    "average_precision",
    "bootstrap_interval",
    "bootstrap_sums",
    "cam_threshold_sweep",
    "class_sums",
    "dice",
    "episode_counts",
    "few_shot_scores",
    "fp_fn",
    "hausdorff_95",
    "iou",
    "mask_boxes",
    "mask_iou",
    "match_greedily",
    "mean_interval",
    "mean_iou",
    "paired_difference",
    "point_hits",
    "quantile_interval",
    "ranking_average_precision",
    "recall_at",
    "response_correlation",
    "tag_average_precision",
    "ukbench_hits",
]
