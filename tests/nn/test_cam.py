"""Fusion of views against IRN's make_cam, and the small formulas by hand."""

import pytest
import torch

from fastcam.nn import background_channel, fuse_views, max_normalize
from fastcam.ops.cam_fuse import cam_fuse

CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def _merged(maps):
    """A method whose two mirror images add up to given maps: all in the first, nothing in the second."""
    return lambda images, tags: torch.cat([maps[images.shape[-1]], torch.zeros_like(maps[images.shape[-1]])])


def test_fusion_equals_irns_high_resolution_and_strided_maps(golden):
    arrays = golden("irn_make_cam")
    cams = [torch.from_numpy(arrays[f"scale{i}_cam"])[None] for i in range(4)]
    size = tuple(arrays["size"].tolist())
    tags = torch.from_numpy(arrays["label"])[None]
    keys = torch.from_numpy(arrays["keys"])
    views = [torch.zeros(1, 3, 8, 8 + i) for i in range(4)]
    method = _merged({8 + i: cam for i, cam in enumerate(cams)})
    fused = fuse_views(method, views, size, tags, multiple=16)
    torch.testing.assert_close(fused.maps[0, keys], torch.from_numpy(arrays["high_res"]), **CLOSE)
    assert fused.background is None
    assert fused.maps[0, tags[0] == 0].count_nonzero() == 0
    strided = fuse_views(method, views, ((size[0] - 1) // 4 + 1, (size[1] - 1) // 4 + 1), tags)
    torch.testing.assert_close(strided.maps[0, keys], torch.from_numpy(arrays["strided_cam"]), **CLOSE)


def test_mirror_images_merge_as_in_irns_network(golden):
    arrays = {k: torch.from_numpy(v) for k, v in golden("irn_make_cam").items() if k.startswith("flip")}
    features, weight = arrays["flip_feat"], arrays["flip_weight"]
    fused = fuse_views(
        lambda images, tags: torch.relu(torch.nn.functional.conv2d(features, weight)),
        [torch.zeros(1, 3, 4, 5)],
        (4, 5),
        normalize=None,
    )
    torch.testing.assert_close(fused.maps[0], arrays["flip_out"], **CLOSE)


def test_fusing_a_mirrored_image_mirrors_the_maps():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3, padding=1)
    views = [torch.randn(2, 3, 12, 10), torch.randn(2, 3, 6, 5)]
    with torch.no_grad():
        fused = fuse_views(lambda images, tags: conv(images), views, (24, 20))
        mirrored = fuse_views(lambda images, tags: conv(images), [v.flip(-1) for v in views], (24, 20))
    torch.testing.assert_close(mirrored.maps.flip(-1), fused.maps, **CLOSE)


def test_equal_views_fuse_to_the_same_as_one():
    torch.manual_seed(0)
    view = torch.rand(1, 3, 6, 6)
    one = fuse_views(lambda images, tags: images, [view], (12, 12))
    three = fuse_views(lambda images, tags: images, [view] * 3, (12, 12))
    torch.testing.assert_close(one.maps, three.maps, **CLOSE)


def test_tags_reach_both_mirror_images_and_mask_the_result():
    seen = []
    tags = torch.tensor([[1.0, 0.0, 1.0]])
    fused = fuse_views(lambda images, t: seen.append(t) or images, [torch.ones(1, 3, 4, 4)], (4, 4), tags)
    assert torch.equal(seen[0], torch.cat([tags, tags]))
    assert fused.maps.amax(dim=(2, 3)).round().tolist() == [[1, 0, 1]]


def test_no_view_is_refused():
    with pytest.raises(ValueError, match="fuse_views: expected at least one view"):
        fuse_views(lambda images, tags: images, [], (4, 4))


def test_normalisation_and_background_by_hand():
    maps = torch.tensor([[[[1.0, 2.0]], [[0.0, 0.0]]]])
    torch.testing.assert_close(max_normalize(maps, eps=0.5), torch.tensor([[[[0.4, 0.8]], [[0.0, 0.0]]]]))
    torch.testing.assert_close(background_channel(maps), torch.tensor([[[[0.0, -1.0]]]]))
    assert torch.equal(cam_fuse([maps], (1, 2), activation=None, normalize=None), maps)
