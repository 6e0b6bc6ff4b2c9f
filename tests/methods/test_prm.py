"""Peak response mapping: training through peaks, and objects from proposals."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.io import save_weights
from fastcam.methods import create_method, load_method
from fastcam.methods.prm import (
    Peaks,
    Retrieved,
    background_masks,
    class_points,
    kept_peaks,
    mask_contours,
    proposal_scores,
    retrieve_instances,
    semantic_labels,
    suppress,
)
from fastcam.metrics import mask_iou

pytest.importorskip("timm")
SMALL = {"backbone": "resnet10t", "sub_pixel": 2, "side": 64, "peak_threshold": -100.0, "frozen_norm": True}


@pytest.fixture
def method():
    torch.manual_seed(0)
    return create_method("prm", num_classes=3, lr=0.01, head_lr_factor=10.0, exact_grad=True, **SMALL)


def boxes(*corners, size=(20, 20)):
    masks = torch.zeros(len(corners), *size, dtype=torch.bool)
    for mask, (top, left, bottom, right) in zip(masks, corners, strict=True):
        mask[top:bottom, left:right] = True
    return masks


class TestPRM:
    def test_loss_falls_over_ten_steps(self, method):
        batch = {"image": torch.randn(4, 3, 64, 64), "tags": torch.eye(4, 3)}
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
        assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.1]

    def test_loss_is_that_of_the_mean_peaks_of_the_enlarged_maps(self, method):
        batch = {"image": torch.randn(2, 3, 96, 96), "tags": torch.tensor([[1.0, 0, 1], [0, 0, 0]])}
        with torch.no_grad():
            maps = method.classifier(method.backbone(batch["image"])[-1])
            assert maps.shape == (2, 3, 3, 3)
            maps = F.interpolate(maps, (6, 6), mode="bilinear", align_corners=True)
            windows = F.unfold(F.pad(maps.flatten(0, 1)[:, None], (1, 1, 1, 1), value=-1e9), 3)  # no ties here
            own, largest = windows[:, 4], windows.amax(1)
            peak = (own == largest) & (own >= own.median(dim=1, keepdim=True)[0])
            logits = ((own * peak).sum(1) / peak.sum(1)).view(2, 3)
            p = logits.sigmoid()
            expected = -(batch["tags"] * p.log() + (1 - batch["tags"]) * (1 - p).log()).mean()
            result = method.training_step(batch)
        torch.testing.assert_close(result["loss"], expected)
        torch.testing.assert_close(result["peaks"], peak.sum().float() / 6)

    def test_one_class_and_a_batch_of_one_train(self):
        method = create_method("prm", num_classes=1, **SMALL)
        loss = method.training_step({"image": torch.randn(1, 3, 64, 64), "tags": torch.zeros(1, 1)})["loss"]
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)

    def test_maps_are_not_enlarged_out_of_training(self, method):
        images = torch.randn(1, 3, 64, 64)
        assert method.response_maps(images).shape[-2:] == (4, 4)
        assert method.eval().response_maps(images).shape[-2:] == (2, 2)
        assert method.tag_logits(images).shape == (1, 3)
        assert method.cams(images, torch.tensor([[0.0, 1, 0]])).min() >= 0
        fused = method.fused_cams([images], (64, 64), torch.tensor([[0.0, 1, 0]]))
        assert fused.background is None
        assert fused.maps.shape == (1, 3, 64, 64)
        assert fused.maps[0, [0, 2]].max() == 0

    def test_peaks_keep_to_the_classes_that_are_there_and_to_the_thresholds(self, method):
        method.eval()
        image = torch.randn(3, 90, 70)
        found = method.peaks(image, torch.tensor([1]))
        assert set(found.places[:, 0].tolist()) == {1}
        assert found.prm.shape == (len(found.places), 90, 70)
        torch.testing.assert_close(found.prm.sum((1, 2)), torch.ones(len(found.places)))
        method.config = dataclasses.replace(method.config, peak_threshold=1e6)
        assert len(method.peaks(image, torch.tensor([1])).prm) == 0
        method.config = dataclasses.replace(method.config, peak_threshold=-100.0, class_threshold=1e6)
        assert len(method.peaks(image).prm) == 0

    def test_no_tag_and_no_peak_give_no_object(self, method):
        masks, classes, scores = method.eval().instances(
            torch.randn(3, 40, 50), boxes((0, 0, 9, 9), size=(40, 50)), torch.zeros(0, dtype=torch.int64)
        )
        assert (masks.shape, len(classes), len(scores)) == ((0, 40, 50), 0, 0)

    def test_objects_are_proposals_best_first(self, method):
        noise = torch.rand(30, 40, 50, generator=torch.Generator().manual_seed(0))
        proposals = noise > torch.linspace(0.3, 0.9, 30)[:, None, None]
        with torch.inference_mode():
            masks, classes, scores = method.eval().instances(torch.randn(3, 40, 50), proposals, torch.tensor([0, 2]))
        assert len(masks) > 0
        assert (masks[:, None] == proposals).flatten(2).all(2).any(1).all()
        assert set(classes.tolist()) <= {0, 2}
        assert torch.equal(scores, scores.sort(descending=True)[0])
        assert mask_iou(masks, masks).fill_diagonal_(0).max() < 0.3

    def test_weights_restore_the_maps(self, method, tmp_path):
        saved = {"method": "prm", "num_classes": 3, "backbone": "resnet10t", "config": dict(method.config.__dict__)}
        save_weights(tmp_path / "w.safetensors", method.export_state_dict(), saved)
        image = torch.randn(2, 3, 64, 64)
        loaded = load_method(tmp_path / "w.safetensors")
        assert loaded.config == method.config
        with torch.no_grad():
            assert torch.equal(loaded.cams(image), method.eval().cams(image))

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"window": 4}, "prm: window is 4, expected an odd number of at least 3"),
            ({"contour": 1}, "prm: contour is 1, expected an odd number"),
            ({"threshold": "most"}, "prm: threshold is 'most', expected median, mean, max, a number or null"),
            ({"sub_pixel": 0}, "prm: sub_pixel is 0, expected at least 1"),
            ({"side": 16}, "prm: side is 16, expected at least the output stride 32"),
            ({"max_area": 0.0}, "prm: min_area is 2e-05 and max_area 0.0"),
            ({"nms": 0.0}, "prm: nms is 0.0, expected a number above 0"),
            ({"balance": (1.0, 2.0)}, r"prm: balance has 2 numbers, expected one, or one a class \(3\)"),
        ],
    )
    def test_bad_settings_are_refused_by_name(self, setting, message):
        with pytest.raises(FastcamError, match=message):
            create_method("prm", num_classes=3, backbone="resnet10t", **setting)


class TestRetrieval:
    def test_thresholds_of_peaks(self):
        maps, logits = torch.zeros(2, 2, 2), torch.tensor([0.0, -1.0])
        maps[0, 0], maps[1, 1] = torch.tensor([30.0, 31.0]), torch.tensor([40.0, 5.0])
        peaks = torch.tensor([[0, 0, 0], [0, 0, 1], [1, 1, 0], [1, 1, 1]])
        every = torch.tensor([True, True])
        assert kept_peaks(maps, logits, peaks, every, 30.0, 0.0).tolist() == [[0, 0, 1]]
        assert kept_peaks(maps, logits, peaks, every, 30.0, None).tolist() == [[0, 0, 1], [1, 1, 0]]
        assert kept_peaks(maps, logits, peaks, ~every, 30.0, None).shape == (0, 3)

    def test_contour_is_a_band_on_both_sides_of_the_border(self):
        mask = boxes((5, 6, 15, 14))
        band = mask_contours(mask, 5)[0]
        expected = boxes((3, 4, 17, 16))[0] & ~boxes((7, 8, 13, 12))[0]
        assert torch.equal(band, expected)
        assert not mask_contours(torch.ones(1, 6, 6, dtype=torch.bool)).any()  # no border inside the image

    def test_background_is_where_a_map_is_below_its_mean(self):
        maps = torch.stack([torch.tensor([[0.0, 1.0]]), torch.tensor([[4.0, 4.0]])])
        back = background_masks(maps, (1, 2))
        assert back.tolist() == [[[True, False]], [[False, False]]]  # bytes 0 and 255, mean 127.5; a flat map has none
        assert not background_masks(maps, (1, 2), (0.0, 0.5)).any()
        assert background_masks(maps, (30, 40)).shape == (2, 30, 40)

    def test_scores_equal_sums_over_pixels(self):
        g = torch.Generator().manual_seed(0)
        prm, back = torch.rand(3, 6, 7, generator=g), torch.rand(3, 6, 7, generator=g) > 0.5
        masks = torch.rand(4, 6, 7, generator=g) > 0.5
        edges = mask_contours(masks, 3)
        scores = proposal_scores(prm, back, masks, edges, torch.tensor([0.8, 1.0, 0.0]), torch.tensor([0.0, 0.1, 1.0]))
        for k, (alpha, beta) in enumerate([(0.8, 0.0), (1.0, 0.1), (0.0, 1.0)]):
            for j in range(4):
                value = alpha * prm[k][masks[j]].sum() + prm[k][edges[j]].sum() - beta * (back[k] & masks[j]).sum()
                assert scores[k, j].item() == pytest.approx(value.item(), rel=1e-5, abs=1e-5)

    def test_peak_takes_the_proposal_around_its_response(self):
        prm = torch.zeros(2, 20, 20)
        prm[0, 2:8, 2:8], prm[1, 12:18, 10:18] = 1 / 36, 1 / 48
        proposals = boxes((0, 0, 20, 20), (10, 8, 20, 20), (2, 2, 8, 8), (12, 10, 18, 18), (0, 0, 0, 0))
        maps = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(0))
        peaks = Peaks(maps, torch.tensor([[1, 0, 0], [0, 3, 3]]), prm)
        found = retrieve_instances(peaks, proposals, penalty=0.0)
        order = found.classes.argsort()
        assert torch.equal(found.masks[order], proposals[[3, 2]])
        # All of the response lies inside: balance, and what of it lies in the inner two pixels of the contour.
        assert found.scores[order].tolist() == pytest.approx([0.8 + (48 - 8) / 48, 0.8 + (36 - 4) / 36])

    def test_background_of_the_class_is_paid_for(self):
        maps = torch.zeros(1, 2, 2)
        maps[0, :, 0] = 1.0  # right half: background
        prm = boxes((5, 2, 15, 8)).float() / 60
        wide, narrow = boxes((5, 2, 15, 20), (5, 2, 15, 9))
        peaks = Peaks(maps, torch.tensor([[0, 0, 0]]), prm)
        proposals = torch.stack([wide, narrow])
        assert torch.equal(retrieve_instances(peaks, proposals, penalty=1.0).masks[0], narrow)

    def test_proposals_too_large_too_small_and_beyond_the_first_are_skipped(self):
        prm = torch.full((1, 20, 20), 1 / 400)
        peaks = Peaks(torch.zeros(1, 2, 2), torch.tensor([[0, 0, 0]]), prm)
        all_ones, empty, usable = boxes((0, 0, 20, 20), (0, 0, 0, 0), (0, 0, 5, 5))
        assert len(retrieve_instances(peaks, torch.stack([all_ones, empty])).masks) == 0
        assert torch.equal(retrieve_instances(peaks, torch.stack([all_ones, usable])).masks[0], usable)
        assert len(retrieve_instances(peaks, torch.stack([all_ones, usable]), top=1).masks) == 0
        with pytest.raises(ValueError, match=r"^retrieve_instances: expected proposals bool \(J, 20, 20\), got .* \("):
            retrieve_instances(peaks, torch.ones(1, 5, 5, dtype=torch.bool))

    def test_first_of_equal_proposals_wins(self):
        peaks = Peaks(torch.zeros(1, 2, 2), torch.tensor([[0, 0, 0]]), torch.full((1, 20, 20), 1 / 400))
        twice = boxes((0, 0, 10, 10), (0, 10, 10, 20))
        assert torch.equal(retrieve_instances(peaks, twice, penalty=0.0).masks[0], twice[0])


class TestSuppression:
    @pytest.fixture
    def found(self):
        masks = boxes((0, 0, 10, 10), (0, 0, 10, 9), (10, 10, 20, 20), (0, 0, 9, 10))
        prm = torch.rand(4, 20, 20, generator=torch.Generator().manual_seed(0))
        prm = prm / prm.sum((1, 2), keepdim=True)
        return Retrieved(masks, torch.tensor([0, 1, 0, 0]), torch.tensor([0.5, 0.9, 0.7, 0.9]), prm)

    def test_keeps_the_best_of_overlapping_objects_whatever_their_class(self, found):
        kept = suppress(found)
        assert kept.classes.tolist() == [1, 0]
        assert kept.scores.tolist() == pytest.approx([0.9, 0.7])
        assert mask_iou(kept.masks, kept.masks).fill_diagonal_(0).max() < 0.3

    def test_by_class_keeps_one_object_of_each(self, found):
        assert suppress(found, class_agnostic=False).classes.tolist() == [1, 0, 0]

    def test_merging_conserves_the_response_and_changes_nothing_passed_in(self, found):
        before = found.prm.clone()
        kept = suppress(found)
        torch.testing.assert_close(kept.prm.sum((1, 2)), torch.tensor([3.0, 1.0]))
        torch.testing.assert_close(kept.prm.sum(0), before.sum(0))
        assert torch.equal(found.prm, before)
        torch.testing.assert_close(suppress(found, merge=False).prm.sum((1, 2)), torch.ones(2))

    def test_a_second_time_changes_nothing(self, found):
        kept = suppress(found)
        for once, twice in zip(kept, suppress(kept), strict=True):
            assert torch.equal(once, twice)

    def test_of_nothing_is_nothing(self, found):
        nothing = Retrieved(*(x[:0] for x in found))
        assert [len(x) for x in suppress(nothing)] == [0] * 4


def test_semantic_labels_give_a_pixel_to_the_best_object():
    masks = boxes((0, 0, 10, 10), (5, 5, 15, 15))
    labels = semantic_labels(masks, torch.tensor([2, 0]), torch.tensor([0.9, 0.5]))
    assert labels[7, 7] == 3
    assert labels[12, 12] == 1
    assert labels[19, 19] == 0
    assert semantic_labels(masks[:0], torch.zeros(0), torch.zeros(0)).max() == 0


def test_class_points_are_the_maxima_of_the_enlarged_maps():
    maps = torch.zeros(2, 3, 3)
    maps[0, 0, 2], maps[1, 1, 1] = 1.0, 2.0
    assert class_points(maps, (9, 9)).tolist() == [[0, 7], [4, 4]]
