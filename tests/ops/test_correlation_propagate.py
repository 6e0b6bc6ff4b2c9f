import pytest
import torch
from op_tester import OpTester, compile_for_gpus
from torch.nn import functional as F

from fastcam import correlation_propagate
from fastcam.ops.correlation_propagate import BWD, CANDIDATES, FWD


class TestCorrelationPropagate(OpTester):
    op = staticmethod(correlation_propagate)
    candidates = CANDIDATES
    # (B, C, D, H, W, steps)
    cases = (
        (0, 3, 4, 2, 2, 1),
        (2, 0, 3, 2, 2, 1),
        (2, 21, 33, 5, 7, 2),
        (1, 3, 70, 11, 19, 3),
        (2, 5, 130, 9, 15, 1),
    )
    small = (2, 3, 5, 2, 3, 2)

    def inputs(self, case, dtype, device):
        B, C, D, H, W, steps = case
        g = torch.Generator().manual_seed(0)
        maps = torch.rand(B, C, H, W, generator=g, dtype=torch.float64)
        features = torch.randn(B, D, H, W, generator=g, dtype=torch.float64)
        return (maps.to(device, dtype), features.to(device, dtype)), {"steps": steps}

    def test_equals_the_pixel_correlation_of_sfc(self, device, backend, golden):
        a = {k: torch.from_numpy(v).to(device) for k, v in golden("sfc_pcm").items()}
        cam, feat, weight = (a[k].requires_grad_() for k in ("cam", "feat", "f9_weight"))
        maps = F.interpolate(cam, feat.shape[-2:], mode="bilinear", align_corners=True)
        out = correlation_propagate(maps, F.conv2d(feat, weight), steps=2, backend=backend)
        torch.testing.assert_close(out, a["out"], rtol=1e-4, atol=1e-5)
        grads = torch.autograd.grad(out, (cam, feat, weight), a["grad_out"])
        expected = a["grad_cam"], a["grad_feat"], a["grad_f9_weight"]
        torch.testing.assert_close(grads, expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("steps", [1, 3])
    def test_gradient_equals_autograd_of_the_whole_affinity(self, device, backend, steps):
        (maps, features), _ = self.inputs((2, 4, 6, 3, 5, steps), torch.float32, device)
        maps.requires_grad_(), features.requires_grad_()
        g = features.flatten(2)
        g = g / (g.norm(dim=1, keepdim=True) + 1e-5)
        affinity = torch.einsum("bdi,bdj->bij", g, g).relu()
        affinity = affinity / (affinity.sum(1, keepdim=True) + 1e-5)
        expected = maps.flatten(2) @ torch.linalg.matrix_power(affinity, steps)
        actual = correlation_propagate(maps, features, steps=steps, backend=backend).flatten(2)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(device)
        torch.testing.assert_close(
            torch.autograd.grad(actual, (maps, features), weight),
            torch.autograd.grad(expected, (maps, features), weight),
            rtol=1e-4,
            atol=1e-6,
        )

    def test_constant_maps_stay_and_zero_features_give_zero(self, device, backend):
        features = torch.randn(1, 8, 3, 4, generator=torch.Generator().manual_seed(0)).to(device)
        features[..., 0, 0] = 0
        features.requires_grad_()
        maps = torch.ones(1, 2, 3, 4, device=device, requires_grad=True)
        out = correlation_propagate(maps, features, steps=2, backend=backend)
        assert out[..., 0, 0].count_nonzero() == 0
        torch.testing.assert_close(out.flatten(2)[..., 1:], torch.ones(1, 2, 11, device=device), rtol=1e-4, atol=1e-5)
        out.square().sum().backward()
        assert features.grad[..., 0, 0].count_nonzero() == 0
        assert features.grad.isfinite().all()

    def test_one_pixel_keeps_its_value(self, device, backend):
        maps = torch.full((1, 2, 1, 1), 3.0, device=device, requires_grad=True)
        features = torch.full((1, 4, 1, 1), 2.0, device=device, requires_grad=True)
        out = correlation_propagate(maps, features, steps=2, backend=backend)
        assert out.flatten().tolist() == pytest.approx([3.0, 3.0], rel=1e-4)
        out.sum().backward()
        assert maps.grad.flatten().tolist() == pytest.approx([1.0, 1.0], rel=1e-4)
        assert features.grad.abs().max() < 1e-4  # the weights are 1 up to eps, whatever the features

    def test_pixels_with_opposite_features_do_not_mix(self, device, backend):
        maps = torch.tensor([1.0, 2.0, 4.0], device=device).reshape(1, 1, 1, 3)
        features = torch.tensor([3.0, -1.0, -2.0], device=device).reshape(1, 1, 1, 3)
        out = correlation_propagate(maps, features, backend=backend)
        assert out.flatten().tolist() == pytest.approx([1.0, 3.0, 3.0], rel=1e-4)

    def test_nan_feature_makes_its_image_nan_and_nan_map_its_map(self, device, backend):
        maps, features = torch.ones(2, 2, 2, 2, device=device), torch.ones(2, 3, 2, 2, device=device)
        features[1, 0, 0, 0] = torch.nan
        assert correlation_propagate(maps, features, backend=backend).isnan().flatten(1).all(1).tolist() == [
            False,
            True,
        ]
        maps[0, 1, 1, 1] = torch.nan
        out = correlation_propagate(maps, features, backend=backend)[0]
        assert out.isnan().flatten(1).any(1).tolist() == out.isnan().flatten(1).all(1).tolist() == [False, True]

    def test_opcheck(self, device, backend):
        (maps, features), _ = self.inputs(self.small, torch.float32, device)
        torch.library.opcheck(FWD, (maps, features, 2, 1e-5, backend))
        out, between, divisor = FWD(maps, features, 2, 1e-5, backend)
        torch.library.opcheck(BWD, (torch.ones_like(out), maps, features, out, between, divisor, 2, 1e-5, backend))

    def test_exceptions(self, device, backend):
        maps, features = torch.ones(1, 2, 3, 3, device=device), torch.ones(1, 4, 3, 3, device=device)
        with pytest.raises(
            ValueError, match=r"^correlation_propagate: expected maps \(B, C, H, W\) .* got \(1, 2, 3, 3"
        ):
            correlation_propagate(maps, torch.ones(1, 4, 3, 2, device=device))
        with pytest.raises(ValueError, match="expected steps >= 1, got 0"):
            correlation_propagate(maps, features, steps=0)
        with pytest.raises(ValueError, match="expected eps > 0, got 0"):
            correlation_propagate(maps, features, eps=0)
        with pytest.raises(TypeError, match="expected one dtype, got maps float32, features float64"):
            correlation_propagate(maps, features.double())


def test_reference_gives_the_same_in_strips(monkeypatch):
    from fastcam.reference import correlation_propagate as reference

    torch.manual_seed(0)
    maps, features = torch.rand(2, 3, 5, 7), torch.randn(2, 4, 5, 7)

    def both():
        forward = reference.correlation_propagate_fwd(maps, features, 3, 1e-5)
        return *forward, *reference.correlation_propagate_bwd(maps, maps, features, *forward, 3, 1e-5)

    whole = both()
    monkeypatch.setattr(reference, "STRIP_ELEMENTS", 2 * 35 * 4)
    torch.testing.assert_close(both(), whole)


@pytest.mark.parametrize("C", [1, 21, 81])
def test_triton_kernels_compile_for_several_gpu_generations(C):
    kernels = pytest.importorskip("fastcam.kernels.correlation_propagate")
    size = kernels.blocks(C)
    sizes = dict.fromkeys(("N", "D", "C"), "i32")
    compile_for_gpus(
        kernels._correlation_propagate_kernel,
        {"x_ptr": "*fp32", "g_ptr": "*fp32", "divisor_ptr": "*fp32", "out_ptr": "*fp32", **sizes, "eps": "fp32"},
        {"DIVIDE": True, **size},
    )
    compile_for_gpus(
        kernels._correlation_propagate_strip_kernel,
        {
            "u_ptr": "*fp32",
            "v_ptr": "*fp32",
            "g_ptr": "*fp32",
            "strip_ptr": "*fp32",
            **sizes,
            "first": "i32",
            "width": "i32",
        },
        size,
    )
