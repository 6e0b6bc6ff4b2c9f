"""Scores of few-shot episodes, worked by hand."""

import math

import pytest
import torch

from fastcam.metrics import (
    bootstrap_sums,
    class_sums,
    episode_counts,
    few_shot_scores,
    paired_difference,
    quantile_interval,
)


def test_counts_of_one_episode_by_hand():
    pred = torch.tensor([[1, 1, 0], [0, 1, 0]])
    true = torch.tensor([[1, 0, 1], [0, 255, 0]])
    # Without the unknown pixel: the class in both once, in either three times; the background twice and four times.
    assert episode_counts(pred, true).tolist() == [[2, 4], [1, 3]]
    assert episode_counts(pred.bool(), true).tolist() == [[2, 4], [1, 3]]


def test_scores_by_hand():
    counts = torch.tensor([[[8, 10], [0, 2]], [[6, 8], [2, 4]], [[0, 5], [5, 10]]])
    labels = torch.tensor([0, 0, 1])
    scores = few_shot_scores(class_sums(counts, labels, 2))
    assert scores.iou.tolist() == pytest.approx([2 / 6, 5 / 10])  # sums first: not the mean of 0 and 1/2
    assert float(scores.mean_iou) == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert float(scores.fb_iou) == pytest.approx((14 / 23 + 7 / 16) / 2)


def test_perfect_prediction_scores_1_and_all_background_0_of_the_class():
    true = torch.tensor([0, 1, 1, 255, 0, 0])
    one = torch.zeros(1, dtype=torch.int64)
    perfect = few_shot_scores(class_sums(episode_counts(true.clamp(max=1), true)[None], one, 1))
    assert (float(perfect.mean_iou), float(perfect.fb_iou)) == (1.0, 1.0)
    nothing = few_shot_scores(class_sums(episode_counts(torch.zeros_like(true), true)[None], one, 1))
    assert (float(nothing.mean_iou), float(nothing.fb_iou)) == (0.0, pytest.approx(0.5 * 3 / 5))


def test_a_class_without_episodes_is_left_out_of_the_mean():
    counts = torch.tensor([[[1, 2], [1, 4]]])
    scores = few_shot_scores(class_sums(counts, torch.tensor([1]), 2))
    assert math.isnan(scores.iou[0])
    assert float(scores.mean_iou) == 0.25


def test_wrong_labels_and_shapes_are_refused():
    with pytest.raises(ValueError, match=r"episode_counts: expected pred and target of one shape"):
        episode_counts(torch.zeros(2, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="expected target of 0 and 1, got 2"):
        episode_counts(torch.tensor([0, 1]), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="expected pred of 0 and 1, got 7"):
        episode_counts(torch.tensor([0, 7]), torch.tensor([0, 1]))


def test_bootstrap_keeps_the_number_of_episodes_of_a_class_and_its_mean():
    counts = torch.tensor([[[1, 1], [0, 10]], [[1, 1], [10, 10]], [[3, 3], [3, 3]]])
    labels = torch.tensor([0, 0, 1])
    sums = bootstrap_sums(counts, labels, 2, draws=4000, seed=1)
    assert torch.equal(sums[:, 0, 1, 1], torch.full((4000,), 20.0).double())
    assert torch.equal(sums[:, 1], torch.full((4000, 2, 2), 3.0).double())
    # Two draws of 0 or 10 out of 20: 0, 1/2, 1 with chances 1/4, 1/2, 1/4.
    iou = few_shot_scores(sums).iou[:, 0]
    shares = [float((iou == value).double().mean()) for value in (0.0, 0.5, 1.0)]
    assert shares == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert torch.equal(sums, bootstrap_sums(counts, labels, 2, draws=4000, seed=1))


def test_interval_holds_the_middle_and_leaves_nan_out():
    values = torch.cat([torch.arange(1001.0), torch.tensor([torch.nan])])
    assert quantile_interval(values) == pytest.approx((25.0, 975.0))
    assert all(math.isnan(value) for value in quantile_interval(torch.full((3,), torch.nan)))


def test_difference_of_a_method_that_is_always_better_by_as_much_has_no_width():
    generator = torch.Generator().manual_seed(0)
    inter = torch.randint(10, 50, (20,), generator=generator)
    counts = torch.stack([torch.tensor([[50, 100], [int(i), 100]]) for i in inter])
    better = counts.clone()
    better[:, 1, 0] += 20
    labels = torch.arange(20) % 2
    result = paired_difference(better, counts, labels, 2)
    assert result["mean_iou"] == pytest.approx((0.2, 0.2, 0.2))
    assert result["fb_iou"] == pytest.approx((0.1, 0.1, 0.1))
    assert paired_difference(counts, counts, labels, 2)["mean_iou"] == (0.0, 0.0, 0.0)
