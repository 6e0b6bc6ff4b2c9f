import numpy as np
import pytest
import torch

from fastcam.nn import waterpixels as module
from fastcam.nn.regions import gradient_contour
from fastcam.nn.waterpixels import waterpixels
from fastcam.reference.superpixel_slic import pieces


def photo(H=60, W=80, seed=0):
    """Areas, shades and noise, uint8 ``(1, 3, H, W)``."""
    g = torch.Generator().manual_seed(seed)
    blocks = torch.nn.functional.interpolate(torch.rand(1, 3, 3, 4, generator=g), (H, W))
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=g), (H, W), mode="bilinear")
    return (200 * (0.7 * blocks + 0.3 * smooth) + 6 * torch.randn(1, 3, H, W, generator=g)).clamp(0, 255).byte()


@pytest.mark.parametrize("n", [1, 6, 40, 200])
@pytest.mark.parametrize("regularity", [0.0, 8.0])
def test_one_connected_superpixel_a_cell_numbered_in_scan_order(n, regularity):
    labels = waterpixels(photo(), n, regularity=regularity)[0]
    names = labels.unique()
    assert torch.equal(names, torch.arange(len(names), dtype=torch.int32))
    assert 0.7 * n <= len(names) <= 1.3 * n
    assert len(pieces(labels.long()).unique()) == len(names)
    first = [int((labels.flatten() == s).nonzero()[0]) for s in names]
    assert first == sorted(first)


def test_batch_equals_single_images_and_a_second_run():
    images = torch.cat([photo(seed=seed) for seed in range(3)])
    together = waterpixels(images, 30)
    assert torch.equal(together, waterpixels(images, 30))
    for image, labels in zip(images, together, strict=True):
        assert torch.equal(waterpixels(image[None], 30)[0], labels)


def test_step_edge_is_a_boundary():
    image = torch.full((1, 3, 48, 64), 40, dtype=torch.uint8)
    image[..., 27:] = 200
    labels = waterpixels(image, 12)[0]
    right = torch.arange(64).expand(48, 64) >= 27
    spill = sum(min(int((right & (labels == s)).sum()), int((~right & (labels == s)).sum())) for s in labels.unique())
    assert spill <= 48  # the crest is two pixels wide


def test_watershed_agrees_with_scikit_image_where_values_have_no_ties():
    segmentation = pytest.importorskip("skimage.segmentation")
    g = np.random.default_rng(0).permutation(40 * 50).reshape(40, 50).astype(float)
    first, second = module._neighbours(40, 50)
    of = [module._shrunk(size, cells, 2 / 3) for size, cells in ((40, 4), (50, 5))]
    cell = np.where((of[0][:, None] >= 0) & (of[1] >= 0), of[0][:, None] * 5 + of[1], -1).ravel()
    within = (cell[first] == cell[second]) & (cell[first] >= 0)
    marker = module._markers(g.ravel(), cell, first[within], second[within]).reshape(40, 50)
    ours = module._watershed(g, 20, 0.0, 2 / 3)
    theirs = segmentation.watershed(g, marker + 1, connectivity=1)
    # Both are watersheds of one relief, but those of pixels give a crest to the basin that floods it first.
    pairs = np.unique(np.stack([ours.ravel(), theirs.ravel()]), axis=1, return_counts=True)
    assert pairs[1][np.argsort(pairs[1])[-20:]].sum() > 0.9 * g.size


def test_marker_is_the_minimum_of_the_largest_basin_by_hand():
    """Basins of 2, 4 and 1 pixels: the last dies at 5, then the first at 7; depth does not count."""
    g = np.array([1.0, 3, 7, 4, 2, 2, 4.5, 5, 0])
    first = np.arange(8)
    marker = module._markers(g, np.zeros(9, int), first, first + 1)
    assert marker.tolist() == [-1, -1, -1, -1, 0, 0, -1, -1, -1]


def test_flat_cell_is_its_own_marker():
    marker = module._markers(np.zeros(4), np.array([3, 3, -1, 3]), np.array([0]), np.array([1]))
    assert marker.tolist()[2] == -1
    assert set(marker.tolist()) == {3, -1}


@pytest.mark.parametrize(("size", "cells"), [(9, 3), (10, 3), (2, 2), (1, 1), (7, 1)])
def test_shrunk_cells_lie_in_their_cells_and_none_is_empty(size, cells):
    of = module._shrunk(size, cells, 2 / 3)
    assert sorted(set(of.tolist()) - {-1}) == list(range(cells))
    assert all(o in (-1, at * cells // size) for at, o in enumerate(of.tolist()))
    if (size, cells) == (9, 3):
        assert of.tolist() == [-1, 0, -1, -1, 1, -1, -1, 2, -1]  # 2/3 of three pixels from the middle: one


def test_regularity_makes_rounder_superpixels():
    from fastcam.metrics.regions import compactness

    values = [compactness(waterpixels(photo(), 40, regularity=k)[0]) for k in (0, 4, 16)]
    assert values == sorted(values)


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (3, 2)])
def test_more_segments_than_pixels_and_few_pixels(shape):
    labels = waterpixels(torch.full((1, 3, *shape), 50.0), 100)[0]
    assert len(labels.unique()) == labels.numel()
    assert waterpixels(torch.full((1, 3, *shape), 50.0), 1).unique().tolist() == [0]


def test_constant_image_gives_about_the_grid():
    sizes = waterpixels(torch.full((1, 3, 40, 60), 77), 6)[0].flatten().bincount()
    assert len(sizes) == 6
    assert sizes.max() <= 1.5 * sizes.min()


def test_empty_batch_and_empty_image():
    assert waterpixels(torch.zeros(0, 3, 4, 5), 3).shape == (0, 4, 5)
    assert waterpixels(torch.zeros(2, 3, 0, 5), 3).shape == (2, 0, 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_segments": 0}, "waterpixels: expected n_segments from 1 to 65535, got 0"),
        ({"regularity": -1}, "waterpixels: expected regularity >= 0 and shrink"),
        ({"shrink": 0}, "waterpixels: expected regularity >= 0 and shrink"),
        ({"image": torch.zeros(3, 4, 5)}, "gradient_contour: expected image"),
        ({"image": torch.full((1, 3, 2, 2), torch.nan)}, "gradient_contour: expected an image without NaN"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        waterpixels(**{"image": photo(), "n_segments": 4, **arguments})


def test_boundaries_lie_on_higher_gradients_than_those_of_a_grid():
    image = photo()
    gradient = gradient_contour(image)[0]
    labels = waterpixels(image, 30, regularity=2.0)[0]
    grid = (torch.arange(60)[:, None] * 5 // 60) * 6 + torch.arange(80) * 6 // 80
    heights = []
    for one in (labels, grid):
        edge = torch.zeros(60, 80, dtype=torch.bool)
        edge[:, 1:] |= one[:, 1:] != one[:, :-1]
        edge[1:] |= one[1:] != one[:-1]
        heights.append(float(gradient[edge].mean()))
    assert heights[0] > 1.2 * heights[1]
