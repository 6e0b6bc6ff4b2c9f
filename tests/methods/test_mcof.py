"""RegionNet, and the formulas between the networks of MCOF."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.io import save_weights
from fastcam.methods import create_method, load_method
from fastcam.methods.mcof import (
    bayes_saliency,
    cam_seeds,
    choose_regions,
    lab_bins,
    mask_seeds,
    region_loss,
    restrict_to_tags,
)

pytest.importorskip("timm")
SMALL = {"backbone": "resnet10t", "bins": 2, "hidden": 32, "lr": 0.1, "head_lr_factor": 2.0, "dropout": 0.0}


@pytest.fixture
def method():
    torch.manual_seed(0)
    return create_method("mcof", num_classes=3, **SMALL)


@pytest.fixture
def batch():
    """Four images in quarters of one label each."""
    torch.manual_seed(1)
    regions = torch.tensor([[0, 1], [2, 3]]).repeat_interleave(32, 0).repeat_interleave(32, 1).expand(4, 64, 64)
    labels = torch.tensor([[0, 1, 2, 3], [1, 0, 255, 3], [255, 255, 255, 255], [0, 0, 2, 2]])
    colour = torch.randn(4, 3)
    mask = labels[torch.arange(4)[:, None, None], regions]
    return {"image": colour[mask.clamp(max=3)].permute(0, 3, 1, 2).contiguous(), "regions": regions, "mask": mask}


class TestRegionNet:
    def test_loss_falls_over_ten_steps(self, method, batch):
        ((optimizer, schedule),) = method.optimizers(total_steps=10)
        losses = []
        for _ in range(10):
            loss = method.training_step(batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.02])

    def test_step_trains_on_the_regions_with_a_label(self, method, batch):
        method.eval()
        result = method.training_step(batch)
        assert result["regions"] == 4 + 3 + 0 + 4  # all that have a label: no image has more background than foreground
        with torch.no_grad():
            logits = [method.classify(x, r) for x, r in zip(batch["image"], batch["regions"], strict=True)]
        labels = batch["mask"][:, [0, 0, 32, 32], [0, 32, 0, 32]]
        known = labels != 255
        expected = F.cross_entropy(torch.stack(logits)[known], labels[known])
        torch.testing.assert_close(result["loss"], expected, rtol=1e-4, atol=1e-5)

    def test_without_labels_the_loss_is_0_and_so_is_the_gradient(self, method, batch):
        batch["mask"] = torch.full_like(batch["mask"], 255)
        loss = method.training_step(batch)["loss"]
        loss.backward()
        assert loss == 0
        assert all(p.grad is None or p.grad.abs().max() == 0 for p in method.parameters())

    def test_padding_belongs_to_no_region(self, method, batch):
        method.eval()
        one = {key: value[:1].clone() for key, value in batch.items()}
        plain = method.training_step(one)["loss"]
        one["regions"][:, 60:], one["mask"][:, 60:] = -1, 255
        torch.testing.assert_close(method.training_step(one)["loss"], plain)  # the same cells are covered

    def test_class_that_no_image_has_loses_probability(self, method, batch):
        batch["mask"] = torch.where(batch["mask"] == 3, 255, batch["mask"])
        ((optimizer, _),) = method.optimizers(total_steps=10)

        def share():
            return method.eval().classify(batch["image"][0], batch["regions"][0]).softmax(1)[:, 3].mean().item()

        before = share()
        for _ in range(10):
            loss = method.train().training_step(batch)["loss"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert math.isfinite(loss.item())
        assert share() < before

    @pytest.mark.parametrize("more", [{}, {"pooling": "mean"}, {"area_weighted": True}])
    def test_a_batch_of_one_class_and_one_image_trains(self, more):
        method = create_method("mcof", num_classes=1, **{**SMALL, **more})
        regions = torch.zeros(1, 32, 32, dtype=torch.int64)
        loss = method.training_step(
            {"image": torch.randn(1, 3, 32, 32), "regions": regions, "mask": torch.ones_like(regions)}
        )["loss"]
        loss.backward()
        assert loss.isfinite()

    def test_weights_restore_the_logits(self, method, batch, tmp_path):
        saved = {"method": "mcof", "num_classes": 3, "backbone": "resnet10t", "config": dict(method.config.__dict__)}
        save_weights(tmp_path / "w.safetensors", method.export_state_dict(), saved)
        arguments = batch["image"][0], batch["regions"][0]
        with torch.no_grad():
            loaded = load_method(tmp_path / "w.safetensors")
            assert torch.equal(loaded.classify(*arguments), method.eval().classify(*arguments))

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"pooling": "max"}, "mcof: pooling is 'max', expected masked or mean"),
            ({"bins": 0}, "mcof: bins is 0, expected at least 1"),
            ({"dropout": 1.0}, "mcof: dropout is 1.0, expected a number from 0 to below 1"),
            ({"bin": 3}, "unknown setting 'bin', did you mean 'bins'"),
        ],
    )
    def test_bad_settings_are_refused_by_name(self, setting, message):
        with pytest.raises(FastcamError, match=message):
            create_method("mcof", num_classes=3, backbone="resnet10t", **setting)


class TestSeeds:
    edges = torch.tensor([[0, 1], [1, 2], [2, 3]])

    def test_hot_regions_and_warm_peaks_are_seeds(self):
        heat = torch.tensor([[0.9, 0.6, 0.15, 0.3], [0.0, 0.0, 0.0, 0.0]])
        seeds = cam_seeds(heat, torch.ones(4), self.edges)
        assert seeds.tolist() == [1, 1, -1, 1]  # the last is no hotter than 0.5, but than its neighbour

    def test_the_hottest_class_has_a_region_that_two_claim(self):
        heat = torch.tensor([[0.7, 0.0, 0.0, 0.0], [0.8, 0.0, 0.0, 0.3]])
        assert cam_seeds(heat, torch.ones(4), self.edges).tolist() == [2, -1, -1, 2]

    def test_cold_regions_that_do_not_stand_out_are_background(self):
        heat, saliency = torch.tensor([[0.9, 0.05, 0.05, 0.15]]), torch.tensor([0.0, 0.1, 0.3, 0.1])
        assert cam_seeds(heat, saliency, self.edges).tolist() == [1, 0, -1, -1]
        assert cam_seeds(heat, saliency, self.edges, rest=True).tolist() == [1, 0, 0, 0]

    def test_no_tag_one_region_and_a_map_of_zeros(self):
        assert cam_seeds(torch.zeros(0, 3), torch.zeros(3), self.edges[:1]).tolist() == [-1] * 3
        assert cam_seeds(torch.tensor([[0.3]]), torch.ones(1), self.edges[:0]).tolist() == [1]
        assert cam_seeds(torch.zeros(1, 4), torch.ones(4), self.edges).tolist() == [-1] * 4

    def test_equal_neighbours_are_both_maxima(self):
        assert cam_seeds(torch.tensor([[0.3, 0.3, 0.1, 0.1]]), torch.ones(4), self.edges).tolist() == [1, 1, -1, -1]

    def test_masks_that_are_constant_on_regions_are_a_fixed_point(self):
        regions = torch.tensor([[0, 0, 1], [2, 1, 1]])
        seeds = mask_seeds(torch.tensor([[0, 0, 3], [1, 3, 3]]), regions)
        assert seeds.tolist() == [0, 3, 1]
        assert torch.equal(mask_seeds(seeds[regions], regions), seeds)

    def test_regions_of_mixed_pixels_have_no_label(self):
        regions = torch.zeros(2, 5, dtype=torch.int64)
        mask = torch.zeros(2, 5, dtype=torch.uint8)
        mask[0, :2] = 4
        assert mask_seeds(mask, regions).tolist() == [0]
        mask[0, :3] = 4
        assert mask_seeds(mask, regions).tolist() == [-1]
        assert mask_seeds(mask, regions, share=0.7).tolist() == [0]
        assert mask_seeds(torch.full((2, 5), 255), regions).tolist() == [-1]

    def test_choice_is_half_foreground_and_as_much_background(self):
        labels = torch.tensor([0] * 50 + [2] * 40 + [-1] * 10)
        chosen = labels[choose_regions(labels, 20)]
        assert ((chosen > 0).sum(), (chosen == 0).sum()) == (10, 10)
        chosen = labels[choose_regions(labels, 128)]
        assert ((chosen > 0).sum(), (chosen == 0).sum()) == (40, 40)
        assert len(choose_regions(torch.full((5,), -1), 128)) == 0
        assert labels[choose_regions(labels.clamp(max=0), 128)].tolist() == [0]


def test_loss_ignores_regions_without_label_and_is_log_of_classes_for_uniform_logits():
    logits, labels = torch.randn(4, 3), torch.tensor([0, -1, 2, -1])
    torch.testing.assert_close(region_loss(logits, labels), F.cross_entropy(logits[[0, 2]], labels[[0, 2]]))
    assert region_loss(torch.zeros(2, 21), torch.tensor([3, 0])).item() == pytest.approx(math.log(21))
    nothing = logits.clone().requires_grad_()
    loss = region_loss(nothing, torch.full((4,), -1))
    loss.backward()
    assert loss == 0
    assert nothing.grad.abs().max() == 0
    weighted = region_loss(logits, labels, torch.tensor([3, 7, 1, 7]))
    each = F.cross_entropy(logits[[0, 2]], labels[[0, 2]], reduction="none")
    torch.testing.assert_close(weighted, (3 * each[0] + each[1]) / 4)


def test_prediction_never_has_an_untagged_class():
    logits = torch.tensor([[0.0, 9.0, 1.0], [5.0, 0.0, 9.0]])
    p = restrict_to_tags(logits, torch.tensor([0.0, 1.0]))
    assert p[:, 1].tolist() == [0, 0]
    torch.testing.assert_close(p[0, [0, 2]], logits[0, [0, 2]].softmax(0))
    assert restrict_to_tags(logits, torch.zeros(2)).argmax(1).tolist() == [0, 0]


class TestBayesSaliency:
    def test_equals_the_formulas_in_plain_loops(self, golden):
        a = {key: torch.from_numpy(value) for key, value in golden("mcof_posterior").items()}
        constants = {"num_bins": int(a["n_bins"]), "clip": float(a["clip"]), "smoothing": float(a["smoothing"])}
        actual = bayes_saliency(a["bins"], a["saliency"], a["object_mask"], **constants)
        torch.testing.assert_close(actual, a["posterior"], rtol=1e-4, atol=1e-5)
        nothing = torch.zeros_like(a["object_mask"])
        actual = bayes_saliency(a["bins"], a["saliency"], nothing, **constants)
        torch.testing.assert_close(actual, a["posterior_empty_object"], rtol=1e-4, atol=1e-5)

    @pytest.fixture
    def scene(self):
        g = torch.Generator().manual_seed(0)
        bins = torch.randint(0, 8, (3, 9, 10), generator=g)
        return bins, torch.rand(9, 10, generator=g) * 0.9 + 0.05, torch.rand(9, 10, generator=g) > 0.6

    def test_equal_colours_leave_saliency_and_saliency_of_a_half_leaves_the_colours(self, scene):
        bins, saliency, mask = scene
        flat = torch.zeros_like(bins)
        p = bayes_saliency(flat, saliency, mask, num_bins=1)
        torch.testing.assert_close(p, saliency)
        even = bayes_saliency(bins, torch.full_like(saliency, 0.5), mask, num_bins=8)
        odds = torch.ones_like(saliency)
        for channel in bins:
            inside, outside = (channel[m].bincount(minlength=8) + 1.0 for m in (mask, ~mask))
            odds = odds * (inside / inside.sum())[channel] / (outside / outside.sum())[channel]
        torch.testing.assert_close(even, odds / (1 + odds))

    def test_grows_with_saliency_and_turns_round_with_both(self, scene):
        bins, saliency, mask = scene
        p = bayes_saliency(bins, saliency, mask, num_bins=8)
        assert (bayes_saliency(bins, saliency + 0.02, mask, num_bins=8) > p).all()
        torch.testing.assert_close(bayes_saliency(bins, 1 - saliency, ~mask, num_bins=8), 1 - p)

    def test_stays_between_0_and_1_for_saturated_saliency_and_empty_masks(self, scene):
        bins, saliency, mask = scene
        for m in (mask, torch.zeros_like(mask), torch.ones_like(mask)):
            p = bayes_saliency(bins, (saliency > 0.5).float(), m, num_bins=8)
            assert ((p > 0) & (p < 1)).all()


def test_bins_of_colours_by_hand():
    image = torch.tensor([[0, 255, 128], [0, 255, 128], [0, 255, 128]], dtype=torch.uint8)[:, None]
    bins = lab_bins(image, 32)[:, 0]
    assert bins[0].tolist() == [0, 31, 17]  # L 0, 100, 53.6
    assert bins[1].tolist() == bins[2].tolist() == [16] * 3  # a and b are 0
    blue = lab_bins(torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None])
    assert blue.flatten().tolist() == [10, 27, 0]  # 32.3, 79.2, -107.9
