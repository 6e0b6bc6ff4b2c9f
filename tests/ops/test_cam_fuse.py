from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from op_tester import OpTester

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
        (1, 1, [(1, 1)], (1, 1), None, {"eps": 0.5}),
        (2, 5, [(3, 4), (3, 4), (2, 3), (7, 5)], (37, 50), (48, 64), {"flips": [False, True, False, True]}),
        (1, 3, [(3, 4), (3, 4), (5, 6)], (13, 71), None, {"reduce": "max", "normalize": "minmax", "activation": None}),
        (1, 2, [(9, 40), (11, 33)], (5, 7), None, {"align_corners": True, "normalize": None, "reduce": "mean"}),
        (2, 21, [(6, 5), (6, 5), (12, 9)], (130, 70), None, {"flips": [False, True, True], "normalize": "minmax"}),
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

    def test_refuses_no_view(self, device, backend):
        with pytest.raises(ValueError, match=r"^cam_fuse: expected at least one view in cams, got none"):
            cam_fuse([], (2, 2), backend=backend)

    def test_opcheck(self, device, backend):
        (cams, _), options = self.inputs(self.small, torch.float32, device)
        policy = options["present"], [False, True, True], [5, 7], [6, 8], True, "sum", "max", False, 1e-5, backend
        torch.library.opcheck(FWD, (cams, *policy))
        out, stats = FWD(cams, *policy)
        torch.library.opcheck(BWD, (torch.ones_like(out), cams, stats, *policy))
