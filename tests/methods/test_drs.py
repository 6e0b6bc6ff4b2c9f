"""DRS: the classifier, the network that learns its maps, and the labels."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.io import save_weights
from fastcam.methods import create_method, drs, drs_refine, load_method
from fastcam.nn import create_backbone

pytest.importorskip("timm")

TINY = {"backbone": "resnet10t", "output_stride": 16, "head_channels": 16}


@pytest.fixture
def batch():
    torch.manual_seed(0)
    return {"image": torch.randn(4, 3, 64, 64), "tags": torch.eye(4, 5)}


def make(name="drs", **config):
    torch.manual_seed(0)
    return create_method(name, num_classes=5, **{**TINY, **config})


def train(method, batch, steps=10):
    ((optimizer, schedule),) = method.optimizers(total_steps=steps)
    losses = []
    for _ in range(steps):
        loss = method.training_step(batch)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


class TestClassifier:
    @pytest.mark.parametrize("controller", ["learnable", "fixed"])
    def test_loss_falls_over_ten_steps_and_reaches_every_parameter(self, controller, batch):
        method = make(controller=controller, lr=0.01)
        losses = train(method, batch)
        assert losses[-1] < 0.95 * losses[0]
        assert all(p.grad is not None for p in method.parameters())

    def test_share_of_one_is_the_plain_network(self, batch):
        method = make(controller="fixed", delta=1.0).eval()
        plain = create_backbone("resnet10t", output_stride=16).eval()
        plain.load_state_dict(method.backbone.state_dict())
        x = plain(batch["image"])[-1]
        for layer in method.head:
            x = layer(x) if isinstance(layer, nn.Conv2d) else x.relu()
        with torch.no_grad():
            torch.testing.assert_close(method.logits(batch["image"]), x)

    @pytest.mark.parametrize(("controller", "tensors"), [("learnable", [13, 13, 20, 4]), ("fixed", [13, 13, 4, 4])])
    def test_groups_of_vgg16_are_the_authors(self, controller, tensors):
        ((optimizer, _),) = create_method("drs", num_classes=20, controller=controller).optimizers(15)
        assert [len(group["params"]) for group in optimizer.param_groups] == tensors
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.001, 0.002, 0.01, 0.02])
        sizes = [sum(p.numel() for p in group["params"]) for group in optimizer.param_groups]
        assert sizes == [14710464, 4224, 9684992 if controller == "learnable" else 7088128, 1556]
        assert all(group["nesterov"] for group in optimizer.param_groups)

    def test_rate_falls_before_the_fifth_and_tenth_of_fifteen_epochs(self):
        ((optimizer, schedule),) = make().optimizers(total_steps=15)
        rates = []
        for _ in range(15):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates == pytest.approx([1e-3] * 4 + [1e-4] * 5 + [1e-5] * 6)

    def test_maps_are_resized_normalised_a_view_and_masked(self, batch):
        method = make().eval()
        image, tags = batch["image"][:1], torch.tensor([[1.0, 0, 1, 0, 0]])
        views = [image, F.interpolate(image, (48, 48))]
        with torch.no_grad():
            expected = torch.zeros(1, 5, 40, 56)
            for view in views:
                maps = F.interpolate(method.cams(view), (40, 56), mode="bilinear", align_corners=True)
                maps = maps / (maps.amax((2, 3), keepdim=True) + 1e-5) * tags[:, :, None, None]
                expected = torch.maximum(expected, maps)
            fused = method.fused_cams(views, (40, 56), tags)
            one = method.fused_cams(views[:1], (40, 56), tags)
            keys = method.fused_cams(views, (40, 56), tags, torch.tensor([0, 2]))
        assert fused.background is None
        torch.testing.assert_close(fused.maps, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(keys.maps, expected[:, [0, 2]], rtol=1e-4, atol=1e-5)
        assert (fused.maps >= one.maps).all()
        assert fused.maps[:, [1, 3, 4]].count_nonzero() == 0

    def test_sum_adds_views_and_mirror_images_before_it_normalises(self, batch):
        method = make(fusion="sum", head_std=0.01).eval()
        assert 0.005 < method.head[-1].weight.std().item() < 0.02
        image, expected = batch["image"][:1], 0
        with torch.no_grad():
            for view in (image, image[..., ::2, ::2]):
                for mirrored in (False, True):
                    maps = method.cams(view.flip(-1) if mirrored else view)
                    maps = maps.flip(-1) if mirrored else maps
                    expected = expected + F.interpolate(maps, (40, 56), mode="bilinear", align_corners=False)
            fused = method.fused_cams([image, image[..., ::2, ::2]], (40, 56)).maps
        expected = expected / (expected.amax((2, 3), keepdim=True) + 1e-5)
        torch.testing.assert_close(fused, expected, rtol=1e-4, atol=1e-5)

    def test_map_without_positive_values_is_zero(self, batch):
        method = make().eval()
        nn.init.zeros_(method.head[-1].weight)
        nn.init.constant_(method.head[-1].bias, -1.0)
        with torch.no_grad():
            assert method.fused_cams([batch["image"]], (64, 64)).maps.count_nonzero() == 0

    @pytest.mark.parametrize("tags", [torch.zeros(1, 5), torch.ones(1, 5)])
    def test_one_image_without_tags_or_with_all_trains(self, batch, tags):
        method = make()
        loss = method.training_step({"image": batch["image"][:1], "tags": tags})["loss"]
        loss.backward()
        assert loss.isfinite()
        assert all(p.grad.isfinite().all() for p in method.parameters())

    def test_one_class_trains_and_gives_maps(self, batch):
        method = create_method("drs", num_classes=1, **TINY)
        assert method.training_step({"image": batch["image"], "tags": torch.ones(4, 1)})["loss"].isfinite()
        assert method.cams(batch["image"]).shape == (4, 1, 4, 4)

    def test_autocast_gives_nearly_the_same_loss(self, batch):
        method = make()
        full = method.training_step(batch)["loss"].item()
        with torch.autocast("cpu", torch.bfloat16):
            half = method.training_step(batch)["loss"]
        half.backward()
        assert half.item() == pytest.approx(full, rel=0.02)

    def test_bad_values_are_refused(self):
        with pytest.raises(FastcamError, match="drs: controller is 'learned', expected one of learnable, fixed"):
            make(controller="learned")
        with pytest.raises(FastcamError, match=r"drs: delta is 0\.0, expected a number above 0 and at most 1"):
            make(delta=0.0)
        with pytest.raises(FastcamError, match="drs: suppressed is 0, expected at least 1"):
            make(suppressed=0)
        with pytest.raises(FastcamError, match="drs: fusion is 'mean', expected one of max, sum"):
            make(fusion="mean")
        with pytest.raises(FastcamError, match="drs: head_layers is -1"):
            make(head_layers=-1)
        with pytest.raises(FastcamError, match="has no ReLU behind a layer that learns"):
            make(frozen_stages=4)

    def test_weights_restore_the_maps_and_give_their_backbone_to_others(self, batch, tmp_path):
        method = make().eval()
        saved = {
            "method": "drs",
            "num_classes": 5,
            "backbone": "resnet10t",
            "config": dataclasses.asdict(method.config),
        }
        save_weights(tmp_path / "w.safetensors", method.export_state_dict(), saved)
        again = load_method(tmp_path / "w.safetensors")
        with torch.no_grad():
            assert torch.equal(again.cams(batch["image"]), method.cams(batch["image"]))
        assert again.config == method.config
        plain = create_method("cam", num_classes=5, backbone="resnet10t", weights=tmp_path / "w.safetensors")
        assert torch.equal(plain.backbone.net.conv1[0].weight, method.backbone.net.conv1[0].weight)


class TestRefinement:
    @pytest.fixture
    def mapped(self, batch):
        maps = torch.zeros(4, 5, 64, 64)
        maps[torch.arange(4), torch.arange(4), 16:48, 16:48] = 0.8
        return {**batch, "maps": maps, "valid": torch.ones(4, 64, 64, dtype=torch.bool)}

    def test_loss_falls_over_ten_steps(self, mapped):
        losses = train(make("drs_refine", lr=1e-3, head_layers=0, drops=(), frozen_norm=False), mapped)
        assert losses[-1] < 0.9 * losses[0]

    def test_target_keeps_winners_and_ties(self):
        maps = torch.tensor([[[0.2, 0.5, 0.0]], [[0.3, 0.5, 0.0]]])[None]
        assert drs.winner_take_all(maps).tolist() == [[[[0, 0.5, 0]], [[pytest.approx(0.3), 0.5, 0]]]]
        single = torch.rand(1, 1, 3, 3)
        assert torch.equal(drs.winner_take_all(single), single)

    def test_loss_by_hand(self):
        prediction = torch.tensor([[[[0.5, 1.0]], [[0.0, -1.0]]]])
        maps = torch.tensor([[[[1.0, 0.0]], [[0.5, 1.0]]]])  # the second class loses the first pixel
        assert drs_refine.refinement_loss(prediction, maps).item() == pytest.approx((0.25 + 1 + 0 + 4) / 4)
        valid = torch.tensor([[[True, False]]])
        assert drs_refine.refinement_loss(prediction, maps, valid).item() == pytest.approx(0.25 / 2)
        assert drs_refine.refinement_loss(prediction, maps, ~valid & False).item() == 0

    def test_maps_are_not_normalised_and_stay_in_unit_range(self, batch):
        method = make("drs_refine").eval()
        nn.init.zeros_(method.head[-1].weight)
        method.head[-1].bias.data = torch.tensor([0.25, -1.0, 3.0, 0.0, 0.5])
        with torch.no_grad():
            maps = method.fused_cams([batch["image"]], (32, 32), torch.tensor([[1.0, 1, 1, 1, 0]] * 4)).maps
            present = method.tag_logits(batch["image"]).sigmoid()
        assert maps.amax((2, 3))[0].tolist() == pytest.approx([0.25, 0, 1, 0, 0])
        assert maps.amin((2, 3))[0].tolist() == pytest.approx([0.25, 0, 1, 0, 0])
        assert present[0].tolist() == pytest.approx([0.25, 0, 1, 0, 0.5], abs=1e-5)

    def test_mean_of_views_and_mirror_images(self, batch):
        method, image = make("drs_refine", fusion="mean").eval(), batch["image"][:1]
        nn.init.constant_(method.head[-1].bias, 0.5)
        with torch.no_grad():
            maps = (method.cams(image) + method.cams(image.flip(-1)).flip(-1)) / 2
            fused = method.fused_cams([image], (4, 4)).maps
        torch.testing.assert_close(fused, maps, rtol=1e-4, atol=1e-5)

    def test_rate_falls_after_nine_and_nineteen_of_thirty_epochs(self):
        ((optimizer, schedule),) = make("drs_refine").optimizers(total_steps=30)
        rates = []
        for _ in range(30):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert rates == pytest.approx([1e-4] * 9 + [1e-5] * 10 + [1e-6] * 11)

    def test_bad_values_are_refused_and_weights_restore_the_maps(self, batch, tmp_path):
        with pytest.raises(FastcamError, match="drs_refine: fusion is 'sum', expected one of max, mean"):
            make("drs_refine", fusion="sum")
        with pytest.raises(FastcamError, match="drs_refine: head_layers is 3 and head_channels 0"):
            make("drs_refine", head_channels=0)
        method = make("drs_refine").eval()
        config = dataclasses.asdict(method.config)
        saved = {"method": "drs_refine", "num_classes": 5, "backbone": "resnet10t", "config": config}
        save_weights(tmp_path / "w.safetensors", method.export_state_dict(), saved)
        with torch.no_grad():
            again = load_method(tmp_path / "w.safetensors").cams(batch["image"])
            assert torch.equal(again, method.cams(batch["image"]))


class TestPseudoLabel:
    def test_case_by_hand(self):
        maps = torch.tensor([[0.95, 0.5, 0.1, 0.95, 0.95, 0.95], [0.0, 0.6, 0.19, 0.95, 0.95, 0.99]])[:, None]
        salient = torch.tensor([[1, 1, 1, 1, 0, 1]]) > 0
        three = torch.cat([maps, torch.tensor([[[0, 0, 0, 0, 0, 0.95]]])])
        # alone; the larger; below alpha, so unclaimed; two above 0.9; background and two above 0.9; three above 0.9
        assert drs.pseudo_label(three, salient.float()).tolist() == [[1, 2, 255, 1, 255, 255]]

    def test_image_without_maps_is_background_or_ignored(self):
        saliency = torch.tensor([[0.0, 50 / 255, 51 / 255]])
        assert drs.pseudo_label(torch.zeros(0, 1, 3), saliency).tolist() == [[0, 0, 255]]

    def test_maps_outside_the_salient_region_lose_up_to_one(self):
        maps = torch.tensor([[[0.5, 1.0, 1.1]]])
        assert drs.pseudo_label(maps, torch.zeros(1, 3)).tolist() == [[0, 0, 1]]

    def test_other_shapes_are_refused(self):
        with pytest.raises(ValueError, match=r"pseudo_label: expected maps \(n, H, W\) and saliency \(H, W\), got"):
            drs.pseudo_label(torch.zeros(1, 2, 2), torch.zeros(2, 3))


class TestOnlineLabels:
    def test_absent_classes_win_in_the_official_form_alone(self):
        logits = torch.tensor([-3.0, -1.0, -2.0, 5.0]).view(1, 4, 1, 1)
        tags = torch.tensor([[1.0, 1.0, 0.0]])
        assert drs.online_labels(logits, tags).item() == 1
        assert drs.online_labels(logits, tags, official=True).item() == 3

    def test_deeplab_adds_the_loss_of_its_own_prediction(self):
        torch.manual_seed(0)
        method = create_method(
            "deeplab", num_classes=2, backbone="resnet10t", head_channels=16, rates=(1,), dropout=0.0, online_loss=0.5
        ).eval()
        batch = {"image": torch.randn(2, 3, 32, 32), "mask": torch.randint(0, 3, (2, 32, 32)), "tags": torch.eye(2)}
        with torch.no_grad():
            logits = method.logits(batch["image"])
            own = F.cross_entropy(logits, drs.online_labels(logits, batch["tags"]))
            expected = F.cross_entropy(logits, batch["mask"]) + 0.5 * own
            torch.testing.assert_close(method.training_step(batch)["loss"], expected)
        del batch["tags"]
        with pytest.raises(FastcamError, match="deeplab: online_loss needs the images' tags"):
            method.training_step(batch)
