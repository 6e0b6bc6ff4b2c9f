"""Fusion of views against IRN's make_cam and the published rules, CAM and Grad-CAM against autograd, small formulas."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastcam.nn import Cam, CamFusion, FusionPolicy, background_channel, max_normalize
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
    fused = CamFusion("irn")(method, views, size, tags)
    torch.testing.assert_close(fused.maps[0, keys], torch.from_numpy(arrays["high_res"]), **CLOSE)
    assert fused.background is None
    assert fused.maps[0, tags[0] == 0].count_nonzero() == 0
    strided = CamFusion("irn", multiple=1)(method, views, ((size[0] - 1) // 4 + 1, (size[1] - 1) // 4 + 1), tags)
    torch.testing.assert_close(strided.maps[0, keys], torch.from_numpy(arrays["strided_cam"]), **CLOSE)


def test_mirror_images_merge_as_in_irns_network(golden):
    arrays = {k: torch.from_numpy(v) for k, v in golden("irn_make_cam").items() if k.startswith("flip")}
    features, weight = arrays["flip_feat"], arrays["flip_weight"]
    fused = CamFusion("psa", normalize=None)(
        lambda images, tags: torch.relu(torch.nn.functional.conv2d(features, weight)), [torch.zeros(1, 3, 4, 5)], (4, 5)
    )
    torch.testing.assert_close(fused.maps[0], arrays["flip_out"], **CLOSE)


def test_fusing_a_mirrored_image_mirrors_the_maps():
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(3, 4, 3, padding=1)
    views = [torch.randn(2, 3, 12, 10), torch.randn(2, 3, 6, 5)]
    with torch.no_grad():
        fused = CamFusion("psa")(lambda images, tags: conv(images), views, (24, 20))
        mirrored = CamFusion("psa")(lambda images, tags: conv(images), [v.flip(-1) for v in views], (24, 20))
    torch.testing.assert_close(mirrored.maps.flip(-1), fused.maps, **CLOSE)


def test_equal_views_fuse_to_the_same_as_one():
    torch.manual_seed(0)
    view = torch.rand(1, 3, 6, 6)
    one = CamFusion("psa")(lambda images, tags: images, [view], (12, 12))
    three = CamFusion("psa")(lambda images, tags: images, [view] * 3, (12, 12))
    torch.testing.assert_close(one.maps, three.maps, **CLOSE)


def test_tags_reach_both_mirror_images_and_mask_the_result():
    seen = []
    tags = torch.tensor([[1.0, 0.0, 1.0]])
    fused = CamFusion("psa")(lambda images, t: seen.append(t) or images, [torch.ones(1, 3, 4, 4)], (4, 4), tags)
    assert torch.equal(seen[0], torch.cat([tags, tags]))
    assert fused.maps.amax(dim=(2, 3)).round().tolist() == [[1, 0, 1]]


def test_no_view_is_refused():
    with pytest.raises(ValueError, match="CamFusion: expected at least one view"):
        CamFusion("psa")(lambda images, tags: images, [], (4, 4))


def test_normalisation_and_background_by_hand():
    maps = torch.tensor([[[[1.0, 2.0]], [[0.0, 0.0]]]])
    torch.testing.assert_close(max_normalize(maps, eps=0.5), torch.tensor([[[[0.4, 0.8]], [[0.0, 0.0]]]]))
    torch.testing.assert_close(background_channel(maps), torch.tensor([[[[0.0, -1.0]]]]))
    assert torch.equal(cam_fuse([maps], (1, 2), activation=None, normalize=None), maps)


def test_keys_choose_the_maps_that_are_fused(golden):
    torch.manual_seed(0)
    views = [torch.rand(1, 4, 6, 6), torch.rand(1, 4, 9, 8)]
    tags = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    everything = CamFusion("irn")(lambda images, tags: images, views, (12, 12), tags).maps
    keys = torch.tensor([3, 1])
    chosen = CamFusion("irn")(lambda images, tags: images, views, (12, 12), tags, keys).maps
    assert torch.equal(chosen, everything[:, keys])


class TestPresets:
    """Every row of the table of published fusions, written out in plain torch."""

    def views(self):
        g = torch.Generator().manual_seed(0)
        return [torch.randn(1, 3, n, n + 2, generator=g) for n in (4, 6)]

    def fused(self, name):
        return CamFusion(name)(lambda images, tags: images, self.views(), (21, 30)).maps

    def resized(self, activation=lambda x: x):
        """Maps of every view and its mirror image, un-mirrored, at full size."""
        return [F.interpolate(activation(v), (21, 30), mode="bilinear", align_corners=False) for v in self.views()]

    def test_psa(self):
        x = sum(2 * m for m in self.resized(F.relu))  # the mirror image's maps are those of the image here
        torch.testing.assert_close(self.fused("psa"), x / (x.amax((2, 3), keepdim=True) + 1e-5), **CLOSE)

    @pytest.mark.parametrize("name", ["mctformer", "mctformer+"])
    def test_mctformer(self, name):
        x = sum(2 * m for m in self.resized())
        low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        torch.testing.assert_close(self.fused(name), (x - low) / (high - low + 1e-8), **CLOSE)

    @pytest.mark.parametrize("name", ["afa", "toco"])
    def test_afa_and_toco(self, name):
        x = sum(F.relu(m) for m in self.resized())
        x = x - x.amin((2, 3), keepdim=True)
        torch.testing.assert_close(self.fused(name), x / (x.amax((2, 3), keepdim=True) + 1e-5), **CLOSE)

    def test_seam(self):
        x = sum(2 * m for m in self.resized()).relu()
        low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        x = torch.where(x < low + 1e-5, 0, x)
        torch.testing.assert_close(self.fused("seam"), (x - low - 1e-5) / (high - low + 1e-5), **CLOSE)

    def test_one_stage(self):
        torch.testing.assert_close(self.fused("1-stage"), sum(self.resized()) / 2, **CLOSE)

    def test_scales_round_or_cut_as_published(self):
        image = torch.rand(1, 3, 5, 7)
        shapes = {name: [tuple(v.shape[2:]) for v in CamFusion(name).views(image)] for name in ("irn", "seam", "afa")}
        assert shapes["irn"] == [(5, 7), (2, 4), (8, 10), (10, 14)]
        assert shapes["seam"] == [(2, 4), (5, 7), (8, 10), (10, 14)]
        assert shapes["afa"] == [(5, 7), (2, 3), (7, 10)]

    def test_labels_are_the_argmax_of_the_fused_maps(self):
        fusion = CamFusion(FusionPolicy(multiple=4))
        maps = [m for v in self.views() for m in (v, v.flip(-1))]
        scores = fusion.fuse(maps, (21, 30))
        expected = torch.where(scores.amax(1) > 0.5, scores.argmax(1) + 1, 0)
        assert torch.equal(fusion.label(maps, (21, 30), 0.5).long(), expected)

    def test_unknown_names_are_refused(self):
        with pytest.raises(ValueError, match=r"CamFusion: expected one of irn, .*, got 'camcam'"):
            CamFusion("camcam")
        with pytest.raises(ValueError, match="CamFusion: 'scale' is no field of FusionPolicy"):
            CamFusion("irn", scale=2)


class TestCam:
    """Against weights taken from autograd by hand, one class at a time."""

    ONE_VIEW = CamFusion("psa", scales=(1.0,), mirror=False, activation=None, normalize=None)

    def model(self):
        torch.manual_seed(0)
        body = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1))
        head = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
        return nn.Sequential(body, head).eval()

    def by_hand(self, model, images, keys):
        with torch.enable_grad():
            features = model[0](images)
            logits = model[1](features.clone())
            maps = []
            for key in keys.tolist():
                (gradient,) = torch.autograd.grad(logits[:, key].sum(), features, retain_graph=True)
                maps.append((gradient.mean((2, 3), keepdim=True) * features).sum(1))
        return torch.stack(maps, 1).detach()

    def test_grad_cam_equals_autograd_class_by_class(self):
        model, images, keys = self.model(), torch.rand(2, 3, 13, 17), torch.tensor([4, 0, 1])
        expected = self.by_hand(model, images, keys)
        cam = Cam(model, "0")
        for context in (torch.enable_grad, torch.no_grad, torch.inference_mode):
            with context():
                maps = cam.maps(images, keys)
            torch.testing.assert_close(maps.detach(), expected)
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        torch.testing.assert_close(cam.maps(images, keys).detach(), expected)

    def test_cam_is_the_classifier_at_every_pixel_and_grad_cam_is_cam_over_area(self):
        model = self.model()
        model[1][0] = nn.Identity()  # mean and linear layer alone after the features
        images = torch.rand(2, 3, 13, 17)
        features = model[0](images)
        expected = torch.einsum("bdhw,nd->bnhw", features, model[1][3].weight)
        maps = Cam(model, "0", "1.3").maps(images)
        torch.testing.assert_close(maps, expected)
        grad_cam = Cam(model, model[0]).maps(images)
        torch.testing.assert_close(grad_cam * features.shape[2] * features.shape[3], expected)

    def test_present_classes_scales_and_mirror_images_in_one_call(self):
        model, images = self.model(), torch.rand(2, 3, 16, 20)
        tags = torch.tensor([[0, 1, 0, 0, 1.0], [0, 1, 0, 0, 0]])
        fusion = CamFusion("psa", scales=(1.0, 1.5))
        maps = Cam(model, "0", fusion=fusion)(images, tags)
        keys = torch.tensor([1, 4])
        x = 0
        for view in fusion.views(images):
            for mirrored in (False, True):
                part = self.by_hand(model, view.flip(-1) if mirrored else view, keys).relu()
                part = part.flip(-1) if mirrored else part
                x = x + F.interpolate(part, (16, 20), mode="bilinear", align_corners=False)
        expected = x / (x.amax((2, 3), keepdim=True) + 1e-5) * tags[:, keys, None, None]
        torch.testing.assert_close(maps.detach(), expected, **CLOSE)

    @pytest.mark.parametrize("classifier", [None, "1.3"])
    def test_gradcheck_to_the_image(self, classifier):
        model = self.model().double()
        model[0][2] = nn.Softplus()
        model[1][0] = nn.Softplus()
        cam = Cam(model, "0", classifier, fusion=CamFusion("psa", scales=(1.0,), eps=0.1))
        images = torch.rand(1, 3, 6, 7, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x: cam(x, keys=torch.tensor([2, 3])), images)

    def test_tokens_are_formed_by_reshape(self):
        torch.manual_seed(0)
        patches = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2))  # (B, 8, N)
        model = nn.Sequential(patches, nn.Sequential(nn.Tanh(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 5)))
        images, keys = torch.rand(2, 3, 8, 12), torch.tensor([3])
        features = patches(images)
        (gradient,) = torch.autograd.grad(model[1](features)[:, 3].sum(), features)
        expected = (gradient.mean(2, keepdim=True) * features).sum(1).reshape(2, 1, 2, 3)
        maps = Cam(model, "0", reshape=lambda x: x.unflatten(2, (2, 3))).maps(images, keys)
        torch.testing.assert_close(maps, expected)
        with pytest.raises(ValueError, match=r"Cam: expected a layer that gives \(B, D, h, w\), got \(2, 8, 6\)"):
            Cam(model, "0").maps(images, keys)

    def test_no_present_class_gives_no_map(self):
        tags = torch.zeros(2, 5)
        for classifier in (None, "1.3"):
            assert Cam(self.model(), "0", classifier)(torch.rand(2, 3, 9, 9), tags).shape == (2, 0, 9, 9)

    def test_nothing_before_the_layer_is_recorded_without_gradients(self):
        model = self.model()
        with torch.no_grad():
            maps = Cam(model, "0")(torch.rand(1, 3, 9, 9), keys=torch.tensor([1]))
        assert not maps.requires_grad
        assert not torch.is_inference_mode_enabled() and torch.is_grad_enabled()
        assert all(parameter.grad is None for parameter in model.parameters())

    def test_bad_arguments(self):
        model, images = self.model(), torch.rand(1, 3, 9, 9)
        with pytest.raises(TypeError, match="Cam: expected a classifier with a weight, got Flatten"):
            Cam(model, "0", "1.2")
        with pytest.raises(ValueError, match="Cam: expected a classifier of the layer's 6 features"):
            Cam(model, "0.0", "1.3").maps(images)
        with pytest.raises(ValueError, match=r"Cam: expected images \(B, 3, H, W\), got \(3, 9, 9\)"):
            Cam(model, "0")(images[0])
        with pytest.raises(ValueError, match="Cam: the layer took no part"):
            Cam(model, nn.Identity()).maps(images)
        with pytest.raises(ValueError, match=r"Cam: expected a model that gives logits \(B, C\), got"):
            Cam(model[0], "0").maps(images)
