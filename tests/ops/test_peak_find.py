import itertools
import math

import pytest
import torch
from op_tester import OpTester, compile_for_gpus

import fastcam
from fastcam import peak_find
from fastcam.ops.peak_find import CANDIDATES, FWD


def by_hand(maps, window, threshold):
    """Every pixel against its window, one at a time."""
    found, reach = [], window // 2
    for b, c in itertools.product(*map(range, maps.shape[:2])):
        plane = torch.where(maps[b, c].isnan(), -torch.inf, maps[b, c]).double()
        values = sorted(plane.flatten().tolist())
        least = {
            "median": lambda v: v[(len(v) - 1) // 2],
            "mean": lambda v: min(sum(v) / len(v), v[-1]),
            "max": lambda v: v[-1],
        }.get(threshold, lambda v: -math.inf if threshold is None else threshold)(values)
        for y, x in itertools.product(*map(range, plane.shape)):
            top, left = max(0, y - reach), max(0, x - reach)
            part = plane[top : y + reach + 1, left : x + reach + 1]
            first = int(part.argmax())  # of equal values any: so ask for the first of them
            first = int((part.flatten() == part.flatten()[first]).nonzero()[0])
            here = divmod(first, part.shape[1]) == (y - top, x - left)
            if here and plane[y, x] >= least and plane[y, x] > -math.inf:
                found.append([b, c, y, x])
    return torch.tensor(found, dtype=torch.int64).view(-1, 4)


class TestPeakFind(OpTester):
    op = staticmethod(peak_find)
    candidates = CANDIDATES
    # (B, C, H, W, window, threshold)
    cases = (
        (0, 3, 4, 5, 3, "median"),
        (2, 3, 0, 5, 3, "mean"),
        (1, 1, 1, 1, 3, "max"),
        (2, 3, 1, 70, 5, None),
        (2, 2, 67, 1, 7, "median"),
        (2, 3, 37, 61, 3, 0.25),
        (1, 2, 65, 129, 9, "mean"),
        (3, 4, 71, 67, 3, "median"),
    )
    small = (2, 2, 9, 7, 3, "median")
    has_backward = False

    def inputs(self, case, dtype, device):
        B, C, H, W, window, threshold = case
        g = torch.Generator().manual_seed(0)
        maps = torch.randn(B, C, H, W, generator=g, dtype=torch.float64)
        maps[:, ::2] = (4 * maps[:, ::2]).round()  # plateaus
        return (maps.to(device, dtype),), {"window": window, "threshold": threshold}

    @pytest.mark.parametrize("threshold", ["median", "mean", "max", 0.5, None])
    @pytest.mark.parametrize("window", [3, 5])
    def test_equals_a_loop_over_pixels(self, device, backend, window, threshold):
        ((maps,), _) = self.inputs((2, 2, 11, 9, 3, None), torch.float32, device)
        maps[0, 0, 3, 4:6] = torch.tensor([torch.nan, torch.inf])
        maps[1, 1, :4] = -torch.inf
        actual = peak_find(maps, window=window, threshold=threshold, backend=backend).cpu()
        assert torch.equal(actual, by_hand(maps.cpu(), window, threshold))

    def test_equals_the_authors_peaks(self, device, backend, golden):
        a = {name: torch.from_numpy(value).to(device) for name, value in golden("prm_stimulation").items()}
        filters = {"none": None, "median": "median", "mean": "mean", "max": "max", "const": 0.5}
        for window, (name, threshold) in itertools.product((3, 5, 7), filters.items()):
            actual = peak_find(a["rnd_in"], window=window, threshold=threshold, backend=backend)
            assert torch.equal(actual, a[f"rnd_w{window}_{name}_peaks"]), (window, name)
        assert torch.equal(peak_find(a["plateau_in"], threshold=None, backend=backend), a["plateau_peaks"])

    @pytest.mark.parametrize("threshold", ["median", "mean", "max", 0.1, None])
    def test_flat_map_has_its_top_left_pixel_alone(self, device, backend, threshold):
        maps = torch.full((1, 1, 5, 4), 0.1, device=device)
        if threshold == 0.1:  # float32(0.1) is above 0.1
            assert float(maps[0, 0, 0, 0]) > 0.1
        assert peak_find(maps, threshold=threshold, backend=backend).tolist() == [[0, 0, 0, 0]]

    def test_ramp_has_its_maximal_corner_alone(self, device, backend):
        ramp = torch.arange(6.0, device=device)[:, None] + torch.arange(7.0, device=device)
        assert peak_find(ramp[None, None], threshold=None, backend=backend).tolist() == [[0, 0, 5, 6]]
        assert peak_find(ramp.flip(0, 1)[None, None], threshold=None, backend=backend).tolist() == [[0, 0, 0, 0]]

    @pytest.mark.parametrize("window", [3, 5, 9])
    def test_two_peaks_are_further_apart_than_the_reach(self, device, backend, window):
        ((maps,), _) = self.inputs((1, 2, 40, 23, 3, None), torch.float32, device)
        peaks = peak_find(maps, window=window, threshold=None, backend=backend)
        reach = window // 2
        for c in range(2):
            places = peaks[peaks[:, 1] == c][:, 2:]
            distance = (places[:, None] - places).abs().amax(dim=2).fill_diagonal_(99)
            assert distance.min() > reach
            assert len(places) <= math.ceil(40 / (reach + 1)) * math.ceil(23 / (reach + 1))

    def test_adding_a_constant_moves_no_peak(self, device, backend):
        ((maps,), _) = self.inputs((1, 2, 20, 23, 3, None), torch.float32, device)
        maps = maps.round()
        assert torch.equal(peak_find(maps, backend=backend), peak_find(maps + 3, backend=backend))
        assert torch.equal(peak_find(maps, backend=backend), peak_find(2 * maps, backend=backend))

    def test_nan_counts_as_minus_infinity_which_is_no_peak(self, device, backend):
        maps = torch.tensor([[[[torch.nan, 1.0, torch.nan, torch.nan]]]], device=device)
        assert peak_find(maps, threshold=None, backend=backend).tolist() == [[0, 0, 0, 1]]
        assert len(peak_find(torch.full_like(maps, torch.nan), backend=backend)) == 0
        assert len(peak_find(torch.full_like(maps, -torch.inf), threshold=None, backend=backend)) == 0

    @pytest.mark.parametrize("spread", ["normal", "two values", "sorted", "mostly zero", "one step"])
    def test_threshold_of_a_large_map_is_its_median(self, device, backend, spread):
        if backend == "triton":
            pytest.skip("its median is torch's")
        x = torch.randn(70 * 71, generator=torch.Generator().manual_seed(1), device=device)
        x = {
            "normal": x,
            "two values": (x > 0).float(),
            "sorted": x.sort()[0],
            "mostly zero": x.clamp(min=1.5),
            "one step": torch.where(torch.arange(len(x)) % 17 == 0, x, x + 9),  # misleads a sample of every 17th
        }[spread]
        median = x.sort()[0][(len(x) - 1) // 2]
        maps = x.view(1, 1, 70, 71)
        every = peak_find(maps, threshold=None, backend=backend)
        expected = every[maps[0, 0, every[:, 2], every[:, 3]] >= median]
        assert torch.equal(peak_find(maps, backend=backend), expected)
        assert len(expected) > 0

    def test_compiles_without_graph_breaks(self, device, backend):
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
            super().test_compiles_without_graph_breaks(device, backend)

    def test_opcheck(self, device, backend):
        ((maps,), _) = self.inputs(self.small, torch.float32, device)
        torch.library.opcheck(FWD, (maps, 3, "median", 0.0, backend))

    def test_exceptions(self, device, backend):
        maps = torch.ones(1, 1, 4, 4, device=device)
        with pytest.raises(ValueError, match=r"^peak_find: expected maps \(B, C, H, W\), got \(4, 4\)"):
            fastcam.peak_find(maps[0, 0])
        for window in (1, 4):
            with pytest.raises(ValueError, match=f"expected an odd window of at least 3, got {window}"):
                fastcam.peak_find(maps, window=window)
        with pytest.raises(ValueError, match=r"expected threshold 'median', .* got 'most'"):
            fastcam.peak_find(maps, threshold="most")
        with pytest.raises(ValueError, match=r"expected threshold 'median', .* got nan"):
            fastcam.peak_find(maps, threshold=math.nan)


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_triton_kernel_compiles_for_several_gpu_generations(dtype):
    kernels = pytest.importorskip("fastcam.kernels.peak_find")
    numbers = ["C", "H", "W", *(f"maps_stride_{i}" for i in "bchw"), "reach"]
    compile_for_gpus(
        kernels._peak_find_fwd_kernel,
        {"maps_ptr": f"*{dtype}", "threshold_ptr": "*fp32", "peak_ptr": "*i8", **dict.fromkeys(numbers, "i32")},
        kernels.blocks(),
    )
