from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from op_tester import OpTester, compile_for_gpus

from fastcam import cam_fuse, cam_label
from fastcam.ops.cam_label import CANDIDATES, FWD


def by_argmax(cams, size, background, keys=None, present=None, **policy):
    """Labels from the fused maps with numpy's argmax, the reference's float64 maps throughout."""
    maps = cam_fuse([c.double().cpu() for c in cams], size, present=present, backend="reference", **policy).numpy()
    if present is not None:
        maps = np.where(present.cpu().numpy()[:, :, None, None], maps, -np.inf)
    plane = np.full_like(maps[:, :1], background) if isinstance(background, float) else None
    if plane is None:
        plane = (1 - maps.max(1, keepdims=True)) ** background[1]
    numbers = np.arange(maps.shape[1]) if keys is None else keys.numpy()
    return np.concatenate([[0], numbers + 1])[np.concatenate([plane, maps], 1).argmax(1)]


class TestCamLabel(OpTester):
    op = staticmethod(cam_label)
    candidates = CANDIDATES
    has_backward = False
    # (B, C, sizes of the views, size, options)
    cases: ClassVar = [
        (0, 3, [(2, 2)], (4, 5), {"background": 0.3}),
        (1, 1, [(1, 1)], (1, 1), {"background": 0.3}),
        (2, 5, [(3, 4), (2, 3)], (37, 50), {"background": 0.4, "grid": (48, 64), "flips": [False, True]}),
        (1, 3, [(3, 4), (3, 4)], (13, 71), {"background": ("power", 4), "reduce": "max", "normalize": "minmax"}),
        (2, 21, [(6, 5), (6, 5)], (70, 130), {"background": 0.2, "reduce": "pair_max", "activation": "resized_relu"}),
    ]
    small: ClassVar = (2, 3, [(2, 3), (3, 4)], (5, 7), {"background": 0.4, "flips": [False, True]})

    def inputs(self, case, dtype, device):
        B, C, shapes, size, options = case
        g = torch.Generator().manual_seed(0)
        cams = [torch.randn(B, C, *shape, generator=g, dtype=torch.float64).to(device, dtype) for shape in shapes]
        present = (torch.arange(B * C, device=device) % 3 != 1).reshape(B, C)
        return (cams, size), {"present": present, **options}

    def random(self, device, *shapes, C=3):
        g = torch.Generator().manual_seed(1)
        return [torch.rand(1, C, *shape, generator=g).to(device) for shape in shapes]

    def check(self, actual, expected):
        """Equal but for pixels that rounding decides: none here, the maps have no ties."""
        np.testing.assert_array_equal(actual.cpu().numpy(), expected)

    @pytest.mark.parametrize("background", [0.25, ("power", 1), ("power", 4.5), ("power", 32)])
    def test_equals_numpy_argmax_of_fused_maps(self, device, backend, background):
        cams = self.random(device, (3, 4), (5, 6))
        for policy in (
            {"flips": [False, True]},
            {"normalize": None, "reduce": "mean"},
            {"normalize": "minmax", "reduce": "max"},
            {"normalize": "seam", "activation": "fused_relu"},
        ):
            labels = cam_label(cams, (13, 21), background=background, backend=backend, **policy)
            self.check(labels, by_argmax(cams, (13, 21), background, **policy))

    def test_equals_irn_labels_at_its_threshold(self, device, backend, golden):
        a = golden("irn_make_cam")
        keys = torch.from_numpy(a["keys"]).long()
        cams = [torch.from_numpy(a[f"scale{i}_cam"])[None, keys].to(device) for i in range(4)]
        size = tuple(a["size"].tolist())
        labels = cam_label(cams, size, background=0.15, keys=keys.to(device), grid=(48, 64), backend=backend)[0].cpu()
        scores = np.pad(a["high_res"], ((1, 0), (0, 0), (0, 0)), constant_values=0.15)
        np.testing.assert_array_equal(labels.numpy(), np.pad(a["keys"] + 1, (1, 0))[scores.argmax(0)])

    def test_ties_go_to_background_then_to_the_lower_class(self, device, backend):
        view = torch.tensor([0.5, 0.25, 0.0], device=device)[None, None, None].expand(1, 2, 1, 3)
        labels = cam_label([view], (1, 3), background=0.25, normalize=None, backend=backend)
        assert labels.tolist() == [[[1, 0, 0]]]

    def test_absent_classes_never_win_even_against_a_negative_background(self, device, backend):
        view = torch.full((2, 2, 1, 1), 0.5, device=device)
        present = torch.tensor([[False, True], [False, False]], device=device)
        labels = cam_label([view], (2, 2), background=-1.0, present=present, backend=backend)
        assert labels.flatten(1).tolist() == [[2] * 4, [0] * 4]
        none = cam_label([view[:, :0]], (2, 2), background=-1.0, backend=backend)
        assert (none == 0).all() and none.shape == (2, 2, 2)

    def test_zero_map_is_background_and_nan_wins(self, device, backend):
        view = torch.zeros(1, 2, 2, 2, device=device)
        assert (cam_label([view], (3, 3), background=0.0, backend=backend) == 0).all()
        view[0, 1, 0, 0] = torch.nan
        for background in (0.9, ("power", 3)):
            assert (cam_label([view], (3, 3), background=background, backend=backend) == 2).all()

    def test_keys_name_the_channels(self, device, backend):
        cams = self.random(device, (3, 4), C=4)
        keys = torch.tensor([1, 7, 200, 253])
        labels = cam_label(cams, (9, 9), background=0.3, keys=keys.to(device), backend=backend)
        self.check(labels, by_argmax(cams, (9, 9), 0.3, keys))
        selected = cam_label(
            [c[:, 1:3] for c in cams], (9, 9), background=0.3, keys=keys[1:3].to(device), backend=backend
        )
        masked = torch.tensor([[False, True, True, False]], device=device)
        everything = cam_label(cams, (9, 9), background=0.3, keys=keys.to(device), present=masked, backend=backend)
        assert torch.equal(selected, everything)

    def test_half_views_are_compared_in_float32(self, device, backend):
        cams = [c.half() for c in self.random(device, (3, 4), (5, 6))]
        labels = cam_label(cams, (40, 50), background=0.3, backend=backend)
        assert torch.equal(labels, cam_label([c.float() for c in cams], (40, 50), background=0.3, backend=backend))

    def test_opcheck(self, device, backend):
        (cams, size), options = self.inputs(self.small, torch.float32, device)
        labels = torch.arange(1, 4, dtype=torch.uint8, device=device)
        policy = [False, True], list(size), list(size), "relu", "sum", "max", False, 1e-5, backend
        torch.library.opcheck(FWD, (cams, labels, 0.4, options["present"], *policy))

    def test_exceptions(self, device, backend):
        a = torch.ones(1, 2, 3, 4, device=device)
        for match, error, options in (
            (r"at most 254 classes, got 300", ValueError, {"cams": [a[:, :1].expand(1, 300, 3, 4)]}),
            (r"expected keys \(2,\) on .*, got \(3,\)", ValueError, {"keys": torch.arange(3, device=device)}),
            (r"expected keys of dtype int64, got int32", TypeError, {"keys": torch.arange(2, device=device).int()}),
            (r"expected background a number or .*, got \('power', 0\)", ValueError, {"background": ("power", 0)}),
            (r"expected background to be a number, got nan", ValueError, {"background": float("nan")}),
            (r"expected reduce ", ValueError, {"reduce": "min"}),
        ):
            arguments = {"cams": [a], "size": (2, 2), "background": 0.3, **options}
            with pytest.raises(error, match="^cam_label: .*" + match):
                cam_label(**arguments, backend=backend)
        if device == "cpu":
            with pytest.raises(ValueError, match=r"^cam_label: expected keys from 0 to 253, got 254"):
                cam_label([a], (2, 2), background=0.3, keys=torch.tensor([0, 254]), backend=backend)


