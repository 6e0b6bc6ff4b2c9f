"""Average precision over regions, best overlap, points and responses."""

import math

import pytest
import torch

from fastcam.io import Instances
from fastcam.metrics import (
    InstanceScores,
    average_precision,
    mask_boxes,
    mask_iou,
    match_greedily,
    point_hits,
    response_correlation,
)


def boxes(*corners, size=(10, 10)):
    masks = torch.zeros(len(corners), *size, dtype=torch.bool)
    for mask, (top, left, bottom, right) in zip(masks, corners, strict=True):
        mask[top:bottom, left:right] = True
    return masks


def found(masks, classes, scores):
    return Instances(masks, torch.tensor(classes, dtype=torch.int64), torch.tensor(scores))


def test_iou_of_boxes_by_hand():
    a, b = boxes((0, 0, 4, 4), (0, 0, 0, 0)), boxes((2, 2, 6, 6), (0, 0, 4, 4), (0, 0, 0, 0))
    torch.testing.assert_close(mask_iou(a, b), torch.tensor([[4 / 28, 1, 0], [0, 0, 0]]))


def test_each_object_is_hit_once_by_the_best_detection():
    overlap = torch.tensor([[0.6, 0.7], [0.2, 0.9], [0.55, 0.5]])
    assert match_greedily(overlap, 0.5).tolist() == [True, False, True]
    assert match_greedily(overlap, 0.6).tolist() == [True, False, False]
    assert match_greedily(overlap[:, :0], 0.5).tolist() == [False] * 3


def test_average_precision_by_hand():
    # Ranked: hit, miss, hit; 4 to find. Precision 1, 1/2, 2/3; the best at recall 1/2 or more is 2/3.
    value = average_precision(torch.tensor([0.9, 0.1, 0.5]), torch.tensor([True, True, False]), 4)
    assert value == pytest.approx((1 + 2 / 3) / 4)
    assert average_precision(torch.zeros(0), torch.zeros(0, dtype=torch.bool), 3) == 0
    assert math.isnan(average_precision(torch.ones(2), torch.zeros(2, dtype=torch.bool), 0))


def test_perfect_detections_score_100():
    scores = InstanceScores(3)
    masks = boxes((0, 0, 5, 5), (5, 5, 10, 10))
    scores.update(found(masks, [0, 2], [0.3, 0.9]), masks, torch.tensor([0, 2]))
    scores.update(found(masks[:1], [2], [0.1]), masks[:1], torch.tensor([2]))
    ap, best = scores.average_precision(), scores.best_overlap()
    assert ap[[0, 2]].tolist() == [[1.0] * 3] * 2
    assert ap[1].isnan().all()
    assert best[[0, 2]].tolist() == [1.0, 1.0]
    assert scores.objects == [1, 0, 2]


def test_duplicates_lower_precision_and_not_the_best_overlap():
    truth = boxes((0, 0, 5, 5), (5, 5, 10, 10))
    masks = torch.cat([truth[:1], truth[:1], truth[1:]])
    scores = InstanceScores(1, thresholds=(0.5,))
    scores.update(found(masks, [0, 0, 0], [0.9, 0.8, 0.7]), truth, torch.tensor([0, 0]))
    assert scores.average_precision().item() == pytest.approx((1 + 2 / 3) / 2)
    assert scores.best_overlap().item() == 1


def test_overlap_decides_at_which_threshold_a_detection_hits():
    truth, masks = boxes((0, 0, 10, 10)), boxes((0, 0, 10, 6))
    scores = InstanceScores(1)
    scores.update(found(masks, [0], [1.0]), truth, torch.tensor([0]))
    assert scores.average_precision().tolist() == [[1.0, 1.0, 0.0]]
    assert scores.best_overlap().item() == pytest.approx(0.6)


def test_ignored_pixels_count_for_nobody():
    truth, ignored = boxes((0, 0, 5, 10)), torch.zeros(10, 10, dtype=torch.bool)
    ignored[5:] = True
    masks = boxes((0, 0, 10, 10), (6, 0, 9, 9))  # half in it; all in it
    scores = InstanceScores(1)
    scores.update(found(masks, [0, 0], [0.5, 0.9]), truth, torch.tensor([0]), ignored)
    assert scores.average_precision().tolist() == [[1.0] * 3]


def test_image_without_objects_or_detections():
    scores = InstanceScores(1, thresholds=(0.5,))
    nothing = torch.zeros(0, 10, 10, dtype=torch.bool)
    scores.update(found(boxes((0, 0, 5, 5)), [0], [0.9]), nothing, torch.zeros(0, dtype=torch.int64))
    scores.update(found(nothing, [], []), boxes((0, 0, 5, 5)), torch.tensor([0]))
    assert scores.average_precision().item() == 0
    assert scores.best_overlap().item() == 0
    with pytest.raises(ValueError, match="expected masks of one size"):
        scores.update(found(nothing, [], []), boxes((0, 0, 1, 1), size=(3, 3)), torch.tensor([0]))


def test_point_outside_every_box_of_its_class_is_a_miss():
    rows = mask_boxes(boxes((2, 3, 5, 8), (0, 0, 1, 1)))
    assert rows.tolist() == [[2, 3, 4, 7], [0, 0, 0, 0]]
    points = torch.tensor([[4, 7], [5, 7], [0, 0], [0, 0]])
    hits = point_hits(points, torch.tensor([0, 0, 0, 1]), rows, torch.tensor([0, 1]))
    assert hits.tolist() == [True, False, False, True]
    with pytest.raises(ValueError, match=r"^mask_boxes: expected masks with at least one pixel each"):
        mask_boxes(boxes((0, 0, 0, 0)))


def test_response_correlation_is_the_best_share_in_an_object_of_the_class():
    prm = torch.zeros(2, 10, 10)
    prm[0, :4, 0] = torch.tensor([1.0, 1.0, 1.0, 5.0])
    masks = boxes((0, 0, 3, 3), (3, 0, 5, 5), (0, 0, 10, 10))
    share = response_correlation(prm, torch.tensor([0, 1]), masks, torch.tensor([0, 0, 1]))
    assert share.tolist() == [pytest.approx(5 / 8), 0]
    assert response_correlation(prm, torch.tensor([0, 0]), masks[:0], torch.zeros(0)).tolist() == [0, 0]
