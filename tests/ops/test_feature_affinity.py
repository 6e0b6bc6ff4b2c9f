import numpy as np
import pytest
import torch
from op_tester import OpTester, compile_for_gpus

from fastcam import feature_affinity
from fastcam._paths import destinations
from fastcam.ops.feature_affinity import BWD, CANDIDATES, FWD


class TestFeatureAffinity(OpTester):
    op = staticmethod(feature_affinity)
    candidates = CANDIDATES
    # (B, D, H, W, radius, sources); images smaller than the radius, and widths that are no multiple of a vector
    cases = (
        (0, 2, 4, 5, 3, "all"),
        (1, 1, 1, 1, 5, "all"),
        (1, 3, 3, 4, 10, "inner"),
        (2, 2, 4, 5, 1, "all"),
        (2, 5, 12, 37, 5, "inner"),
        (2, 9, 21, 70, 4, "all"),
    )
    small = (2, 3, 5, 6, 3, "all")

    def inputs(self, case, dtype, device):
        B, D, H, W, radius, sources = case
        features = torch.randn(B, D, H, W, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return (features.to(device, dtype),), {"radius": radius, "sources": sources}

    @pytest.mark.parametrize("sources", ["all", "inner"])
    def test_equals_the_formula_pair_by_pair(self, device, backend, sources):
        f = np.random.default_rng(0).standard_normal((4, 6, 7)).astype(np.float32)
        actual = feature_affinity(torch.from_numpy(f)[None].to(device), radius=3, sources=sources, backend=backend)
        expected = np.zeros((12, 6, 7))
        for p, (dy, dx) in enumerate(destinations(3)):
            for y in range(6):
                for x in range(7):
                    pair = y + dy < 6 and 0 <= x + dx < 7
                    if sources == "inner":  # AffinityNet's sources: rows 0..h-3, columns 2..w-3 for radius 3
                        pair = pair and y <= 6 - 3 and 2 <= x <= 7 - 3
                    if pair:
                        expected[p, y, x] = np.exp(-np.abs(f[:, y, x] - f[:, y + dy, x + dx]).mean())
        np.testing.assert_allclose(actual[0].cpu().numpy(), expected, rtol=1e-5, atol=1e-7)

    def test_inner_sources_leave_ten_pixels_without_neighbours(self, device, backend):
        a = feature_affinity(torch.zeros(1, 1, 12, 15, device=device), sources="inner", backend=backend)[0].cpu()
        reached = torch.zeros(12, 15, dtype=torch.bool)
        for plane, (dy, dx) in zip(a, destinations(5), strict=True):
            for y, x in plane.nonzero().tolist():
                reached[y, x] = reached[y + dy, x + dx] = True
        assert (~reached).sum() == 10
        assert not reached[0, :4].any()  # four in the top left row, three in each lower corner
        assert (~reached[-4:, :4]).sum() == 3
        assert (~reached[-4:, -4:]).sum() == 3

    def test_equal_features_give_one_and_no_gradient(self, device, backend):
        f = torch.full((1, 3, 4, 5), 2.0, device=device, requires_grad=True)
        a = feature_affinity(f, radius=2, backend=backend)
        assert set(a.unique().tolist()) == {0.0, 1.0}
        a.sum().backward()
        assert (f.grad == 0).all()

    def test_nan_feature_makes_its_pairs_nan(self, device, backend):
        f = torch.zeros(1, 2, 1, 4, device=device)
        f[0, 1, 0, 2] = torch.nan
        a = feature_affinity(f, radius=2, backend=backend)[0, 0, 0]
        assert a.isnan().tolist() == [False, True, True, False]

    def test_distant_features_give_zero(self, device, backend):
        f = torch.tensor([0.0, 1e30, -torch.inf], device=device).reshape(1, 1, 1, 3)
        assert feature_affinity(f, radius=2, backend=backend)[0, 0, 0].tolist() == [0, 0, 0]

    def test_opcheck(self, device, backend):
        (f,), _ = self.inputs(self.small, torch.float32, device)
        torch.library.opcheck(FWD, (f, 3, 0, backend))
        out = FWD(f, 3, 0, backend)
        torch.library.opcheck(BWD, (torch.ones_like(out), f, out, 3, 0, backend))

    def test_exceptions(self, device, backend):
        with pytest.raises(ValueError, match=r"expected features \(B, D, H, W\) with D, H, W >= 1, got \(2, 4, 4\)"):
            feature_affinity(torch.ones(2, 4, 4, device=device))
        with pytest.raises(ValueError, match=r"got \(2, 0, 4, 4\)"):
            feature_affinity(torch.ones(2, 0, 4, 4, device=device))
        with pytest.raises(ValueError, match="expected radius >= 1, got 0"):
            feature_affinity(torch.ones(2, 1, 4, 4, device=device), radius=0)
        with pytest.raises(ValueError, match="expected sources 'all' or 'inner', got 'outer'"):
            feature_affinity(torch.ones(2, 1, 4, 4, device=device), sources="outer")


@pytest.mark.parametrize(("dtype", "D"), [("fp32", 448), ("bf16", 3)])
def test_triton_kernels_compile_for_several_gpu_generations(dtype, D):
    kernels = pytest.importorskip("fastcam.kernels.feature_affinity")
    shared = {"f_ptr": f"*{dtype}", "offsets_ptr": "*i32", "out_ptr": f"*{dtype}"}
    shared |= dict.fromkeys(("H", "W", "D", "P", "margin"), "i32")
    compile_for_gpus(kernels._feature_affinity_fwd_kernel, shared, kernels.blocks(D))
    gradients = {"grad_ptr": f"*{dtype}", "grad_f_ptr": f"*{dtype}"}
    compile_for_gpus(kernels._feature_affinity_bwd_kernel, {**gradients, **shared}, kernels.blocks(D))
