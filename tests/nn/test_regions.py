"""Pooling over regions, and saliency from them."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.nn import functional as F

from fastcam._lab import rgb_to_lab
from fastcam.nn.regions import geodesic_saliency, gradient_contour, masked_roi_pool, region_cells, region_mean_pool


def by_hand(features, cells, count, bins):
    """Every bin of every region, one at a time."""
    C, h, w = features.shape
    out = torch.zeros(count, C, bins, bins, dtype=features.dtype)
    for r in range(count):
        own = cells[cells[:, 0] == r, 1:]
        if len(own) == 0:
            continue
        mask = torch.zeros(h, w, dtype=torch.bool)
        mask[own[:, 0], own[:, 1]] = True
        (y0, x0), (y1, x1) = own.amin(0).tolist(), own.amax(0).tolist()
        for u in range(bins):
            for v in range(bins):
                rows = range(y0 + u * (y1 - y0 + 1) // bins, y0 - (-(u + 1) * (y1 - y0 + 1) // bins))
                columns = range(x0 + v * (x1 - x0 + 1) // bins, x0 - (-(v + 1) * (x1 - x0 + 1) // bins))
                inside = [features[:, y, x] for y in rows for x in columns if mask[y, x]]
                if inside:
                    out[r, :, u, v] = torch.stack(inside).amax(0)
    return out


@pytest.fixture
def scene():
    g = torch.Generator().manual_seed(0)
    regions = torch.randint(0, 5, (5, 6), generator=g).repeat_interleave(7, 0).repeat_interleave(6, 1)
    return torch.rand(3, 5, 5, generator=g, dtype=torch.float64), regions[:35, :36].contiguous()


@pytest.mark.parametrize("bins", [1, 2, 7])
def test_masked_pooling_equals_a_loop_over_bins(scene, bins):
    features, regions = scene
    cells = region_cells(regions, 8)
    expected = by_hand(features, cells, 6, bins)  # the sixth region has no pixel
    torch.testing.assert_close(masked_roi_pool(features, cells, 6, bins), expected)
    torch.testing.assert_close(masked_roi_pool(features.requires_grad_(), cells, 6, bins), expected)
    assert expected[5].max() == 0


def test_masked_pooling_is_differentiable_and_gives_nothing_outside_the_region(scene):
    features, regions = scene
    cells = region_cells(regions, 8)
    assert torch.autograd.gradcheck(lambda f: masked_roi_pool(f, cells, 5, 3), features.requires_grad_())
    (grad,) = torch.autograd.grad(masked_roi_pool(features, cells, 5, 3)[2].sum(), features)
    own = torch.zeros(5, 5, dtype=torch.bool)
    own[tuple(cells[cells[:, 0] == 2, 1:].T)] = True
    assert (grad[:, ~own] == 0).all()
    changed = torch.where(own, features, 99.0)
    torch.testing.assert_close(masked_roi_pool(changed, cells, 5, 3)[2], masked_roi_pool(features, cells, 5, 3)[2])


def test_of_equal_features_the_first_cell_has_the_gradient():
    features = torch.ones(1, 2, 3, requires_grad=True)
    cells = region_cells(torch.zeros(2, 3, dtype=torch.int64), 1)
    masked_roi_pool(features, cells, 1, 1).sum().backward()
    assert features.grad.tolist() == [[[1, 0, 0], [0, 0, 0]]]


def test_mask_of_the_whole_box_is_ordinary_pooling_and_zeros_outside_change_nothing():
    features = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    whole = region_cells(torch.zeros(8, 8, dtype=torch.int64), 1)
    torch.testing.assert_close(masked_roi_pool(features, whole, 1, 4)[0], F.max_pool2d(features, 2))
    part = torch.full((8, 8), -1)
    part[0, 0], part[7, 7], part[2:5, 3:6] = 0, 0, 0  # the box is the whole map
    zeroed = features * (part >= 0)
    pooled = masked_roi_pool(features, region_cells(part, 1), 1, 4)[0]
    torch.testing.assert_close(pooled, F.max_pool2d(zeroed, 2))


def test_region_of_one_pixel_fills_its_bins_with_its_cell():
    regions = torch.full((32, 32), -1)
    regions[20, 9] = 0
    features = torch.rand(4, 2, 2, generator=torch.Generator().manual_seed(0))
    pooled = masked_roi_pool(features, region_cells(regions, 16), 1, 7)
    assert torch.equal(pooled, features[:, 1, 0][None, :, None, None].expand(1, 4, 7, 7))
    assert torch.equal(region_mean_pool(features, region_cells(regions, 16), 1)[0, :, 0, 0], features[:, 1, 0])


def test_mean_pooling_equals_a_loop_and_keeps_the_sum(scene):
    features, regions = scene
    cells = region_cells(regions, 8)
    mean = region_mean_pool(features, cells, 6)[:, :, 0, 0]
    for r in range(5):
        own = cells[cells[:, 0] == r, 1:]
        torch.testing.assert_close(mean[r], features[:, own[:, 0], own[:, 1]].mean(1))
    assert mean[5].abs().max() == 0


class TestGeodesicSaliency:
    def test_what_differs_from_the_border_stands_out(self):
        image = torch.full((3, 20, 20), 100, dtype=torch.uint8)
        image[:, 5:15, 5:15] = torch.tensor([255, 0, 0], dtype=torch.uint8)[:, None, None]
        image[:, :3, :3] = torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None]  # at the border: background
        regions = torch.zeros(20, 20, dtype=torch.int64)
        regions[5:15, 5:15], regions[:3, :3] = 1, 2
        saliency = geodesic_saliency(image, regions)
        assert torch.equal(saliency, (regions == 1).float())

    def test_the_cheapest_way_counts_and_small_steps_are_free(self):
        image = torch.zeros(3, 1, 5, dtype=torch.uint8).repeat(1, 5, 1)
        regions = torch.zeros(5, 5, dtype=torch.int64)
        image[:, 1:4, 1:4], regions[1:4, 1:4] = 5, 1  # 1.4 in Lab: below the slack
        assert geodesic_saliency(image, regions).max() == 0
        image[:, 2, 2], regions[2, 2] = 255, 2
        saliency = geodesic_saliency(image, regions)
        assert saliency[2, 2] == 1
        assert saliency[regions != 2].max() == 0

    def test_one_region_does_not_stand_out(self):
        image = torch.randint(0, 256, (3, 6, 7), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        assert geodesic_saliency(image, torch.zeros(6, 7, dtype=torch.int64)).abs().max() == 0
        assert geodesic_saliency(image[:, :1, :1], torch.zeros(1, 1, dtype=torch.int64)).tolist() == [[0.0]]


def test_gradient_is_that_of_scipy_and_ignores_what_lies_outside():
    image = torch.randint(0, 256, (2, 3, 9, 11), generator=torch.Generator().manual_seed(0)).byte()
    light = rgb_to_lab(image)[:, 0].numpy() / 2
    expected = np.stack([ndimage.maximum_filter(l, 3) - ndimage.minimum_filter(l, 3) for l in light]) / 100
    torch.testing.assert_close(gradient_contour(image), torch.from_numpy(expected).float())
    step = torch.zeros(1, 3, 1, 6)
    step[..., 3:] = 255
    assert gradient_contour(step).tolist() == [[[0, 0, 1, 1, 0, 0]]]
    assert gradient_contour(step[..., :1]).tolist() == [[[0]]]


def test_gradient_of_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match=r"^gradient_contour: expected image \(B, 3, H, W\), got \(3, 4, 5\)"):
        gradient_contour(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match=r"^gradient_contour: expected an image without NaN"):
        gradient_contour(torch.full((1, 3, 2, 2), torch.nan))
