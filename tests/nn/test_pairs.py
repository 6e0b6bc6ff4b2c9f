"""Pairs and their losses against the authors' index arrays, Pillow, and numbers worked by hand."""

import math

import numpy as np
import pytest
import torch
from PIL import Image

from fastcam.nn.pairs import Pairs, affinity_loss, displacement_loss, label_pairs, labels_at, masked_mean, neighbours


@pytest.mark.parametrize("radius", [3, 5])
def test_other_ends_are_the_authors_destinations(golden, radius):
    arrays = golden("irn_path_index")
    height, width = arrays[f"r{radius}_size"]
    sources, expected = arrays[f"r{radius}_src_indices"], arrays[f"r{radius}_dst_indices"]
    index = torch.arange(int(height * width)).view(1, int(height), int(width))
    ours = neighbours(index, radius, -1)[0].flatten(1)
    np.testing.assert_array_equal(ours[:, sources].numpy(), expected)


def test_pairs_by_hand():
    labels = torch.tensor([[[0, 0, 3], [3, 255, 3]]])  # radius 2: (0, 1), then (1, 0)
    pairs = label_pairs(labels, 2)
    right, below = (torch.stack([kind[0, p] for kind in pairs]).int().tolist() for p in range(2))
    assert right == [[[1, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]], [[0, 1, 0], [0, 0, 0]]]
    assert below == [[[0, 0, 0], [0, 0, 0]], [[0, 0, 1], [0, 0, 0]], [[1, 0, 0], [0, 0, 0]]]


def test_no_pair_leaves_the_map_or_counts_twice():
    pairs = label_pairs(torch.ones(1, 4, 5, dtype=torch.int64), 3)
    half_disc = [(dy, dx) for dy in range(3) for dx in range(-2, 3) if dy > 0 or dx > 0]  # all nearer than 3
    expected = sum((4 - dy) * (5 - abs(dx)) for dy, dx in half_disc)
    assert int(pairs.foreground.sum()) == expected
    assert not pairs.background.any()
    assert not pairs.different.any()


def test_affinity_loss_by_hand():
    a = torch.tensor([0.5, 0.2, 0.9, 0.25]).view(1, 1, 1, 4)
    masks = [torch.tensor(row, dtype=torch.bool).view(1, 1, 1, 4) for row in ([1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1])]
    background, foreground = -math.log(0.5), (-math.log(0.2) - math.log(0.9)) / 2
    expected = background / 4 + foreground / 4 - math.log(0.75) / 2
    assert affinity_loss(a, Pairs(*masks)).item() == pytest.approx(expected, rel=1e-4)


def test_perfect_affinities_cost_nothing_and_wrong_ones_a_finite_amount():
    a = torch.tensor([1.0, 1.0, 0.0]).view(1, 1, 1, 3)
    masks = Pairs(*torch.eye(3, dtype=torch.bool).view(3, 1, 1, 1, 3))
    assert affinity_loss(a, masks).item() == pytest.approx(0, abs=2e-5)
    assert affinity_loss(1 - a, masks).item() == pytest.approx(-math.log(1e-5), rel=1e-3)


def test_displacement_loss_by_hand():
    # Pixels of one object at columns 0, 1, 2 that point to columns 1, 1 and 4: the pairs (0, 1), (1, 2) of radius 2.
    field = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 2.0]]).view(1, 2, 1, 3)
    pairs = label_pairs(torch.ones(1, 1, 3, dtype=torch.int64), 2)
    foreground, background = displacement_loss(field, pairs, 2)
    assert foreground.item() == pytest.approx((0 + 3) / 4, rel=1e-4)  # two pairs, two components
    assert background.item() == 0
    pairs = label_pairs(torch.zeros(1, 1, 3, dtype=torch.int64), 2)
    foreground, background = displacement_loss(field, pairs, 2)
    assert background.item() == pytest.approx((1 + 2) / 4, rel=1e-4)
    assert foreground.item() == 0


def test_field_that_points_to_one_centre_costs_nothing():
    y, x = torch.meshgrid(torch.arange(6.0), torch.arange(7.0), indexing="ij")
    field = torch.stack([2.5 - y, 3.0 - x])[None]
    foreground, _ = displacement_loss(field, label_pairs(torch.full((1, 6, 7), 4), 4), 4)
    assert foreground.item() == pytest.approx(0, abs=1e-6)


def test_unlabelled_map_gives_zero_and_no_gradient():
    a = torch.rand(1, 12, 4, 4).requires_grad_()
    field = torch.rand(1, 2, 4, 4).requires_grad_()
    pairs = label_pairs(torch.full((1, 4, 4), 255), 3)
    loss = affinity_loss(a, pairs) + sum(displacement_loss(field, pairs, 3))
    loss.backward()
    assert loss.item() == 0
    assert not a.grad.any()
    assert not field.grad.any()


def test_mean_of_nothing_is_zero():
    assert masked_mean(torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool)).item() == 0


@pytest.mark.parametrize(
    ("shape", "size"), [((16, 24), (4, 6)), ((33, 48), (9, 12)), ((5, 5), (5, 5)), ((1, 1), (1, 1))]
)
def test_small_labels_are_those_of_pillows_nearest(shape, size):
    labels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = np.array(Image.fromarray(labels.numpy()).resize(size[::-1], Image.Resampling.NEAREST))
    np.testing.assert_array_equal(labels_at(labels[None].long(), size)[0].numpy(), expected)
