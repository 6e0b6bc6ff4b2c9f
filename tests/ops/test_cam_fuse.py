from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from op_tester import OpTester, compile_for_gpus

from fastcam import cam_fuse
from fastcam.ops.cam_fuse import BWD, CANDIDATES, FWD


def interpolate(x, size, align_corners=False):
    return F.interpolate(x, size, mode="bilinear", align_corners=align_corners)


def rounded_up(size, multiple=16):
    return tuple(-(-n // multiple) * multiple for n in size)


class TestCamFuse(OpTester):
    op = staticmethod(cam_fuse)
    candidates = CANDIDATES
    # (B, C, sizes of the views, size, grid, options). The gradient of a map's only pixel, g eps / (x + eps)^2, needs an
    # eps that is more than a rounding error of x.
    cases: ClassVar = [
        (0, 3, [(2, 2)], (4, 5), None, {}),
        (2, 0, [(2, 2)], (4, 5), None, {}),
        (1, 1, [(1, 1)], (1, 1), None, {"eps": 0.5}),
        (2, 5, [(3, 4), (3, 4), (2, 3), (7, 5)], (37, 50), (48, 64), {"flips": [False, True, False, True]}),
        (1, 3, [(3, 4), (3, 4), (5, 6)], (13, 71), None, {"reduce": "max", "normalize": "minmax", "activation": None}),
        (1, 2, [(9, 40), (11, 33)], (5, 7), None, {"align_corners": True, "normalize": None, "reduce": "mean"}),
        (1, 4, [(3, 4), (3, 4), (5, 6), (5, 6)], (40, 71), None, {"reduce": "pair_max", "activation": "resized_relu"}),
        (1, 3, [(3, 4), (5, 6)], (17, 21), (20, 21), {"activation": "fused_relu", "normalize": "seam", "eps": 0.1}),
        (1, 3, [(3, 4), (3, 4)], (17, 21), None, {"activation": "resized_relu", "reduce": "mean"}),
        (2, 21, [(6, 5), (6, 5), (12, 9)], (130, 70), None, {"flips": [False, True, True], "normalize": "minmax"}),
    ]
    # Every activation, reduction and normalisation, for the interpreter, which runs no other case.
    policies: ClassVar = [
        {"activation": "resized_relu", "reduce": "pair_max", "normalize": "minmax"},
        {"activation": "fused_relu", "reduce": "sum", "normalize": "seam", "eps": 0.1},
        {"activation": "resized_relu", "reduce": "mean", "normalize": None},
        {"activation": None, "reduce": "max", "normalize": "max", "align_corners": True},
        {"activation": "fused_relu", "reduce": "pair_max", "normalize": None},
    ]
    small: ClassVar = (
        2,
        3,
        [(2, 3), (2, 3), (3, 4)],
        (5, 7),
        (6, 8),
        {"flips": [False, True, True], "normalize": "minmax"},
    )

    def inputs(self, case, dtype, device):
        B, C, shapes, size, grid, options = case
        g = torch.Generator().manual_seed(0)
        cams = [torch.randn(B, C, *shape, generator=g, dtype=torch.float64).to(device, dtype) for shape in shapes]
        present = (torch.arange(B * C, device=device) % 3 != 1).reshape(B, C)
        return (cams, size), {"grid": grid, "present": present, **options}

    def test_every_policy_agrees_with_float64_reference(self, device, backend):
        for policy in self.policies:
            case = (1, 2, [(2, 3), (2, 3), (3, 4), (1, 2)], (5, 7), (6, 8), {"flips": [False, True] * 2, **policy})
            self.compare(self.run_forward, case, torch.float32, device, backend)
            self.compare(self.run_backward, case, torch.float32, device, backend)

    def test_equals_irn_make_cam(self, device, backend, golden):
        a = golden("irn_make_cam")
        cams = [torch.from_numpy(a[f"scale{i}_cam"])[None].to(device) for i in range(4)]
        H, W = map(int, a["size"])
        keys = torch.from_numpy(a["keys"]).long()
        present = torch.from_numpy(a["label"])[None].to(device) > 0
        for size, grid, expected in (
            (((H - 1) // 4 + 1, (W - 1) // 4 + 1), None, a["strided_cam"]),
            ((H, W), rounded_up((H, W)), a["high_res"]),
        ):
            fused = cam_fuse(cams, size, grid=grid, present=present, backend=backend)[0].cpu()
            np.testing.assert_allclose(fused[keys].numpy(), expected, rtol=1e-4, atol=1e-5)
            absent = torch.from_numpy(a["label"]) == 0
            assert (fused[absent] == 0).all()

    def random(self, device, *shapes, C=2):
        g = torch.Generator().manual_seed(0)
        return [torch.rand(1, C, *shape, generator=g).to(device) for shape in shapes]

    def check(self, actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)

    def test_psa_mirrors_after_resizing(self, device, backend):
        a, b, c = self.random(device, (3, 4), (3, 4), (5, 6))
        x = interpolate(a, (21, 30)) + interpolate(b, (21, 30)).flip(-1) + interpolate(c, (21, 30))
        expected = x / (x.amax((2, 3), keepdim=True) + 1e-5)
        self.check(cam_fuse([a, b, c], (21, 30), flips=[False, True, False], backend=backend), expected)

    def test_mctformer_normalises_by_minimum_and_maximum(self, device, backend):
        a, b = self.random(device, (3, 4), (5, 6))
        x = interpolate(a, (21, 30)) + interpolate(b, (21, 30))
        low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
        fused = cam_fuse([a, b], (21, 30), normalize="minmax", eps=1e-8, backend=backend)
        self.check(fused, (x - low) / (high - low + 1e-8))

    def test_afa_takes_maximum_of_mirrored_views_then_relu_then_sum(self, device, backend):
        a, b, c, d = (x - 0.5 for x in self.random(device, (3, 4), (3, 4), (5, 6), (5, 6)))
        pairs = [
            torch.maximum(interpolate(x, (21, 30)), interpolate(y, (21, 30)).flip(-1)) for x, y in ((a, b), (c, d))
        ]
        x = sum(p.relu() for p in pairs)
        x = x - x.amin((2, 3), keepdim=True)
        expected = x / (x.amax((2, 3), keepdim=True) + 1e-5)
        policy = {"activation": "resized_relu", "reduce": "pair_max", "normalize": "minmax"}
        self.check(cam_fuse([a, b, c, d], (21, 30), flips=[False, True] * 2, **policy, backend=backend), expected)

    def test_seam_clips_the_sum_and_puts_what_lies_near_the_minimum_to_zero(self, device, backend):
        a, b, c, d = (x - 0.4 for x in self.random(device, (12, 14), (12, 14), (6, 7), (6, 7)))
        a[0, 0] += 3  # a map whose minimum is positive
        maps = (interpolate(v, (12, 14), align_corners=True) for v in (a, b.flip(-1), c, d.flip(-1)))
        x = sum(maps).cpu().double().numpy()
        x[x < 0] = 0
        low, high = x.min((2, 3), keepdims=True), x.max((2, 3), keepdims=True)
        assert low[0, 0] > 0
        x[x < low + 1e-5] = 0
        expected = torch.from_numpy((x - low - 1e-5) / (high - low + 1e-5)).float()
        policy = {"activation": "fused_relu", "normalize": "seam", "align_corners": True}
        fused = cam_fuse([a, b, c, d], (12, 14), flips=[False, True] * 2, **policy, backend=backend)
        self.check(fused.cpu(), expected)

    def test_one_stage_averages_scores_as_they_are(self, device, backend):
        views = [v.softmax(1) for v in self.random(device, (3, 4), (3, 4), (5, 6), (5, 6), C=4)]
        maps = [interpolate(v.flip(-1) if i % 2 else v, (21, 30)) for i, v in enumerate(views)]
        policy = {"activation": None, "reduce": "mean", "normalize": None}
        fused = cam_fuse(views, (21, 30), flips=[False, True] * 2, **policy, backend=backend)
        self.check(fused, torch.stack(maps).mean(0))

    def test_aligned_corners_and_shrinking_equal_interpolate(self, device, backend):
        (a,) = self.random(device, (9, 33))
        for size in ((1, 1), (4, 5), (1, 40), (30, 1)):
            for align_corners in (False, True):
                fused = cam_fuse([a], size, normalize=None, align_corners=align_corners, backend=backend)
                self.check(fused, interpolate(a, size, align_corners))

    def test_mean_is_sum_over_number_of_views(self, device, backend):
        views = self.random(device, (3, 4), (3, 4), (5, 6))
        mean, total = (cam_fuse(views, (8, 9), reduce=r, normalize=None, backend=backend) for r in ("mean", "sum"))
        self.check(mean, total / 3)

    def test_mirrored_images_give_mirrored_maps(self, device, backend):
        views = self.random(device, (3, 4), (5, 6))
        fused = cam_fuse(views, (13, 18), backend=backend)
        self.check(cam_fuse([v.flip(-1) for v in views], (13, 18), backend=backend), fused.flip(-1))
        self.check(cam_fuse([v.flip(-1) for v in views], (13, 18), flips=[True, True], backend=backend), fused)

    def test_order_of_views_and_positive_scale_do_not_matter(self, device, backend):
        views = self.random(device, (3, 4), (5, 6), (2, 2))
        fused = cam_fuse(views, (13, 18), backend=backend)
        self.check(cam_fuse(views[::-1], (13, 18), backend=backend), fused)
        scaled = cam_fuse([8 * v for v in views], (13, 18), backend=backend)
        torch.testing.assert_close(scaled, fused, rtol=1e-4, atol=0)  # eps is not scaled

    def test_one_view_at_its_own_size_is_only_normalised(self, device, backend):
        (a,) = self.random(device, (7, 9))
        self.check(cam_fuse([a], (7, 9), backend=backend), a / (a.amax((2, 3), keepdim=True) + 1e-5))

    def test_zero_map_stays_zero_and_has_zero_gradient(self, device, backend):
        for normalize, value in (("max", 0), ("minmax", 0), ("seam", -1), (None, 0)):
            a = torch.zeros(1, 2, 3, 4, device=device, requires_grad=True)
            out = cam_fuse([a], (5, 7), normalize=normalize, backend=backend)
            out.sum().backward()
            torch.testing.assert_close(out, torch.full_like(out, value))
            assert (a.grad == 0).all()

    def test_all_absent_gives_zero_whatever_the_maps_hold(self, device, backend):
        a = torch.full((1, 2, 3, 4), torch.nan, device=device, requires_grad=True)
        out = cam_fuse([a], (5, 7), present=torch.zeros(1, 2, dtype=torch.bool, device=device), backend=backend)
        out.sum().backward()
        assert (out == 0).all()
        assert (a.grad == 0).all()

    def test_nan_stays_in_its_class(self, device, backend):
        (a,) = self.random(device, (3, 4), C=3)
        a[0, 1, 2, 2] = torch.nan
        for reduce in ("sum", "max", "pair_max"):
            out = cam_fuse([a, a], (13, 18), reduce=reduce, backend=backend)
            assert out.isnan().flatten(2).all(2).tolist() == [[False, True, False]]
            assert not out[0, [0, 2]].isnan().any()

    def test_gradient_equals_autograd_of_interpolate(self, device, backend):
        for reduce in ("sum", "max"):
            views = [(v - 0.3).requires_grad_() for v in self.random(device, (3, 4), (3, 4), (5, 6))]
            maps = [interpolate(v.relu(), (16, 32)) for v in views[:1]]
            maps += [interpolate(v.relu().flip(-1), (16, 32)) for v in views[1:]]
            x = (sum(maps) if reduce == "sum" else torch.stack(maps).amax(0))[..., :13, :18]
            expected = x / (x.amax((2, 3), keepdim=True) + 1e-5)
            weight = torch.linspace(-1, 1, x.numel(), device=device).reshape(x.shape)
            options = {"grid": (16, 32), "flips": [False, True, True], "reduce": reduce}
            actual = cam_fuse(views, (13, 18), **options, backend=backend)
            torch.testing.assert_close(
                torch.autograd.grad(actual, views, weight),
                torch.autograd.grad(expected, views, weight),
                rtol=1e-4,
                atol=1e-4,
            )

    def test_tied_maxima_share_the_gradient_and_the_first_of_tied_views_takes_it(self, device, backend):
        a = torch.ones(1, 1, 2, 2, device=device, requires_grad=True)
        out = cam_fuse([a], (2, 2), eps=1.0, backend=backend)  # y = x / (max + 1)
        out[0, 0, 0, 0].backward()
        assert a.grad.flatten().tolist() == pytest.approx([0.5 - 0.25 / 4, *[-0.25 / 4] * 3])
        b = torch.ones(1, 1, 2, 2, device=device, requires_grad=True)
        a.grad = None
        cam_fuse([b, a], (2, 2), reduce="max", normalize=None, backend=backend).sum().backward()
        assert (b.grad == 1).all()
        assert (a.grad == 0).all()

    def test_many_classes(self, device, backend):
        if backend == "triton" and device == "cpu":
            pytest.skip("thousands of programs in the interpreter")
        for C in (81, 151):
            views = self.random(device, (3, 4), (5, 6), C=C)
            x = sum(interpolate(v, (30, 41)) for v in views)
            self.check(cam_fuse(views, (30, 41), backend=backend), x / (x.amax((2, 3), keepdim=True) + 1e-5))

    def test_opcheck(self, device, backend):
        (cams, _), options = self.inputs(self.small, torch.float32, device)
        policy = options["present"], [False, True, True], [5, 7], [6, 8], "relu", "sum", "max", False, 1e-5, backend
        torch.library.opcheck(FWD, (cams, *policy))
        out, stats = FWD(cams, *policy)
        torch.library.opcheck(BWD, (torch.ones_like(out), cams, stats, *policy))

    def test_exceptions(self, device, backend):
        a = torch.ones(1, 2, 3, 4, device=device)
        for match, error, cams, size, options in (
            (r"expected at least one view in cams, got none", ValueError, [], (2, 2), {}),
            (r"got cams\[1\] \(1, 1, 3, 4\) beside", ValueError, [a, a[:, :1]], (2, 2), {}),
            (r"at least one pixel, got cams\[0\] \(1, 2, 0, 4\)", ValueError, [a[:, :, :0]], (2, 2), {}),
            (r"expected size \(H, W\) of at least \(1, 1\), got \(0, 2\)", ValueError, [a], (0, 2), {}),
            (r"no smaller than size \(5, 5\), got \(8, 4\)", ValueError, [a], (5, 5), {"grid": (8, 4)}),
            (r"one flag in flips for each of 1 views, got 2", ValueError, [a], (2, 2), {"flips": [True, False]}),
            (
                r"expected present \(B, C\) = \(1, 2\), got \(2,\)",
                ValueError,
                [a],
                (2, 2),
                {"present": a[0, :, 0, 0] > 0},
            ),
            (r"expected present of dtype bool, got float32", TypeError, [a], (2, 2), {"present": a[..., 0, 0]}),
            (r"expected activation 'relu', .*, None, got 'gelu'", ValueError, [a], (2, 2), {"activation": "gelu"}),
            (r"expected reduce 'sum', .*, 'pair_max', got 'min'", ValueError, [a], (2, 2), {"reduce": "min"}),
            (r"expected normalize 'max', .*, None, got 'l2'", ValueError, [a], (2, 2), {"normalize": "l2"}),
            (r"even number of views under reduce 'pair_max', got 1", ValueError, [a], (2, 2), {"reduce": "pair_max"}),
            (r"expected eps > 0, got 0", ValueError, [a], (2, 2), {"eps": 0}),
            (r"expected one dtype, got cams\[0\] float32, cams\[1\] float64", TypeError, [a, a.double()], (2, 2), {}),
        ):
            with pytest.raises(error, match="^cam_fuse: .*" + match):
                cam_fuse(cams, size, **options, backend=backend)


@pytest.mark.parametrize(
    ("dtype", "activation", "reduce", "normalize"), [("fp32", 1, 0, 1), ("fp16", 0, 2, 2), ("bf16", 2, 3, 3)]
)
def test_triton_kernels_compile_for_several_gpu_generations(dtype, activation, reduce, normalize):
    kernels = pytest.importorskip("fastcam.kernels.cam_fuse")
    BLOCK_H, BLOCK_W = kernels.blocks(500)
    flags = {"ACTIVATION": activation, "REDUCE": reduce, "ALIGN": reduce == 2}
    tile = {**flags, "BLOCK_H": BLOCK_H, "BLOCK_W": BLOCK_W}
    normalized = {"NORMALIZE": normalize, **tile}
    x, f = f"*{dtype}", "*fp32"
    maps = {"low_ptr": x, "shapes_ptr": "*i32", "present_ptr": "*u8"}
    sizes = {**dict.fromkeys(("H", "W", "grid_h", "grid_w", "S", "L", "tiles_w"), "i32"), "scale": "fp32"}
    saved = {"grad_ptr": x, **maps, "stats_ptr": f, "sums_ptr": f, **sizes, "eps": "fp32"}
    compile_for_gpus(kernels._cam_fuse_extremes_kernel, {**maps, "extremes_ptr": f, **sizes}, tile)
    compile_for_gpus(
        kernels._cam_fuse_fwd_kernel, {**maps, "stats_ptr": f, "out_ptr": x, **sizes, "eps": "fp32"}, normalized
    )
    compile_for_gpus(kernels._cam_fuse_sums_kernel, saved, normalized)
    compile_for_gpus(kernels._cam_fuse_bwd_kernel, {**saved, "dx_ptr": f, "takers_ptr": "*i32"}, normalized)
    shape = dict.fromkeys(("H", "W", "grid_h", "grid_w", "L", "h", "w", "offset", "mirrored", "view"), "i32")
    pointers = {"dx_ptr": f, "takers_ptr": "*i32", "low_ptr": x, "present_ptr": "*u8", "grad_low_ptr": x}
    constants = {**flags, "BLOCK_W": 32, "BLOCK_X": kernels.BLOCK_X}
    compile_for_gpus(kernels._cam_fuse_gather_kernel, {**pointers, **shape, "scale": "fp32"}, constants)
