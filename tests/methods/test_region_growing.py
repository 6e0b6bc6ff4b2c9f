import dataclasses

import numpy as np
import pytest
import torch

from fastcam import region_graph, region_merge, superpixel_slic
from fastcam._lab import rgb_to_lab
from fastcam.errors import FastcamError
from fastcam.methods.region_growing import Config, best_labels, grow_regions, region_scores, vote_labels
from fastcam.nn.regions import gradient_contour
from fastcam.nn.waterpixels import waterpixels
from fastcam.reference.region_merge import content_border_similarity
from fastcam.reference.superpixel_slic import pieces


def photo(H=60, W=80, seed=0):
    """Areas, shades and noise, uint8 ``(1, 3, H, W)``."""
    g = torch.Generator().manual_seed(seed)
    blocks = torch.nn.functional.interpolate(torch.rand(1, 3, 3, 4, generator=g), (H, W))
    smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=g), (H, W), mode="bilinear")
    return (200 * (0.7 * blocks + 0.3 * smooth) + 6 * torch.randn(1, 3, H, W, generator=g)).clamp(0, 255).byte()


SMALL = Config(superpixels=60)


class TestGrowing:
    @pytest.mark.parametrize("criterion", ["adaptive", "best_first"])
    def test_every_stage_partitions_the_image_into_connected_regions_and_coarsens_the_one_before(self, criterion):
        tree = grow_regions(photo(), dataclasses.replace(SMALL, criterion=criterion))[0]
        finer = tree.cut(2.0)
        assert torch.equal(finer, tree.labels.long())
        for level in (1.6, 1.3, 1.0, 0.7, 0.4, 0.0):
            cut = tree.cut(level)
            assert cut.unique().tolist() == list(range(int(cut.max()) + 1))
            assert len(pieces(cut).unique()) == int(cut.max()) + 1
            assert len((finer * 10_000 + cut).unique()) == int(finer.max()) + 1
            finer = cut

    def test_batch_equals_single_images(self):
        images = torch.cat([photo(seed=seed) for seed in range(3)])
        for image, tree in zip(images, grow_regions(images, SMALL), strict=True):
            alone = grow_regions(image[None], SMALL)[0]
            assert torch.equal(tree.labels, alone.labels)
            assert torch.equal(tree.merges, alone.merges)

    def test_two_areas_unlike_in_every_channel_are_found_exactly(self):
        image = torch.zeros(1, 3, 40, 60)
        image[:, 0, :, :26], image[:, 1, :, 26:], image[:, 2, :, 26:] = 250, 200, 250
        for stop in (0.2, 0.5, 0.9):
            cut = grow_regions(image, Config(superpixels=24, stop=stop))[0].cut()
            assert torch.equal(cut, (torch.arange(60) >= 26).long().expand(40, 60))

    def test_region_merges_at_most_once_a_round_and_the_threshold_stays_below_its_start(self):
        tree = grow_regions(photo(), SMALL)[0]
        for number in tree.rounds.unique():
            merged = tree.merges[tree.rounds == number].flatten().tolist()
            assert len(merged) == len(set(merged))
        assert len(tree.merges) <= tree.regions - 1
        assert float(tree.thresholds.max()) <= 2.0
        assert bool((tree.values > tree.thresholds).all())

    def test_borders_and_perimeters_of_grown_regions_are_those_of_their_pixels(self):
        """They are added up merge by merge; the graph of the last cut counts them anew."""
        seen = []

        def weight(a, b, contact):
            seen.append(
                torch.stack([contact.border, a.perimeter, b.perimeter, a.area, b.area, a.color[:, 0], b.color[:, 0]])
            )
            return content_border_similarity(a, b, contact)

        image = photo()
        labels = grow_regions(image, SMALL)[0].labels
        tree = region_merge(labels[None], image, weight=weight, stop=1.0)[0]
        assert len(tree.merges) > 20
        cut = tree.cut()
        graph = region_graph(cut[None])[0]
        i, j = graph.edges.T
        light = torch.zeros(len(graph.area)).double()
        light.index_add_(0, cut.flatten(), rgb_to_lab(image)[0, 0].flatten().double() / 2)
        parts = (graph.border, graph.perimeter[i], graph.perimeter[j], graph.area[i], graph.area[j], light[i], light[j])
        expected = torch.stack([part.double() for part in parts])
        assert sorted(expected.T.tolist()) == sorted(seen[-1].T.tolist())

    def test_threshold_that_no_similarity_passes_leaves_the_superpixels(self):
        tree = grow_regions(photo(), dataclasses.replace(SMALL, stop=2.0))[0]
        assert len(tree.merges) == 0
        assert torch.equal(tree.cut(), tree.labels.long())

    def test_texture_tells_a_chequered_area_from_a_plain_one_of_the_same_colours(self):
        """Left columns of two greys, right a chequerboard of them: means and histograms agree, patterns do not."""
        y, x = torch.meshgrid(torch.arange(32), torch.arange(64), indexing="ij")
        bright = torch.where(x < 32, (x // 2) % 2, (x + y) % 2)
        image = (100 + 40 * bright).expand(1, 3, 32, 64).byte()
        sides = (torch.arange(64) >= 32).long().expand(32, 64)
        merged = {
            texture: region_merge(sides[None], image, weight="content", texture=texture, stop=0)[0].values[0].item()
            for texture in (False, True)
        }
        assert merged[False] == pytest.approx(1.0, abs=1e-5)
        assert merged[True] < 0.95
        assert float(grow_regions(image, Config(superpixels=8, texture=True))[0].values.min()) < 2

    def test_contours_hold_superpixels_back(self):
        image = photo()
        with_contour = grow_regions(image, dataclasses.replace(SMALL, contour=30.0))[0]
        labels = superpixel_slic(image, 60, contour=gradient_contour(image), contour_weight=30.0)[0]
        assert torch.equal(with_contour.labels, labels)
        assert not torch.equal(labels, superpixel_slic(image, 60)[0])

    def test_regions_grow_from_waterpixels_too(self):
        image = photo()
        tree = grow_regions(image, dataclasses.replace(SMALL, producer="waterpixels", regularity=4.0))[0]
        assert torch.equal(tree.labels, waterpixels(image, 60, regularity=4.0)[0])
        assert len(tree.cut(count=3).unique()) == 3

    @pytest.mark.parametrize("shape", [(1, 1), (1, 7), (5, 1)])
    def test_images_of_few_pixels(self, shape):
        tree = grow_regions(torch.full((1, 3, *shape), 90.0))[0]
        assert tree.labels.shape == shape
        assert tree.cut().unique().tolist() == [0]

    def test_constant_image_and_one_superpixel_become_one_region(self):
        for image, config in ((torch.full((1, 3, 30, 40), 7.0), SMALL), (photo(), Config(superpixels=1))):
            assert grow_regions(image, config)[0].cut().unique().tolist() == [0]

    def test_empty_batch_gives_no_tree(self):
        assert grow_regions(photo()[:0]) == []

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"superpixels": 0}, "growing.superpixels is 0, expected a number from 1 to 16000"),
            ({"superpixels": 16001}, "growing.superpixels is 16001"),
            ({"compactness": 0.0}, "growing.compactness is 0.0, expected a number above 0"),
            ({"contour": -1.0}, "growing.contour is -1.0, expected a number of 0 or more"),
            ({"stop": -1.0}, "growing.stop is -1.0"),
            ({"stop": float("nan")}, "growing.stop is nan"),
            ({"start": 0.0}, "growing.start is 0.0"),
            ({"factor": 1.0}, "growing.factor is 1.0, expected a number above 1"),
            ({"min_fraction": 1.5}, "growing.min_fraction is 1.5"),
            ({"penalty": 0.0}, "growing.penalty is 0.0"),
        ],
    )
    def test_setting_out_of_range_is_named(self, setting, message):
        with pytest.raises(FastcamError, match=f"^{message}"):
            grow_regions(photo(), Config(**setting))

    def test_image_with_nan_is_refused(self):
        image = photo().float()
        image[0, 0, 3, 3] = torch.nan
        with pytest.raises(ValueError, match=r"^superpixel_slic: expected an image without NaN"):
            grow_regions(image)