def test_cpp_labels_are_those_of_its_fused_maps():
    g = torch.Generator().manual_seed(0)
    cams = [torch.rand(2, 5, n, n + 3, generator=g) for n in (5, 8, 13)]
    maps = cam_fuse(cams, (97, 131), backend="cpp")
    best, channel = maps.max(1)
    labels = cam_label(cams, (97, 131), background=0.35, backend="cpp")
    assert torch.equal(labels.long(), torch.where(best > 0.35, channel + 1, 0))
    plain = sum(F.interpolate(c, (97, 131), mode="bilinear", align_corners=False) for c in cams)
    plain = plain / (plain.amax((2, 3), keepdim=True) + 1e-5)
    agree = labels.long() == torch.where(plain.amax(1) > 0.35, plain.argmax(1) + 1, 0)
    assert agree.float().mean() > 0.999


def test_triton_kernel_compiles_for_several_gpu_generations():
    kernels = pytest.importorskip("fastcam.kernels.cam_label")
    pointers = {"low_ptr": "*fp16", "shapes_ptr": "*i32", "present_ptr": "*u8", "stats_ptr": "*fp32"}
    sizes = dict.fromkeys(("C", "H", "W", "grid_h", "grid_w", "S", "L", "tiles_w"), "i32")
    numbers = dict.fromkeys(("scale", "eps", "background"), "fp32")
    signature = {**pointers, "labels_ptr": "*u8", "out_ptr": "*u8", **sizes, **numbers}
    flags = {"NORMALIZE": 3, "ACTIVATION": 3, "REDUCE": 0, "ALIGN": False, "BLOCK_H": 8, "BLOCK_W": 128}
    compile_for_gpus(kernels._cam_label_kernel, signature, flags)
