"""The pixel correlation against the authors' arrays and its properties."""

import pytest
import torch
from torch.nn import functional as F

from fastcam.nn import pixel_correlation

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def test_values_and_gradients_equal_sfcs(golden):
    arrays = {k: torch.from_numpy(v) for k, v in golden("sfc_pcm").items()}
    cam, feat, weight = (arrays[k].requires_grad_() for k in ("cam", "feat", "f9_weight"))
    maps = F.interpolate(cam, feat.shape[-2:], mode="bilinear", align_corners=True)
    out = pixel_correlation(maps, F.conv2d(feat, weight), steps=2)
    out.backward(arrays["grad_out"])
    torch.testing.assert_close(out, arrays["out"], **CLOSE)
    for name, tensor in (("cam", cam), ("feat", feat), ("f9_weight", weight)):
        torch.testing.assert_close(tensor.grad, arrays[f"grad_{name}"], **CLOSE)


def test_constant_maps_stay_and_zero_features_give_zero():
    torch.manual_seed(0)
    features = torch.randn(1, 8, 4, 4)
    features[..., 0, 0] = 0
    out = pixel_correlation(torch.ones(1, 2, 4, 4), features, steps=2)
    assert out[..., 0, 0].count_nonzero() == 0
    torch.testing.assert_close(out.flatten(2)[..., 1:], torch.ones(1, 2, 15), **CLOSE)


def test_linear_in_maps_and_blind_to_the_order_of_pixels():
    torch.manual_seed(0)
    a, b, features = torch.rand(1, 2, 3, 4), torch.rand(1, 2, 3, 4), torch.randn(1, 5, 3, 4)
    both = pixel_correlation(2 * a - b, features)
    torch.testing.assert_close(both, 2 * pixel_correlation(a, features) - pixel_correlation(b, features), **CLOSE)
    order = torch.randperm(12)
    shuffled = pixel_correlation(
        a.flatten(2)[..., order].view(a.shape), features.flatten(2)[..., order].view(features.shape)
    )
    torch.testing.assert_close(shuffled.flatten(2), pixel_correlation(a, features).flatten(2)[..., order], **CLOSE)


def test_other_sizes_of_maps_and_features_are_refused():
    with pytest.raises(ValueError, match="correlation_propagate: expected maps"):
        pixel_correlation(torch.zeros(1, 2, 3, 3), torch.zeros(1, 2, 3, 4))
