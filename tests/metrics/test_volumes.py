"""Dice and HD95 by hand, and against every pair of surface points."""

import math

import numpy as np
import pytest
import torch

from fastcam.metrics import VolumeScores, dice, hausdorff_95


def brute_force(a, b, spacing):
    """All distances between both surfaces, without distance transforms."""

    def surface(mask):
        padded = np.pad(mask, 1)
        inside = padded.copy()
        for axis in range(mask.ndim):
            inside &= np.roll(padded, 1, axis) & np.roll(padded, -1, axis)
        return np.argwhere(padded & ~inside) * np.array(spacing)

    first, second = surface(a), surface(b)
    pairs = np.sqrt(((first[:, None] - second[None]) ** 2).sum(-1))
    return np.percentile(np.concatenate([pairs.min(1), pairs.min(0)]), 95)


def test_dice_by_hand():
    confusion = torch.tensor([[5, 1, 0], [2, 2, 0], [0, 0, 0]])  # label 1: 3 predicted, 4 true, 2 of them common
    assert dice(confusion).tolist() == pytest.approx([10 / 13, 4 / 7, 1.0])
    assert dice(confusion, empty=0.5)[2] == 0.5
    assert dice(torch.tensor([[[0, 3], [0, 0]], [[0, 0], [3, 0]], [[1, 0], [0, 3]]]))[:, 1].tolist() == [0, 0, 1]


def test_two_points_are_their_distance_apart():
    a, b = np.zeros((9, 9), bool), np.zeros((9, 9), bool)
    a[1, 2], b[4, 6] = True, True
    assert hausdorff_95(a, b) == 5.0
    assert hausdorff_95(a, b, (2.0, 1.0)) == math.hypot(6, 4)


def test_percentile_of_a_square_and_one_with_a_far_point():
    """8 surface points of a 3 x 3 square and the same square with one point 10 columns to the right of its middle."""
    a = np.zeros((5, 20), bool)
    a[1:4, 1:4] = True
    b = a.copy()
    b[2, 13] = True
    distances = [0.0] * 8 + [0.0] * 8 + [10.0]  # 17 of them: the 95th percentile lies at rank 15.2 of 0 .. 16
    assert hausdorff_95(a, b) == pytest.approx(np.percentile(distances, 95))
    assert hausdorff_95(a, b) == pytest.approx(2.0)
    assert hausdorff_95(a, a) == 0


@pytest.mark.parametrize("shape", [(17, 23), (5, 12, 11), (1, 8, 9), (1, 1)])
def test_equals_all_pairs_of_surface_points(shape):
    rng = np.random.default_rng(0)
    for _ in range(6):
        a, b = (rng.random(shape) < rng.uniform(0.05, 0.95) for _ in range(2))
        a.flat[0] = b.flat[-1] = True
        spacing = rng.uniform(0.5, 5, len(shape))
        expected = brute_force(a, b, spacing)
        assert hausdorff_95(torch.from_numpy(a), torch.from_numpy(b), tuple(spacing)) == pytest.approx(expected)
        assert hausdorff_95(b, a, spacing.tolist()) == pytest.approx(expected)


def test_empty_sets():
    full, empty = np.ones((2, 3), bool), np.zeros((2, 3), bool)
    assert hausdorff_95(full, empty) == hausdorff_95(empty, full) == math.inf
    assert math.isnan(hausdorff_95(empty, empty))


@pytest.mark.parametrize(
    ("a", "b", "spacing", "message"),
    [
        (np.ones((2, 3), bool), np.ones((3, 2), bool), (), "expected two bool arrays of one shape"),
        (np.ones((2, 3)), np.ones((2, 3), bool), (), "got float64"),
        (np.ones((2, 3), bool), np.ones((2, 3), bool), (1.0,), "expected 2 positive spacings"),
        (np.ones((2, 3), bool), np.ones((2, 3), bool), (1.0, math.nan), "expected 2 positive spacings"),
    ],
)
def test_what_is_no_pair_of_sets_is_refused(a, b, spacing, message):
    with pytest.raises(ValueError, match=f"^hausdorff_95: .*{message}"):
        hausdorff_95(a, b, spacing)


def test_volume_by_hand():
    """Two slices of 2 x 3: label 1 overlaps in one of two pixels of the first slice and is missed in the second."""
    target = torch.tensor([[[1, 1, 0], [0, 0, 0]], [[1, 0, 0], [0, 0, 255]]])
    pred = torch.tensor([[[0, 1, 1], [0, 0, 0]], [[0, 0, 0], [0, 0, 2]]])
    scores = VolumeScores(3)
    scores.update("a", pred, target, (7.0, 1.0, 2.0))
    assert scores.names == ["a"]
    assert scores.dice[0].tolist() == [16 / 19, 2 / 5, 1.0]
    assert scores.slice_dice[0][1:].tolist() == [(2 / 4 + 0) / 2, 1.0]
    # from predicted columns 1, 2 to true 0, 1 of that slice: 0 and 2; back: 2 and 0; the true pixel of slice 2: 7 + 1
    distances = [0, 2, 2, 0, math.hypot(7, 2)]
    assert scores.hd95[0][1] == pytest.approx(np.percentile(distances, 95))
    assert scores.hd95[0][[0, 2]].isnan().all()


def test_labels_out_of_range_and_other_shapes_are_refused():
    scores = VolumeScores(2)
    with pytest.raises(ValueError, match=r"^VolumeScores: expected labels 0 to 1 in pred, got 0 to 2"):
        scores.update("a", torch.tensor([[[0, 2]]]), torch.tensor([[[0, 1]]]))
    with pytest.raises(ValueError, match=r"^VolumeScores: expected pred and target \(S, H, W\)"):
        scores.update("a", torch.zeros(2, 2, dtype=torch.int64), torch.zeros(2, 2, dtype=torch.int64))
