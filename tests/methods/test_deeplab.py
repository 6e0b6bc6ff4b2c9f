"""DeepLab against torchvision's pyramid, torch's cross-entropy and numbers worked by hand."""

import pytest
import torch
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.io import save_weights
from fastcam.methods import create_method, load_method
from fastcam.methods.deeplab import PyramidPooling

C = 3
TINY = {"backbone": "test_resnet", "head_channels": 16, "low_level_channels": 8, "rates": (2, 4), "frozen_norm": False}


def tiny(**config):
    torch.manual_seed(0)
    return create_method("deeplab", num_classes=C, **{**TINY, **config})


def batch(count=4, size=32):
    """Images whose left half is dark with label 0 and whose right half is bright with label 2."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.zeros(count, size, size, dtype=torch.int64)
    mask[:, :, size // 2 :] = 2
    image = mask[:, None] - 1.0 + 0.1 * torch.randn(count, 3, size, size, generator=generator)
    return {"image": image, "mask": mask}


def test_pyramid_is_torchvisions_with_the_norm_of_the_mean_folded_into_its_bias():
    from torchvision.models.segmentation.deeplabv3 import ASPP

    torch.manual_seed(0)
    theirs = ASPP(8, [6, 12], out_channels=5)
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for tensor in (module.running_mean, module.weight.data, module.bias.data):
                tensor.normal_()
            module.running_var.uniform_(0.5, 2)
    theirs.eval()
    ours = PyramidPooling(8, 5, (6, 12), image_pooling=True, separable=False).eval()
    for branch, other in zip(ours.branches, list(theirs.convs)[:-1], strict=True):
        branch.load_state_dict(other.state_dict())
    _, conv, norm, _ = theirs.convs[-1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    ours.pool[1].weight.data = conv.weight * scale[:, None, None, None]
    ours.pool[1].bias.data = norm.bias - norm.running_mean * scale
    ours.project.load_state_dict({k: v for k, v in theirs.project.state_dict().items() if k[0] in "012"})
    x = torch.randn(2, 8, 15, 11)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_separable_convolution_equals_the_full_one_of_its_factors():
    from fastcam.methods.deeplab import conv3x3

    torch.manual_seed(0)
    separable = conv3x3(4, 6, dilation=2).eval()
    depthwise, pointwise = separable[0], separable[3]
    x = torch.rand(1, 4, 9, 9)
    depthwise.weight.data.abs_()  # so that the ReLU between the two changes nothing
    full = pointwise.weight * depthwise.weight[:, 0][None] / (1 + 1e-5) ** 0.5
    expected = F.relu(F.conv2d(x, full, padding=2, dilation=2) / (1 + 1e-5) ** 0.5)
    torch.testing.assert_close(separable(x), expected)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"low_level_channels": 0},
        {"image_pooling": False},
        {"separable": False},
        {"low_level_stage": 1, "rates": ()},
    ],
)
@pytest.mark.parametrize("size", [(33, 47), (32, 64)])
def test_logits_have_the_size_of_the_image(config, size):
    method = tiny(**config).eval()
    with torch.no_grad():
        assert method.logits(torch.randn(2, 3, *size)).shape == (2, C + 1, *size)


def test_logits_are_float32_under_autocast():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert tiny().eval().logits(torch.randn(1, 3, 32, 32)).dtype == torch.float32


@pytest.mark.parametrize("weights", [(), (0.5, 1.0, 2.0, 4.0)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_torchs_mean_cross_entropy_over_known_pixels(weights, smoothing):
    method = tiny(class_weights=weights, label_smoothing=smoothing, dropout=0.0).eval()
    data = batch()
    data["mask"][:, :10] = 255
    expected = F.cross_entropy(
        method.logits(data["image"]),
        data["mask"],
        torch.tensor(weights) if weights else None,
        ignore_index=255,
        label_smoothing=smoothing,
    )
    torch.testing.assert_close(method.training_step(data)["loss"], expected)


def test_ignored_pixels_do_not_reach_the_loss_but_through_the_features():
    method = tiny().eval()
    logits = torch.randn(1, C + 1, 4, 4, requires_grad=True)
    method.coarse_logits = lambda images: logits
    mask = torch.full((1, 4, 4), 255)
    mask[0, 0, 0] = 1
    method.training_step({"image": torch.zeros(1, 3, 4, 4), "mask": mask})["loss"].backward()
    assert logits.grad[0, :, 0, 0].abs().sum() > 0
    assert logits.grad[0, :].flatten(1)[:, 1:].abs().max() == 0


def test_a_batch_without_any_label_gives_zero_loss_and_zero_gradient():
    method = tiny()
    data = {"image": torch.randn(2, 3, 32, 32), "mask": torch.full((2, 32, 32), 255)}
    scalars = method.training_step(data)
    scalars["loss"].backward()
    assert scalars["loss"] == 0
    assert scalars["accuracy"] == 0
    assert all(p.grad is None or not p.grad.any() for p in method.parameters())


def test_accuracy_counts_known_pixels_by_hand():
    method = tiny()
    logits = torch.zeros(1, C + 1, 1, 4)
    logits[0, 2] = 1
    method.coarse_logits = lambda images: logits
    mask = torch.tensor([[[2, 2, 0, 255]]])
    accuracy = method.training_step({"image": torch.zeros(1, 3, 1, 4), "mask": mask})["accuracy"]
    assert accuracy == pytest.approx(2 / 3)


def test_one_image_can_be_trained():
    method = tiny()
    method.training_step(batch(count=1))["loss"].backward()
    assert method.pyramid.pool[1].weight.grad.abs().sum() > 0


def test_loss_falls_over_ten_steps():
    method, data = tiny(lr=0.05), batch()
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
    assert losses[-1] < 0.5 * losses[0]


def test_learning_rate_is_poly_and_heads_are_faster():
    (optimizer, scheduler), *_ = tiny(lr=0.01, head_lr_factor=10.0).optimizers(4)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.01, 0.1])
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 * 0.75**0.9)


def test_optimizer_holds_every_trainable_parameter_once():
    method = tiny(frozen_stages=1)
    (optimizer, _), *_ = method.optimizers(1)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in method.parameters() if p.requires_grad)
    assert len(held) < len(list(method.parameters()))


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_norm_keeps_the_backbones_statistics_only(frozen):
    method = tiny(frozen_norm=frozen)
    before = {k: v.clone() for k, v in method.state_dict().items() if k.endswith("running_mean")}
    method.training_step(batch())
    moved = {k for k, v in method.state_dict().items() if k in before and not torch.equal(v, before[k])}
    assert any(k.startswith("pyramid") for k in moved)
    assert any(k.startswith("backbone") for k in moved) is not frozen


def test_saved_weights_load_into_the_same_network(tmp_path):
    import dataclasses

    method = tiny(class_weights=(1.0, 2.0, 3.0, 4.0)).eval()
    record = {"method": "deeplab", "num_classes": C, "classes": ["a", "b", "c"], "backbone": TINY["backbone"]}
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
        ({"low_level_stage": 3}, "low_level_stage is 3, expected 0, 1 or 2"),
        ({"head_chanels": 8}, "unknown setting 'head_chanels', did you mean 'head_channels'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, message):
    with pytest.raises(FastcamError, match=message):
        tiny(**config)
