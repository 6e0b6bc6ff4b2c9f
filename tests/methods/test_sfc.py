"""SFC against the authors' arrays, its published table, and the properties of its formulas."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.io import load_weights, save_weights
from fastcam.methods import create_method, list_methods, load_method, sfc
from fastcam.nn import ImageBank, max_normalize
from fastcam.nn.cam import FusedCams

pytest.importorskip("timm")

CLOSE = {"rtol": 1e-4, "atol": 1e-5}

# Tags in the list of the IRN and SEAM family, 10,582 images, and the coefficients that SFC's code holds as literals.
VOC_COUNTS = [590, 504, 705, 468, 714, 393, 1150, 1005, 1228, 267, 613, 1188, 445, 492, 4155, 522, 300, 649, 503, 567]
VOC_COEFFICIENTS = [
    0.8065, 0.9025, 0.7726, 0.9809, 0.7732, 1.2084, 0.8725, 0.8318, 0.9068, 1.7694,
    0.7929, 0.8870, 1.0424, 0.9259, 1.5451, 0.8765, 1.5955, 0.7801, 0.9042, 0.8257,
]  # fmt: skip


@pytest.fixture
def method():
    torch.manual_seed(0)
    return create_method("sfc", num_classes=5, backbone="mobilenetv2_035", correlation_channels=16, lr=0.01)


@pytest.fixture
def batch():
    torch.manual_seed(1)
    tags = torch.tensor([[1.0, 0, 0, 1, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    valid = torch.ones(4, 64, 64, dtype=torch.bool)
    valid[0, :, 40:] = False
    return {"image": torch.randn(4, 3, 64, 64), "tags": tags, "valid": valid}


class TestGolden:
    def test_prototypes_and_their_maps(self, golden):
        arrays = {k: torch.from_numpy(np.asarray(v)) for k, v in golden("sfc_prototype").items()}
        features = arrays["feat"].requires_grad_()
        maps = arrays["norm_cam"].requires_grad_()
        seeds = sfc.prototype_seeds(maps, arrays["valid_mask"], float(arrays["bg_scale"]))
        torch.testing.assert_close(sfc.class_prototypes(features, seeds), arrays["prototype"], **CLOSE)
        out = sfc.prototype_cams(features, maps, arrays["valid_mask"], float(arrays["bg_scale"]))
        out.backward(arrays["grad_out"])
        torch.testing.assert_close(out, arrays["out"], **CLOSE)
        torch.testing.assert_close(features.grad, arrays["grad_feat"], **CLOSE)
        assert maps.grad is None

    def test_all_heads_and_their_gradients(self, golden, method):
        arrays = {k: torch.from_numpy(np.asarray(v)) for k, v in golden("sfc_heads_train").items()}

        def conv(weight):
            layer = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=False)
            layer.weight = nn.Parameter(weight.clone())
            return layer

        method.sides = nn.ModuleList(conv(arrays[f"side{i}"]) for i in (1, 2, 3, 4))
        method.classifier, method.correlation = conv(arrays["classifier"]), conv(arrays["f9"])
        stages = [arrays[f"x{i}"].requires_grad_() for i in (1, 2, 3, 4)]
        score, cam1, cam2, original = method.heads(arrays["image"], stages, arrays["valid_mask"])
        torch.testing.assert_close(score, arrays["score"][:, :, 0, 0], **CLOSE)
        for out, name in ((cam1, "cam1"), (cam2, "cam2"), (original, "original_cam")):
            torch.testing.assert_close(out, arrays[name], **CLOSE)
        loss = (score * arrays["g_score"][:, :, 0, 0]).sum() + (cam1 * arrays["g_cam1"] + cam2 * arrays["g_cam2"]).sum()
        loss.backward()
        layers = {**{f"side{i + 1}": side for i, side in enumerate(method.sides)}}
        layers |= {"classifier": method.classifier, "f9": method.correlation}
        for name, layer in layers.items():
            torch.testing.assert_close(layer.weight.grad, arrays[f"grad_{name}"], **CLOSE)
        torch.testing.assert_close(stages[3].grad, arrays["grad_x4"], **CLOSE)
        assert [x.grad for x in stages[:3]] == [None, None, None]

    def test_losses_and_their_gradients(self, golden):
        arrays = {k: torch.from_numpy(np.asarray(v)) for k, v in golden("sfc_msdw").items()}
        weight = sfc.distribution_coefficient(torch.tensor(VOC_COUNTS), extra=396)
        torch.testing.assert_close(weight, arrays["dc_by_class"], **CLOSE)
        names = ("score1", "score2", "cam1_full", "proto_full", "cam1_half")
        score1, score2, cam, proto, half = inputs = [arrays[name].requires_grad_() for name in names]
        tags = arrays["label20"]
        loss_cls = sum(F.multilabel_soft_margin_loss(s[:, :, 0, 0], tags) for s in (score1, score2)) / 2
        loss_p = 1.6 * sfc.prototype_weight_loss(cam, proto, weight)
        loss_w = 0.8 * sfc.scale_weight_loss(cam, half, tags, weight)
        loss = loss_cls + loss_p + loss_w
        loss.backward()
        expected = ("loss_cls", "loss_p", "loss_w", "loss_total")
        for value, name in zip((loss_cls, loss_p, loss_w, loss), expected, strict=True):
            torch.testing.assert_close(value, arrays[name], **CLOSE)
        for x, name in zip(inputs, names, strict=True):
            torch.testing.assert_close(x.grad, arrays[f"grad_{name}"], rtol=1e-4, atol=1e-7)


class TestDistributionCoefficient:
    def test_voc_table_to_four_decimals(self):
        for extra in (396, None):
            coefficient = sfc.distribution_coefficient(torch.tensor(VOC_COUNTS), extra)
            assert [round(x, 4) for x in coefficient.tolist()] == VOC_COEFFICIENTS

    def test_mean_one_scale_free_and_permutation_equivariant(self):
        counts = torch.tensor([5.0, 80.0, 13.0, 400.0])
        coefficient = sfc.distribution_coefficient(counts, extra=10)
        assert coefficient.mean().item() == pytest.approx(1)
        torch.testing.assert_close(sfc.distribution_coefficient(7 * counts, extra=70), coefficient)
        order = torch.tensor([2, 0, 3, 1])
        torch.testing.assert_close(sfc.distribution_coefficient(counts[order], extra=10), coefficient[order])

    def test_long_tail_weighs_both_ends_most(self):
        coefficient = sfc.distribution_coefficient(torch.tensor([int(4000 * 0.7**k) for k in range(10)]), extra=300)
        middle = coefficient.argmin().item()
        assert 2 <= middle <= 7
        assert (coefficient[: middle + 1].diff() < 0).all()
        assert (coefficient[middle:].diff() > 0).all()

    def test_equal_counts_give_one_and_absent_classes_stay_finite(self):
        assert sfc.distribution_coefficient(torch.tensor([9, 9, 9])).tolist() == [1, 1, 1]
        assert sfc.distribution_coefficient(torch.tensor([0, 0])).tolist() == [1, 1]
        assert sfc.distribution_coefficient(torch.tensor([0, 5, 10]), extra=5).isfinite().all()
        # Demands 10 and 15 of the two others over 5 and 10 images: ratios 2 and 1.5.
        coefficient = sfc.distribution_coefficient(torch.tensor([0, 5, 10]), extra=0)
        assert coefficient.tolist() == pytest.approx([0, 8 / 7, 6 / 7])

    def test_negative_counts_are_refused(self):
        with pytest.raises(ValueError, match="distribution_coefficient: expected counts"):
            sfc.distribution_coefficient(torch.tensor([-1, 2]))


class TestPrototypes:
    def test_seeds_are_one_hot_inside_valid_pixels_and_carry_no_gradient(self):
        torch.manual_seed(0)
        maps = torch.rand(2, 4, 5, 6, requires_grad=True)
        valid = torch.ones(2, 4, 5, 6)
        valid[..., 4:] = 0
        seeds = sfc.prototype_seeds(maps, valid)
        assert not seeds.requires_grad
        assert (seeds[..., :4].sum(dim=1) == 1).all()
        assert seeds[..., 4:].count_nonzero() == 0

    def test_background_scale_decides_by_hand(self):
        maps = torch.tensor([1.0, 0.4]).view(1, 2, 1, 1)
        valid = torch.ones_like(maps)
        assert sfc.prototype_seeds(maps, valid, 0.3).flatten().tolist() == [0, 1]
        assert sfc.prototype_seeds(maps, valid, 0.5).flatten().tolist() == [1, 0]

    def test_scale_of_features_does_not_matter_and_maps_lie_in_unit_range(self):
        torch.manual_seed(0)
        features, maps, valid = torch.randn(1, 6, 4, 4), torch.rand(1, 3, 4, 4), torch.ones(1, 3, 4, 4)
        out = sfc.prototype_cams(features, maps, valid)
        torch.testing.assert_close(sfc.prototype_cams(7 * features, maps, valid), out, **CLOSE)
        assert out.min() >= 0
        assert out.max() <= 1 + 1e-5

    def test_class_without_seeds_gives_zero_and_background_the_mean_of_valid_pixels(self):
        torch.manual_seed(0)
        features, maps = torch.randn(1, 6, 4, 4), torch.zeros(1, 3, 4, 4)
        maps[:, 0] = 1
        valid = torch.zeros(1, 3, 4, 4)
        valid[:, 0, :, :3] = 1  # an image without tags, padded on the right
        out = sfc.prototype_cams(features, maps, valid)
        assert out[:, 1:].count_nonzero() == 0
        mean = features[..., :3].mean(dim=(2, 3))
        expected = F.cosine_similarity(features, mean[:, :, None, None], dim=1).relu()
        torch.testing.assert_close(out[:, 0], expected, **CLOSE)

    def test_crop_of_padding_only_gives_zero(self):
        valid = torch.zeros(1, 3, 4, 4)
        assert sfc.prototype_cams(torch.randn(1, 6, 4, 4), torch.rand(1, 3, 4, 4), valid).count_nonzero() == 0


class TestLosses:
    def test_gradient_of_prototype_loss_is_its_constant(self):
        torch.manual_seed(0)
        maps, proto = torch.rand(2, 4, 3, 3, requires_grad=True), torch.rand(2, 4, 3, 3)
        weight = torch.tensor([0.5, 1.0, 1.5])
        (1.6 * sfc.prototype_weight_loss(maps, proto, weight)).backward()
        expected = 1.6 * torch.tensor([1.0, 0.5, 1.0, 1.5])[:, None, None] / maps.numel()
        sign = torch.sign(maps.detach() - max_normalize(proto))
        torch.testing.assert_close(maps.grad, expected * sign)

    def test_scale_loss_sees_tagged_classes_and_no_background(self):
        torch.manual_seed(0)
        maps, half = torch.rand(1, 3, 8, 8, requires_grad=True), torch.rand(1, 3, 4, 4, requires_grad=True)
        sfc.scale_weight_loss(maps, half, torch.tensor([[1.0, 0.0]]), torch.ones(2)).backward()
        for x in (maps, half):
            assert x.grad[:, 1].abs().sum() > 0
            assert x.grad[:, [0, 2]].count_nonzero() == 0

    def test_halving_keeps_the_corners(self):
        x = torch.rand(1, 2, 8, 6)
        assert torch.equal(sfc.halve(x)[..., [0, 0, -1, -1], [0, -1, 0, -1]], x[..., [0, 0, -1, -1], [0, -1, 0, -1]])


class TestImageBank:
    def test_slot_keeps_the_last_image_of_its_class_in_shuffled_order(self):
        tags = torch.tensor([[1.0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 0, 0]])
        images = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 2, 2)
        torch.manual_seed(3)
        order = [i for i in torch.randperm(4).tolist() if i != 3]
        torch.manual_seed(3)
        bank = ImageBank(3, draws=4)
        out, valid, labels = bank(images, torch.ones(4, 2, 2, dtype=torch.bool), tags)
        assert sorted(bank.slots) == [0, 2]
        assert bank.slots[0][0].unique().tolist() == [order[-1]]
        assert bank.slots[2][2].tolist() == [1, 0, 1]
        assert out.shape == (8, 3, 2, 2)
        assert valid.shape == (8, 2, 2)
        assert (labels[4:].sum(dim=1) > 0).all()
        torch.testing.assert_close(labels[4:], tags[out[4:, 0, 0, 0].long()])

    def test_rare_class_of_an_earlier_batch_is_drawn_again(self):
        bank, valid = ImageBank(2, draws=16), torch.ones(1, 2, 2, dtype=torch.bool)
        bank(torch.full((1, 3, 2, 2), 5.0), valid, torch.tensor([[0.0, 1.0]]))
        images, _, tags = bank(torch.zeros(1, 3, 2, 2), valid, torch.tensor([[1.0, 0.0]]))
        assert {1.0, 0.0} == set(tags[1:, 1].tolist())
        assert (images[tags[:, 1] == 1] == 5).all()

    def test_empty_slots_are_drawn_only_in_the_official_way(self):
        arguments = torch.ones(1, 3, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool), torch.eye(8)[:1]
        torch.manual_seed(0)
        assert (ImageBank(8, draws=32)(*arguments)[2][:, 0] == 1).all()
        images, valid, tags = ImageBank(8, draws=32, draw_empty=True)(*arguments)
        black = tags.sum(dim=1) == 0
        assert black.any()
        assert images[black].count_nonzero() == 0
        assert not valid[black].any()

    def test_untagged_batch_into_an_empty_bank_passes_through(self):
        images, _, _ = ImageBank(2, draws=4)(
            torch.ones(3, 3, 2, 2), torch.ones(3, 2, 2, dtype=torch.bool), torch.zeros(3, 2)
        )
        assert len(images) == 3


class TestTraining:
    def test_loss_falls_over_ten_steps(self, method, batch):
        method.set_tag_counts(torch.tensor([10, 20, 5, 40, 8]))
        ((optimizer, schedule),) = method.optimizers(total_steps=10)
        losses = []
        for _ in range(10):
            out = method.training_step(batch)
            optimizer.zero_grad()
            out["loss"].backward()
            nn.utils.clip_grad_norm_(method.parameters(), method.config.grad_clip)
            optimizer.step()
            schedule.step()
            losses.append(out["loss"].item())
        assert np.isfinite(losses).all()
        assert losses[-1] < 0.8 * losses[0]

    def test_step_is_the_sum_of_its_parts_and_reaches_all_heads(self, method, batch):
        out = method.training_step(batch)
        assert next(iter(out)) == "loss"
        assert out["loss"].item() == pytest.approx(sum(v.item() for k, v in out.items() if k != "loss"))
        out["loss"].backward()
        without = [name for name, p in method.named_parameters() if p.requires_grad and p.grad is None]
        assert without == []

    def test_losses_on_maps_grow_over_the_warmup(self, batch):
        method = create_method(
            "sfc", num_classes=5, backbone="resnet10t", correlation_channels=8, bank_draws=0, warmup=0.5
        )
        method.optimizers(total_steps=8)
        steps = [method.training_step(batch) for _ in range(7)]
        for name in ("loss_proto", "loss_weight"):
            full = steps[-1][name].item()
            assert full > 0
            growing = [0, full / 4, full / 2, full * 3 / 4, full, full, full]
            assert [step[name].item() for step in steps] == pytest.approx(growing, rel=1e-5)
        assert len({step["loss_cls"].item() for step in steps}) == 1
        assert "step" not in method.export_state_dict()

    def test_absent_classes_give_zero_maps_and_no_gradient_through_the_foreground(self, method, batch):
        tags = torch.tensor([[1.0, 0, 0, 1, 0]]).expand(4, 5)
        stages = method.backbone(batch["image"])
        valid = sfc.with_background_tag(tags)[:, :, None, None].expand(4, 6, *stages[2].shape[2:])
        _, weight_cams, proto_cams, _ = method.heads(batch["image"], stages, valid)
        absent = [2, 3, 5]
        assert weight_cams[:, absent].count_nonzero() == 0
        assert proto_cams[:, absent].count_nonzero() == 0
        (weight_cams[:, 1:].sum() + proto_cams[:, 1:].sum()).backward()
        assert method.classifier.weight.grad[[1, 2, 4]].count_nonzero() == 0
        assert method.classifier.weight.grad[[0, 3]].count_nonzero() > 0

    @pytest.mark.parametrize("tags", [torch.zeros(4, 5), torch.ones(4, 5)])
    def test_no_class_and_every_class_train(self, method, batch, tags):
        out = method.training_step({**batch, "tags": tags})
        out["loss"].backward()
        assert out["loss"].isfinite()
        assert all(p.grad.isfinite().all() for p in method.parameters() if p.grad is not None)

    def test_crops_of_padding_only_train(self, method, batch):
        out = method.training_step({**batch, "valid": torch.zeros_like(batch["valid"])})
        out["loss"].backward()
        assert out["loss_weight"].item() == 0
        assert out["loss"].isfinite()

    def test_half_precision_autocast_gives_nearly_the_same_loss(self, method, batch):
        torch.manual_seed(5)
        full = method.training_step(batch)["loss"].item()
        method.bank.slots.clear()
        torch.manual_seed(5)
        with torch.autocast("cpu", torch.bfloat16):
            half = method.training_step(batch)["loss"]
        assert half.dtype == torch.float32
        assert half.item() == pytest.approx(full, rel=0.05)

    def test_optimizer_gives_heads_ten_times_the_rate_and_decays_it_by_poly(self, method):
        ((optimizer, schedule),) = method.optimizers(total_steps=4)
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.1])
        assert all(p.requires_grad for group in optimizer.param_groups for p in group["params"])
        for _ in range(3):
            optimizer.step()
            schedule.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.25**0.9)


class TestInference:
    def test_background_rule_is_the_authors(self, method):
        torch.manual_seed(0)
        image, tags = torch.randn(1, 3, 64, 48), torch.tensor([[1.0, 0, 1, 0, 0]])
        views = [image, F.interpolate(image, (32, 24), mode="bilinear")]
        method.eval()
        with torch.no_grad():
            fused = method.fused_cams(views, (64, 48), tags)
            families = []
            for maps in zip(*(method.view_cams(view, tags) for view in views), strict=True):
                total = sum(F.interpolate(m, (64, 48), mode="bilinear", align_corners=False) for m in maps)
                families.append(
                    (total / (total.amax(dim=(2, 3), keepdim=True) + 1e-5))
                    * torch.tensor([1.0, 1, 0, 1, 0, 0]).view(1, 6, 1, 1)
                )
        # Doubled foreground and 0.4 more background in each family, then M_W + 0.7 M_P.
        official = sum(
            weight * torch.cat([maps[:, :1] + 0.4, 2 * maps[:, 1:]], dim=1)
            for weight, maps in zip((1.0, 0.7), families, strict=True)
        )
        ours = torch.cat([fused.background[:, None], fused.maps], dim=1)
        torch.testing.assert_close(ours * 2 * 1.7, official, **CLOSE)

    @pytest.mark.parametrize("family", ["classifier", "prototype", "both"])
    def test_maps_of_every_family_are_masked_and_in_unit_range(self, family):
        torch.manual_seed(0)
        method = create_method("sfc", num_classes=3, backbone="resnet10t", correlation_channels=8, family=family).eval()
        tags = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 0.0]])
        with torch.no_grad():
            fused = method.fused_cams([torch.randn(2, 3, 48, 64)], (48, 64), tags)
            single = method.cams(torch.randn(2, 3, 48, 64), tags)
        assert isinstance(fused, FusedCams)
        assert fused.maps.shape == (2, 3, 48, 64)
        assert fused.background.shape == (2, 48, 64)
        assert single.shape == (2, 3, 3, 4)
        for maps in (fused.maps, single):
            assert maps[tags == 0].count_nonzero() == 0
            assert family == "prototype" or maps[tags == 1].max() > 0  # random maps may win no seed
            assert maps.min() >= 0
        assert fused.maps.max() <= 1

    def test_mirrored_image_gives_mirrored_maps(self, method):
        torch.manual_seed(0)
        image = torch.randn(1, 3, 64, 64)
        method.eval()
        with torch.no_grad():
            maps = method.fused_cams([image], (64, 64)).maps
            mirrored = method.fused_cams([image.flip(-1)], (64, 64)).maps
        torch.testing.assert_close(mirrored.flip(-1), maps, rtol=1e-3, atol=1e-4)

    def test_no_view_is_refused(self, method):
        with pytest.raises(ValueError, match=r"sfc\.fused_cams: expected at least one view"):
            method.fused_cams([], (8, 8))


class TestStorage:
    def test_weights_restore_the_maps_and_leave_the_bank_out(self, method, batch, tmp_path):
        method.training_step(batch)
        method.set_tag_counts(torch.tensor([1, 2, 3, 4, 50]))
        method.eval()
        config = dict(method.config.__dict__)
        saved = {"method": "sfc", "num_classes": 5, "backbone": config["backbone"], "config": config}
        save_weights(tmp_path / "w.safetensors", method.export_state_dict(), saved)
        assert not any(key.startswith("bank") for key in load_weights(tmp_path / "w.safetensors")[0])
        again = load_method(tmp_path / "w.safetensors")
        assert again.config == method.config
        with torch.no_grad():
            expected = method.fused_cams([batch["image"]], (64, 64), batch["tags"])
            result = again.fused_cams([batch["image"]], (64, 64), batch["tags"])
        assert torch.equal(result.maps, expected.maps)
        assert torch.equal(again.class_weight, method.class_weight)

    def test_checkpoint_resumes_bit_by_bit_with_the_bank(self, method, batch, tmp_path):
        method.training_step(batch)
        torch.save(method.state_dict(), tmp_path / "last.ckpt")
        torch.manual_seed(9)
        expected = method.training_step(batch)["loss"]
        torch.manual_seed(1)
        again = create_method("sfc", num_classes=5, backbone="mobilenetv2_035", correlation_channels=16, lr=0.01)
        again.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True))
        torch.manual_seed(9)
        assert torch.equal(again.training_step(batch)["loss"], expected)

    def test_weights_of_another_network_are_refused(self, method, tmp_path):
        config = {**method.config.__dict__, "backbone": "resnet10t"}
        saved = {"method": "sfc", "num_classes": 5, "backbone": "resnet10t", "config": config}
        save_weights(tmp_path / "w.safetensors", method.export_state_dict(), saved)
        with pytest.raises(FastcamError, match="do not fit method 'sfc'"):
            load_method(tmp_path / "w.safetensors")
        save_weights(tmp_path / "plain.safetensors", {"x": torch.zeros(1)}, {})
        with pytest.raises(FastcamError, match="hold no method"):
            load_method(tmp_path / "plain.safetensors")


class TestFactory:
    def test_unknown_names_are_refused_with_the_nearest(self):
        assert {"cam", "sfc"} <= set(list_methods())
        with pytest.raises(FastcamError, match="method 'sfcc': unknown, did you mean 'sfc'"):
            create_method("sfcc", num_classes=2)
        with pytest.raises(FastcamError, match="unknown setting 'bank_draw', did you mean 'bank_draws'"):
            create_method("sfc", num_classes=2, bank_draw=3)
        with pytest.raises(FastcamError, match="num_classes is 0"):
            create_method("sfc", num_classes=0)

    def test_values_that_sfc_cannot_use_are_refused(self):
        with pytest.raises(FastcamError, match="family is 'all', expected one of classifier, prototype, both"):
            create_method("sfc", num_classes=2, family="all")
        with pytest.raises(FastcamError, match="side_channels has 2 numbers, expected 4"):
            create_method("sfc", num_classes=2, side_channels=[8, 8])

    def test_counts_of_another_number_of_classes_are_refused(self, method):
        with pytest.raises(ValueError, match=r"sfc\.set_tag_counts: expected 5 counts, got 2"):
            method.set_tag_counts(torch.tensor([1, 2]))


def test_centered_features_ignore_what_all_pixels_share(batch):
    torch.manual_seed(0)
    method = create_method("sfc", num_classes=5, backbone="resnet10t", correlation_channels=8, center_features=True)
    stages = [
        torch.randn(4, c, 64 // s, 64 // s) for c, s in zip(method.backbone.channels, (4, 8, 16, 16), strict=True)
    ]
    shifted = [x + torch.randn(1, x.shape[1], 1, 1) for x in stages]
    with torch.no_grad():
        for a, b in (
            (method.hierarchical_features(stages), method.hierarchical_features(shifted)),
            tuple(method.correlation_features(batch["image"], x[3], (4, 4)) for x in (stages, shifted)),
        ):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
