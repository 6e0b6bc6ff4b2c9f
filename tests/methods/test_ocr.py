"""OCR against arrays of the authors' programs, closed forms, and a parameter count of their tiny network."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.io import save_weights
from fastcam.methods import create_method, load_method
from fastcam.methods.ocr import (
    Config,
    Head,
    ObjectAttention,
    SpatialOCR,
    label_regions,
    label_relation,
    pixel_region_relation,
    region_read,
    region_vectors,
)

C = 3
TINY = {"backbone": "test_resnet", "coarse_channels": 16, "mid_channels": 16, "key_channels": 8}


def tiny(**config):
    torch.manual_seed(0)
    return create_method("ocr", num_classes=C, **{**TINY, **config})


def batch(count=4, size=64):
    """Images whose left half is dark with label 0 and whose right half is bright with label 2."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(count, size, size, dtype=torch.int64)
    mask[:, :, size // 2 :] = 2
    image = mask[:, None] - 1.0 + 0.1 * torch.randn(count, 3, size, size, generator=generator)
    return {"image": image, "mask": mask}


def arrays(golden, name, module):
    """Tensors of a golden file, its parameters loaded into the module."""
    a = {key: torch.from_numpy(value) for key, value in golden(name).items()}
    module.load_state_dict({key[2:]: value for key, value in a.items() if key.startswith("p.")})
    return a


def test_attention_with_biases_equals_the_authors_arrays(golden):
    module = SpatialOCR(8, 4, 6, dropout=0.0).eval()
    a = arrays(golden, "ocr_attention", module)
    regions = a["proxy"][..., 0].mT
    with torch.no_grad():
        torch.testing.assert_close(module(a["feats"], regions), a["out"], rtol=1e-4, atol=1e-5)
        relation = module.object_context_block.relation(a["feats"], regions)
    torch.testing.assert_close(relation.mT, a["sim_map"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_context_and_all_gradients_equal_the_authors_arrays(golden, mode):
    module = SpatialOCR(8, 4, 6, bias=False, dropout=0.0).train(mode == "train")
    a = arrays(golden, "ocr_distribute_scale1", module)
    feats, proxy = a["feats"].requires_grad_(), a["proxy"].requires_grad_()
    out = module(feats, proxy[..., 0].mT)
    torch.testing.assert_close(out, a[f"{mode}_out"], rtol=1e-4, atol=1e-5)
    out.backward(a["cotangent"])
    torch.testing.assert_close(feats.grad, a[f"{mode}_grad_feats"], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(proxy.grad, a[f"{mode}_grad_proxy"], rtol=1e-3, atol=1e-5)
    for name, p in module.named_parameters():
        torch.testing.assert_close(p.grad, a[f"{mode}_gp.{name}"], rtol=1e-3, atol=1e-5)
    if mode == "train":
        for name, buffer in module.named_buffers():
            torch.testing.assert_close(buffer, a[f"train_after.{name}"], rtol=1e-4, atol=1e-5)


def test_tiny_hrnet_has_the_parameters_and_shapes_of_the_authors_network():
    from timm.models.hrnet import HighResolutionNet

    def stage(block, *channels):
        n = len(channels)
        return {
            "num_modules": 1, "num_branches": n, "block_type": block, "num_blocks": (1,) * n, "num_channels": channels,
            "fuse_method": "SUM",
        }  # fmt: skip

    stages = (stage("BOTTLENECK", 4), stage("BASIC", 4, 6), stage("BASIC", 4, 6, 8), stage("BASIC", 4, 6, 8, 10))
    trunk = HighResolutionNet({"stem_width": 64, **{f"stage{i + 1}": s for i, s in enumerate(stages)}}, head="")
    config = Config(mid_channels=8, key_channels=4, coarse_kernel=1, coarse_channels=0, coarse_dropout=0, bias=False)
    head = Head(28, 28, 5, config)
    assert sum(p.numel() for module in (trunk, head) for p in module.parameters()) == 58_982
    with torch.no_grad():
        branches = trunk.eval()(torch.randn(1, 3, 64, 96))
        x = torch.cat([F.interpolate(y, branches[0].shape[-2:], mode="bilinear") for y in branches], dim=1)
        assert [tuple(out.shape) for out in head.eval()(x, x)] == [(1, 5, 16, 24)] * 2


@pytest.mark.parametrize(
    ("channels", "config", "millions"),
    [
        (2048, {}, 10.62),
        (720, {"bias": False}, 4.50),
        (720, {"bias": False, "mid_channels": 256, "key_channels": 128}, 1.95),
    ],
)
def test_attention_has_the_published_number_of_weights(channels, config, millions):
    head = Head(8, channels, 19, Config(**config))
    convolutions = [
        p.numel() for part in (head.conv3x3_ocr, head.ocr_distri_head) for p in part.parameters() if p.ndim == 4
    ]
    assert sum(convolutions) / 1e6 == pytest.approx(millions, abs=0.005)


def test_regions_are_convex_and_blind_to_an_offset_of_a_class():
    g = torch.Generator().manual_seed(0)
    x, a = torch.randn(2, 8, 3, 4, generator=g), torch.randn(2, 5, 3, 4, generator=g)
    regions = region_vectors(x, a)
    torch.testing.assert_close(region_vectors(x, a + torch.randn(2, 5, 1, 1, generator=g)), regions)
    assert not torch.allclose(region_vectors(x, a + torch.randn(2, 1, 3, 4, generator=g)), regions)
    torch.testing.assert_close(region_vectors(torch.full_like(x, 3.0), 100 * a), torch.full((2, 5, 8), 3.0))
    torch.testing.assert_close(region_vectors(x, a, 0.0), x.mean((2, 3))[:, None].expand(2, 5, 8))
    best = x.flatten(2).gather(2, a.flatten(2).argmax(2)[:, None].expand(2, 8, 5)).mT
    torch.testing.assert_close(region_vectors(x, a, 1e6), best)
    assert region_vectors(x, 1e3 * a).isfinite().all()


def test_regions_do_not_see_the_order_of_pixels_and_follow_that_of_classes():
    g = torch.Generator().manual_seed(0)
    x, a = torch.randn(1, 4, 2, 6, generator=g), torch.randn(1, 3, 2, 6, generator=g)
    order = torch.randperm(12, generator=g)
    moved = [t.flatten(2)[:, :, order].reshape(t.shape) for t in (x, a)]
    torch.testing.assert_close(region_vectors(*moved), region_vectors(x, a))
    torch.testing.assert_close(region_vectors(x, a[:, [2, 0, 1]]), region_vectors(x, a)[:, [2, 0, 1]])


def test_relation_sums_to_one_and_equal_keys_make_it_uniform():
    query, keys = torch.randn(2, 8, 7), torch.randn(2, 8, 5)
    relation = pixel_region_relation(query, keys)
    torch.testing.assert_close(relation.sum(1), torch.ones(2, 7))
    expected = (torch.einsum("bdn,bdk->bkn", query, keys) / 8**0.5).exp()
    torch.testing.assert_close(relation, expected / expected.sum(1, keepdim=True))
    torch.testing.assert_close(pixel_region_relation(query, keys[..., :1].expand(2, 8, 5)), torch.full((2, 5, 7), 0.2))


def test_one_region_gives_one_context_and_no_gradient_to_queries():
    query = torch.randn(1, 4, 6, requires_grad=True)
    relation = pixel_region_relation(query, torch.randn(1, 4, 1))
    out = region_read(relation, torch.randn(1, 4, 1), torch.randn(3, 4))
    out.sum().backward()
    torch.testing.assert_close(out, out[..., :1].expand(1, 3, 6))
    assert not query.grad.any()


@pytest.mark.parametrize("regions", [2, 40])  # the first is read through a table, the second directly
def test_both_orders_of_reading_agree_in_value_and_gradient(regions):
    g = torch.Generator().manual_seed(0)
    shapes = (2, regions, 50), (2, 8, regions), (16, 8), (16,)
    logits, values, weight, bias = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    actual = region_read(logits.softmax(1), values, weight, bias)
    expected = torch.einsum("cd,bdk,bkn->bcn", weight, values, logits.softmax(1)) + bias[:, None]
    torch.testing.assert_close(actual, expected)
    cotangent = torch.randn(actual.shape, generator=g, dtype=torch.float64)
    inputs = logits, values, weight, bias
    torch.testing.assert_close(
        torch.autograd.grad(actual, inputs, cotangent), torch.autograd.grad(expected, inputs, cotangent)
    )


def test_attention_gradients_agree_with_finite_differences():
    torch.manual_seed(0)
    x, a = torch.randn(2, 8, 3, 4, dtype=torch.float64), torch.randn(2, 5, 3, 4, dtype=torch.float64)
    keys = torch.randn(8, 8, dtype=torch.float64)

    def attend(x, a, keys):
        regions = region_vectors(x, a).mT
        return region_read(pixel_region_relation(x.flatten(2), keys @ regions), regions, keys)

    assert torch.autograd.gradcheck(attend, [t.requires_grad_() for t in (x, a, keys)])


def test_true_regions_are_label_means_and_absent_ones_zero():
    x = torch.arange(8.0).reshape(1, 2, 1, 4).requires_grad_()
    labels = torch.tensor([[[0, 2, 2, 255]]])
    regions = label_regions(x, labels, 3)
    assert regions[0].tolist() == [[0.0, 4.0], [0.0, 0.0], [1.5, 5.5], [3.0, 7.0]]
    (grad,) = torch.autograd.grad(regions[0, 1].sum(), x)
    assert not grad.any()
    own, others = label_relation(labels, 3)[0], label_relation(labels, 3, background=True)[0]
    assert own.argmax(0).tolist() == [0, 2, 2, 3]
    assert own.sum(0).tolist() == [1.0] * 4
    torch.testing.assert_close(others, (1 - own) / 3)
    torch.testing.assert_close(region_read(own[None], regions.mT, torch.eye(2))[0, :, 1], regions[0, 2])


def test_true_labels_take_the_place_of_soft_regions():
    method = tiny().eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        coarse, soft = method.scores(x)
        same, ideal = method.scores(x, torch.zeros(1, *coarse.shape[-2:], dtype=torch.int64))
    torch.testing.assert_close(same, coarse)
    assert not torch.allclose(ideal, soft)


def test_pooled_queries_read_the_same_regions_at_half_the_size():
    torch.manual_seed(0)
    module = ObjectAttention(6, 4, scale=2).eval()
    x, regions = torch.randn(1, 6, 4, 6), torch.randn(1, 3, 6)
    half = ObjectAttention(6, 4).eval()
    half.load_state_dict(module.state_dict())
    with torch.no_grad():
        expected = half(F.max_pool2d(x, 2), regions)
        expected = F.interpolate(expected, (4, 6), mode="bilinear", align_corners=True)
        torch.testing.assert_close(module(x, regions), expected)


@pytest.mark.parametrize("config", [{}, {"output_stride": 16}, {"rates": (2, 4)}, {"features": "all"}])
@pytest.mark.parametrize("size", [(33, 47), (64, 32)])
def test_logits_have_the_size_of_the_image(config, size):
    method = tiny(**config).eval()
    with torch.no_grad():
        assert method.logits(torch.randn(2, 3, *size)).shape == (2, C + 1, *size)


def test_hrnet_trunk_gives_its_branches_and_takes_images_of_any_size():
    hrnet = {"backbone": "hrnet_w18_small", "output_stride": 32, "features": "all", "coarse_channels": 0}
    method = tiny(**hrnet, coarse_kernel=1).eval()
    assert method.backbone.channels == [16, 32, 64, 128]
    assert method.backbone.strides == [4, 8, 16, 32]
    data = {"image": torch.randn(1, 3, 50, 70), "mask": torch.zeros(1, 50, 70, dtype=torch.int64)}
    with torch.no_grad():
        assert method.scores(torch.randn(1, 3, 64, 96))[1].shape == (1, C + 1, 16, 24)
        assert method.logits(data["image"]).shape == (1, C + 1, 50, 70)
        assert method.training_step(data)["loss"].isfinite()


def test_corner_pixels_have_the_corner_logits():
    method = tiny().eval()
    x = torch.randn(1, 3, 64, 48)
    with torch.no_grad():
        small, large = method.scores(x)[1], method.logits(x)
    torch.testing.assert_close(large[..., [0, 0, -1, -1], [0, -1, 0, -1]], small[..., [0, 0, -1, -1], [0, -1, 0, -1]])


def test_loss_is_the_cross_entropy_of_both_outputs():
    method, data = tiny(aux_weight=0.4).eval(), batch(2)
    data["mask"][:, :10] = 255
    scalars = method.training_step(data)
    coarse, final = [
        F.cross_entropy(F.interpolate(s, (64, 64), mode="bilinear", align_corners=True), data["mask"], ignore_index=255)
        for s in method.scores(data["image"])
    ]
    torch.testing.assert_close(scalars["loss"], final + 0.4 * coarse)
    torch.testing.assert_close(scalars["aux_loss"], coarse.detach())


def test_coarse_head_learns_through_the_regions_without_a_loss_of_its_own():
    method = tiny(aux_weight=0.0)
    method.training_step(batch(2))["loss"].backward()
    grad = method.head.aux_head[-1].bias.grad
    assert torch.allclose(grad, torch.zeros_like(grad), atol=1e-6)  # an offset of a class changes no region
    assert method.head.aux_head[-1].weight.grad.abs().sum() > 0


def test_a_batch_without_any_label_gives_zero_loss_and_zero_gradient():
    method = tiny()
    scalars = method.training_step({"image": torch.randn(2, 3, 64, 64), "mask": torch.full((2, 64, 64), 255)})
    scalars["loss"].backward()
    assert scalars["loss"] == 0
    assert all(p.grad is None or not p.grad.any() for p in method.parameters())


def test_logits_are_float32_under_autocast():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert tiny().eval().logits(torch.randn(1, 3, 64, 64)).dtype == torch.float32


@pytest.mark.parametrize("loss", ["ce", "ohem", "lal"])
def test_loss_falls_over_ten_steps(loss):
    method, data = tiny(lr=0.05, loss=loss), batch()
    (optimizer, scheduler), *others = method.optimizers(10)
    assert not others
    losses = []
    for _ in range(10):
        loss = method.training_step(data)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


def test_one_image_and_one_class_can_be_trained():
    torch.manual_seed(0)
    method = create_method("ocr", num_classes=1, **TINY)
    data = batch(1)
    method.training_step({"image": data["image"], "mask": data["mask"] // 2})["loss"].backward()
    assert method.head.cls_head.weight.grad.abs().sum() > 0


def test_learning_rate_is_poly_and_the_head_is_faster():
    (optimizer, scheduler), *_ = tiny(lr=0.01, head_lr_factor=10.0).optimizers(4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.1])
    rates = []
    for _ in range(4):
        optimizer.step()
        scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([0.01 * (1 - i / 4) ** 0.9 for i in (1, 2, 3, 4)])


def test_saved_weights_load_into_the_same_network(tmp_path):
    method = tiny(loss="lal", rates=(2,)).eval()
    record = {"method": "ocr", "num_classes": C, "classes": ["a", "b", "c"], "backbone": TINY["backbone"]}
    save_weights(
        tmp_path / "w.safetensors", method.export_state_dict(), {**record, "config": dataclasses.asdict(method.config)}
    )
    loaded = load_method(tmp_path / "w.safetensors")
    x = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert loaded.kind == "segmenter"
        assert loaded.config == method.config
        torch.testing.assert_close(loaded.logits(x), method.logits(x), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"class_weights": (1.0, 2.0)}, "class_weights has 2 numbers, expected 4"),
        ({"features": "first"}, "features is 'first', expected last or all"),
        ({"output_stride": 32}, "have strides 16 and 32, expected the same; choose output_stride 8 or 16"),
        ({"attention_scale": 0}, "attention_scale is 0, expected at least 1"),
        ({"coarse_kernel": 2}, "coarse_kernel is 2, expected an odd number"),
        ({"aux_wait": 0.4}, "unknown setting 'aux_wait', did you mean 'aux_weight'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, message):
    with pytest.raises(FastcamError, match=message):
        tiny(**config)