class TestVoting:
    cut = torch.tensor([[0, 0, 1], [0, 2, 1]])

    def test_means_by_hand(self):
        scores = torch.tensor([[[0.0, 3.0, 1.0], [6.0, 5.0, 2.0]]])
        assert region_scores(scores, [self.cut]).tolist() == [[[3.0, 3.0, 1.5], [3.0, 5.0, 1.5]]]
        whole = torch.zeros_like(self.cut)
        both = region_scores(scores, [self.cut, whole])
        assert both[0, 0, 0] == pytest.approx((3 + 17 / 6) / 2)

    def test_means_agree_with_numpy_over_the_stages_of_a_photograph(self):
        tree = grow_regions(photo(), SMALL)[0]
        scores = torch.rand(3, 60, 80, generator=torch.Generator().manual_seed(2))
        cuts = [tree.cut(1.5), tree.cut(1.0)]
        expected = np.zeros((3, 60, 80))
        for cut in cuts:
            for region in cut.unique():
                inside = (cut == region).numpy()
                expected[:, inside] += scores.numpy()[:, inside].mean(1, keepdims=True) / 2
        torch.testing.assert_close(region_scores(scores, cuts), torch.from_numpy(expected).float())

    def test_voting_twice_changes_nothing_and_labels_constant_on_regions_stay(self):
        cut = grow_regions(photo(), SMALL)[0].cut(1.2)
        labels = torch.randint(0, 5, (60, 80), generator=torch.Generator().manual_seed(0))
        once = vote_labels(labels, [cut])
        assert torch.equal(vote_labels(once, [cut]), once)
        per_region = (cut * 7 % 5).to(torch.uint8)
        assert torch.equal(vote_labels(per_region, [cut]), per_region)

    def test_vote_is_that_of_scipy(self):
        from scipy import stats

        cut = grow_regions(photo(), SMALL)[0].cut(1.2)
        labels = torch.randint(0, 4, (60, 80), generator=torch.Generator().manual_seed(1))
        voted = vote_labels(labels, [cut])
        for region in cut.unique():
            assert voted[cut == region].unique().tolist() == [stats.mode(labels[cut == region].numpy()).mode]

    def test_ignored_pixels_do_not_vote_and_regions_without_votes_stay_ignored(self):
        labels = torch.tensor([[255, 4, 255], [255, 255, 255]], dtype=torch.uint8)
        assert vote_labels(labels, [self.cut]).tolist() == [[4, 4, 255], [4, 255, 255]]
        assert vote_labels(torch.full_like(labels, 255), [self.cut]).tolist() == [[255] * 3] * 2

    def test_margin_leaves_close_votes_undecided(self):
        labels = torch.tensor([[1, 1, 3], [2, 5, 2]])
        assert vote_labels(labels, [self.cut], margin=0.3).tolist() == [[1, 1, 255], [1, 5, 255]]
        assert vote_labels(labels, [self.cut], margin=0.4).tolist() == [[255, 255, 255], [255, 5, 255]]
        assert vote_labels(labels, [self.cut]).tolist() == [[1, 1, 2], [1, 5, 2]]  # ties go to the lower label

    def test_best_of_one_label_is_that_label(self):
        assert best_labels(torch.rand(1, 2, 3)).tolist() == [[0, 0, 0], [0, 0, 0]]

    def test_shapes_that_do_not_fit_are_refused(self):
        for scores, cuts in (
            (torch.rand(2, 2, 3), []),
            (torch.rand(2, 3), [self.cut]),
            (torch.rand(2, 2, 2), [self.cut]),
        ):
            with pytest.raises(ValueError, match=r"^region_scores: expected scores \(K, H, W\) and cuts \(H, W\)"):
                region_scores(scores, cuts)
