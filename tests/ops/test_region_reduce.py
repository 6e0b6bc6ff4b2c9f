from typing import ClassVar

import numpy as np
import pytest
import torch
from op_tester import OpTester

from fastcam import region_reduce
from fastcam.ops.region_reduce import BWD, CANDIDATES, FWD, HIST


class TestRegionReduce(OpTester):
    op = staticmethod(region_reduce)
    candidates = CANDIDATES
    # (B, C, H, W, S, reduce)
    cases: ClassVar = [
        (0, 2, 3, 4, 5, "mean"),
        (1, 1, 1, 1, 1, "mean"),
        (2, 3, 13, 17, 6, "mean"),
        (2, 3, 13, 17, 6, "sum"),
        (2, 3, 13, 17, 6, "max"),
        (1, 2, 80, 71, 300, "max"),
        (1, 4, 90, 71, 40, "sum"),
    ]
    small: ClassVar = (2, 2, 5, 6, 4, "mean")

    def inputs(self, case, dtype, device):
        B, C, H, W, S, reduce = case
        g = torch.Generator().manual_seed(0)
        values = torch.randn(B, C, H, W, generator=g, dtype=torch.float64).to(device, dtype)
        labels = torch.randint(0, S, (B, H, W), generator=g).to(device)
        return (values, labels), {"reduce": reduce, "num_regions": S}

    @pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
    def test_gradient_of_every_reduction(self, device, backend, reduce):
        (values, labels), options = self.inputs(self.small, torch.float64, device)
        options["reduce"] = reduce
        labels = labels.clamp(max=2)  # one region without pixels, whose maximum is -inf
        labels[0, 0, 0] = -1
        options["num_regions"] = 3
        assert torch.autograd.gradcheck(
            lambda v: region_reduce(v, labels, **options, backend=backend), values.requires_grad_()
        )

    @pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
    def test_agrees_with_scipy(self, device, backend, reduce):
        ndimage = pytest.importorskip("scipy.ndimage")
        (values, labels), _ = self.inputs((2, 3, 23, 19, 7, reduce), torch.float64, device)
        out = region_reduce(values, labels, reduce=reduce, backend=backend).cpu().numpy()
        function = {"mean": ndimage.mean, "sum": ndimage.sum_labels, "max": ndimage.maximum}[reduce]
        for b in range(2):
            for c in range(3):
                expected = function(values[b, c].cpu().numpy(), labels[b].cpu().numpy(), np.arange(7))
                np.testing.assert_allclose(out[b, :, c], expected, rtol=1e-12)

    def test_histogram_agrees_with_numpy(self, device, backend):
        (values, labels), _ = self.inputs((2, 3, 23, 19, 7, "hist"), torch.float32, device)
        out = region_reduce(values, labels, reduce="hist", bins=5, range=(-1.5, 1.0), backend=backend)
        assert out.dtype == torch.int64
        for b in range(2):
            for c in range(3):
                for s in range(7):
                    mine = values[b, c][labels[b] == s].cpu().double().clamp(-1.5, 1.0 - 1e-9)
                    assert out[b, s, c].tolist() == np.histogram(mine, 5, (-1.5, 1.0))[0].tolist()

    def test_histogram_leaves_out_nan_and_takes_infinity_at_the_ends(self, device, backend):
        values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.5, 1.0], device=device).reshape(1, 1, 1, 5)
        labels = torch.zeros(1, 1, 5, dtype=torch.int64, device=device)
        assert region_reduce(values, labels, reduce="hist", bins=2, backend=backend).flatten().tolist() == [1, 3]

    def test_vote_is_the_most_frequent_and_the_lower_of_two(self, device, backend):
        values = torch.tensor([3, 3, 1, 2, 1, 255, 255, -1], device=device).reshape(1, 1, 1, 8)
        labels = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2], device=device).reshape(1, 1, 8)
        assert region_reduce(values, labels, reduce="vote", bins=4, backend=backend).flatten().tolist() == [3, 1, -1]

    def test_vote_again_changes_nothing(self, device, backend):
        g = torch.Generator().manual_seed(2)
        labels = torch.randint(0, 9, (1, 20, 20), generator=g).to(device)
        classes = torch.randint(0, 4, (1, 1, 20, 20), generator=g).to(device)
        once = region_reduce(classes, labels, reduce="vote", bins=4, backend=backend)[0, :, 0][labels]
        twice = region_reduce(once[:, None], labels, reduce="vote", bins=4, backend=backend)[0, :, 0][labels]
        assert torch.equal(once, twice)

    def test_regions_without_pixels_and_pixels_without_region(self, device, backend):
        values = torch.tensor([5.0, 7.0, 9.0], device=device).reshape(1, 1, 1, 3)
        labels = torch.tensor([2, -1, 2], device=device).reshape(1, 1, 3)
        for reduce, expected in (("mean", [0, 0, 7]), ("sum", [0, 0, 14]), ("max", [-torch.inf, -torch.inf, 9])):
            assert region_reduce(values, labels, reduce=reduce, backend=backend).flatten().tolist() == expected

    def test_nan_stays_in_its_region(self, device, backend):
        values = torch.tensor([torch.nan, 1.0, 2.0, 3.0], device=device).reshape(1, 1, 1, 4)
        labels = torch.tensor([0, 0, 1, 1], device=device).reshape(1, 1, 4)
        for reduce in ("mean", "sum", "max"):
            out = region_reduce(values, labels, reduce=reduce, backend=backend).flatten()
            assert out[0].isnan()
            assert out[1] == {"mean": 2.5, "sum": 5, "max": 3}[reduce]

    def test_first_of_equal_maxima_gets_the_gradient(self, device, backend):
        values = torch.tensor([1.0, 4.0, 4.0], device=device).reshape(1, 1, 1, 3).requires_grad_()
        region_reduce(values, torch.zeros(1, 1, 3, dtype=torch.int64, device=device), reduce="max",
                      backend=backend).sum().backward()  # fmt: skip
        assert values.grad.flatten().tolist() == [0, 1, 0]

    def test_sum_over_a_large_region_keeps_its_digits(self, device, backend):
        values = torch.full((1, 1, 1000, 1000), 0.1, device=device)
        labels = torch.zeros(1, 1000, 1000, dtype=torch.int64, device=device)
        mean = region_reduce(values, labels, backend=backend)
        assert abs(float(mean) - 0.1) < 1e-7

    def test_opcheck(self, device, backend):
        (values, labels), _ = self.inputs(self.small, torch.float32, device)
        for reduce in ("mean", "max"):
            out, stat = FWD(values, labels, 4, reduce, backend)
            torch.library.opcheck(FWD, (values, labels, 4, reduce, backend))
            torch.library.opcheck(BWD, (out, labels, stat, reduce, backend))
        torch.library.opcheck(HIST, (values, labels, 4, 3, 0.0, 1.0, backend))

    def test_exceptions(self, device, backend):
        values, labels = torch.zeros(1, 2, 3, 4, device=device), torch.zeros(1, 3, 4, dtype=torch.int64, device=device)
        for match, error, arguments in (
            (r"values \(B, C, H, W\) and labels \(B, H, W\), got \(2, 3, 4\)", ValueError, {"values": values[0]}),
            (r"got \(1, 2, 3, 4\) and \(1, 3, 3\)", ValueError, {"labels": labels[:, :, :3]}),
            (r"expected reduce in .*, got 'min'", ValueError, {"reduce": "min"}),
            (r"bins of at least 1, got 0", ValueError, {"bins": 0}),
            (r"a range that rises, got \(1, 1\)", ValueError, {"range": (1, 1)}),
            (r"num_regions >= 0, got -1", ValueError, {"num_regions": -1}),
            (r"labels of an integer dtype, got float32", TypeError, {"labels": labels.float()}),
            (r"values of an integer dtype, got float32", TypeError, {"reduce": "vote"}),
            (r"values of dtype float32, float16, bfloat16 or float64, got int64", TypeError, {"values": values.long()}),
        ):
            with pytest.raises(error, match=r"^region_reduce: .*" + match):
                region_reduce(**{"values": values, "labels": labels, **arguments}, backend=backend)
        for reduce in ("mean", "max", "hist"):
            with pytest.raises(ValueError, match=r"^region_reduce: expected labels below num_regions 3, got 7"):
                region_reduce(values, labels + 7, num_regions=3, reduce=reduce, backend=backend)
