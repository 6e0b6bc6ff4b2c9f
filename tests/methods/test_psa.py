"""AffinityNet against dense matrices and numbers worked by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.io import save_weights
from fastcam.methods import create_method, load_method

TINY = {"backbone": "test_resnet", "head_channels": (4, 4, 8), "steps": 16, "frozen_norm": False}


def tiny(**config):
    torch.manual_seed(0)
    return create_method("psa", num_classes=3, **{**TINY, **config})


def batch(count=2, size=64):
    """Images with a dark left half of label 0 and a bright right half of label 2."""
    mask = torch.zeros(count, size, size, dtype=torch.int64)
    mask[:, :, size // 2 :] = 2
    noise = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))
    return {"image": mask[:, None] - 1.0 + 0.1 * noise, "mask": mask}


def dense_walk(features: np.ndarray, x: np.ndarray, beta: float, steps: int) -> np.ndarray:
    """Specification c.2 and c.5 as matrices over all pixels of a map, pairs nearer than 5."""
    depth, height, width = features.shape
    f = features.reshape(depth, -1).astype(np.float64)
    y, z = np.divmod(np.arange(height * width), width)
    near = (y[:, None] - y) ** 2 + (z[:, None] - z) ** 2 < 25
    affinity = np.exp(-np.abs(f[:, :, None] - f[:, None, :]).mean(0)) ** beta * near
    matrix = affinity / affinity.sum(axis=0, keepdims=True)
    return (x.reshape(len(x), -1) @ np.linalg.matrix_power(matrix, steps)).reshape(x.shape)


def test_walk_equals_the_dense_matrix():
    method = tiny().eval()
    image, maps = torch.randn(1, 3, 44, 52), torch.rand(1, 2, 44, 52)
    with torch.no_grad():
        scores = method.refine(image, maps, 0.3)
        features = method.features(F.pad(image, (0, 4, 0, 4)))
    planes = np.zeros((3, 48, 56))
    planes[0, :44, :52] = 0.3
    planes[1:, :44, :52] = maps[0]
    pooled = planes.reshape(3, 6, 8, 7, 8).mean(axis=(2, 4))
    walked = torch.from_numpy(dense_walk(features[0].numpy(), pooled, method.config.beta, method.config.steps))
    expected = F.interpolate(walked[None].float(), (48, 56), mode="bilinear", align_corners=False)[..., :44, :52]
    torch.testing.assert_close(scores, expected, rtol=0, atol=2e-4)


def test_constant_background_walks_like_a_plane():
    method = tiny().eval()
    image, maps = torch.randn(2, 3, 32, 40), torch.rand(2, 2, 32, 40)
    with torch.no_grad():
        plane = torch.cat([torch.full((2, 1, 32, 40), 0.2), maps], dim=1)
        torch.testing.assert_close(method.refine(image, maps, 0.2), method.refine(image, plane, None))


def test_maps_of_any_size_are_taken():
    method = tiny().eval()
    with torch.no_grad():
        scores = method.refine(torch.randn(1, 3, 33, 41), torch.rand(1, 3, 9, 11), None)
    assert scores.shape == (1, 3, 33, 41)
    assert scores.isfinite().all()


@pytest.mark.parametrize("group_norm", [False, True])
def test_features_by_their_formula(group_norm):
    method = tiny(group_norm=group_norm, head_channels=(8, 16, 24)).eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        stages = method.backbone(image)[1:]
        levels = [F.conv2d(x, level.weight) for x, level in zip(stages, method.head.levels, strict=True)]
        if group_norm:
            levels = [F.group_norm(x, groups) for x, groups in zip(levels, (1, 2, 3), strict=True)]
        joined = torch.cat([torch.where(x > 0, x, x.exp() - 1) for x in levels], dim=1)
        out = F.conv2d(joined, method.head.join.weight)
        expected = torch.where(out > 0, out, out.exp() - 1)
        torch.testing.assert_close(method.features(image), expected, rtol=1e-4, atol=1e-5)
    assert method.features(image).shape[-2:] == (4, 4)


def test_loss_by_hand(monkeypatch):
    """Two pixels of two labels, whose features differ by 1 in one of two channels."""
    method = tiny()
    monkeypatch.setattr(method, "features", lambda images: torch.tensor([[0.0, 1.0], [2.0, 2.0]]).view(1, 2, 1, 2))
    mask = torch.zeros(1, 8, 16, dtype=torch.int64)
    mask[:, :, 8:] = 1
    loss = method.training_step({"image": torch.zeros(1, 3, 8, 16), "mask": mask})["loss"]
    assert loss.item() == pytest.approx(-math.log(1 - math.exp(-0.5)) / 2, rel=1e-4)


def test_loss_falls_over_ten_steps():
    method, data = tiny(lr=0.01), batch()
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
    assert losses[-1] < 0.9 * losses[0]


def test_frozen_backbone_leaves_the_head_to_learn():
    method = tiny(frozen_stages=4)
    method.training_step(batch())["loss"].backward()
    assert all(p.grad is None for p in method.backbone.parameters())
    assert all(p.grad is not None for p in method.head.parameters())
    (optimizer, _), *_ = method.optimizers(1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [0, 4]


def test_batch_without_labels_gives_zero_loss_and_gradient():
    method, data = tiny(), batch()
    data["mask"].fill_(255)
    loss = method.training_step(data)["loss"]
    loss.backward()
    assert loss == 0
    assert not any(p.grad.any() for p in method.parameters() if p.grad is not None)


def test_weights_restore_the_features(tmp_path):
    method = tiny().eval()
    record = {"method": "psa", "num_classes": 3, "classes": ["a", "b", "c"], "backbone": TINY["backbone"]}
    config = dataclasses.asdict(method.config)
    save_weights(tmp_path / "w.safetensors", method.export_state_dict(), {**record, "config": config})
    image = torch.randn(1, 3, 40, 40)
    with torch.no_grad():
        assert torch.equal(load_method(tmp_path / "w.safetensors").features(image), method.features(image))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"head_channels": (8, 8)}, "psa: head_channels has 2 numbers, expected 3"),
        ({"radius": 1}, "psa: radius is 1, expected at least 2"),
        ({"steps": 0}, "psa: steps is 0, expected at least 1"),
        ({"output_stride": 16}, r"last three stages of test_resnet have strides \[8, 16, 16\], .* output_stride to 8"),
        ({"beeta": 8}, "unknown setting 'beeta', did you mean 'beta'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(config, message):
    with pytest.raises(FastcamError, match=message):
        tiny(**config)
