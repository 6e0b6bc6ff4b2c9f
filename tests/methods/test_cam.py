"""The plain classifier and its maps."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastcam.io import save_weights
from fastcam.methods import create_method, load_method

pytest.importorskip("timm")


@pytest.fixture
def method():
    torch.manual_seed(0)
    return create_method("cam", num_classes=3, backbone="resnet10t", lr=0.01)


def test_loss_falls_over_ten_steps(method):
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


def test_mean_of_the_maps_before_relu_is_the_logit_of_the_pooled_features(method):
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        pooled = method.backbone(image)[-1].mean(dim=(2, 3))
        expected = F.linear(pooled, method.classifier.weight.flatten(1))
        torch.testing.assert_close(method.logits(image).mean(dim=(2, 3)), expected)
        assert method.cams(image).min() == 0


def test_loss_is_the_multi_label_soft_margin_by_hand(method):
    batch = {"image": torch.randn(2, 3, 32, 32), "tags": torch.tensor([[1.0, 0, 1], [0, 0, 0]])}
    with torch.no_grad():
        score = method.logits(batch["image"]).mean(dim=(2, 3))
        p = torch.sigmoid(score)
        expected = -(batch["tags"] * p.log() + (1 - batch["tags"]) * (1 - p).log()).mean()
        torch.testing.assert_close(method.training_step(batch)["loss"], expected)


def test_fused_maps_are_masked_normalised_and_without_background(method):
    image = torch.randn(1, 3, 40, 56)
    tags = torch.tensor([[0.0, 1.0, 0.0]])
    method.classifier.weight = nn.Parameter(method.classifier.weight.abs())
    with torch.no_grad():
        fused = method.eval().fused_cams([image, image[..., ::2, ::2]], (40, 56), tags)
    assert fused.background is None
    assert fused.maps.amax(dim=(2, 3))[0].tolist() == pytest.approx([0, 1, 0], abs=1e-3)


def test_cells_are_resized_whole_at_image_size_and_just_to_size_at_stride_4(method):
    image = torch.randn(1, 3, 40, 56)  # cells of 16 pixels: 3 x 4, which cover 48 x 64
    with torch.no_grad():
        views = [method.eval().cams(image), method.cams(image.flip(-1)).flip(-1)]

        def resized(*size: int) -> torch.Tensor:
            return sum(F.interpolate(view, size, mode="bilinear", align_corners=False) for view in views)

        for size, fused in (((40, 56), resized(48, 64)[..., :40, :56]), ((10, 14), resized(10, 14))):
            expected = fused / (fused.amax(dim=(2, 3), keepdim=True) + 1e-5)
            torch.testing.assert_close(method.fused_cams([image], size).maps, expected, rtol=1e-4, atol=1e-5)


def test_weights_restore_the_maps(method, tmp_path):
    config = dict(method.config.__dict__)
    saved = {"method": "cam", "num_classes": 3, "backbone": "resnet10t", "config": config}
    save_weights(tmp_path / "w.safetensors", method.export_state_dict(), saved)
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load_method(tmp_path / "w.safetensors").cams(image), method.eval().cams(image))
