import numpy as np
import pytest
import torch
from op_tester import OpTester, compile_for_gpus

from fastcam import path_affinity
from fastcam._paths import destinations, paths
from fastcam.ops.path_affinity import BWD, CANDIDATES, FWD


class TestPathAffinity(OpTester):
    op = staticmethod(path_affinity)
    candidates = CANDIDATES
    # (B, H, W, radius); images smaller than the radius, and widths that are no multiple of a vector
    cases = ((0, 4, 5, 3), (1, 1, 1, 5), (1, 3, 4, 10), (2, 7, 9, 1), (2, 12, 37, 5), (3, 41, 70, 4))
    small = (2, 5, 6, 3)

    def inputs(self, case, dtype, device):
        B, H, W, radius = case
        edge = torch.rand(B, H, W, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return ((0.1 + 0.8 * edge).to(device, dtype),), {"radius": radius}

    @pytest.mark.parametrize("radius", [3, 5])
    def test_equals_maxima_over_the_authors_indices(self, device, backend, radius, golden):
        arrays = {k.removeprefix(f"r{radius}_"): v for k, v in golden("irn_path_index").items()}
        H, W = arrays["size"]
        edge = torch.rand(1, H, W, generator=torch.Generator().manual_seed(1))
        flat = edge.flatten().numpy()
        groups = [flat[arrays[f"path_indices_g{i}"]].max(1) for i in range(arrays["n_groups"])]
        expected = 1 - np.concatenate(groups)
        actual = path_affinity(edge.to(device), radius=radius, backend=backend).flatten(2)[0].cpu().numpy()
        np.testing.assert_array_equal(actual[:, arrays["src_indices"]], expected)

    def test_no_boundary_gives_one_inside_and_zero_where_the_destination_is_outside(self, device, backend):
        a = path_affinity(torch.zeros(1, 4, 6, device=device), radius=3, backend=backend)[0].cpu()
        for plane, (dy, dx) in zip(a, destinations(3), strict=True):
            inside = [[y + dy < 4 and 0 <= x + dx < 6 for x in range(6)] for y in range(4)]
            assert torch.equal(plane, torch.tensor(inside).float())

    def test_nothing_crosses_a_column_of_boundary(self, device, backend):
        edge = torch.zeros(1, 5, 7, device=device)
        edge[:, :, 3] = 1
        a = path_affinity(edge, radius=5, backend=backend)[0].cpu()
        for plane, (_, dx) in zip(a, destinations(5), strict=True):
            for x in range(7):
                if min(x, x + dx) <= 3 <= max(x, x + dx):
                    assert (plane[:, x] == 0).all()

    def test_values_outside_0_1_count_as_0_or_1_and_get_no_gradient(self, device, backend):
        edge = torch.tensor([[[-0.5, 0.25, 0.5, 1.5]]], device=device, requires_grad=True)
        clamped = edge.detach().clamp(0, 1)
        out = path_affinity(edge, radius=2, backend=backend)
        assert torch.equal(out, path_affinity(clamped, radius=2, backend=backend))
        out.sum().backward()
        assert edge.grad.flatten().tolist() == [0, -1, -1, 0]  # pairs (0, 1), (1, 2); 1.5 holds the maximum of (2, 3)

    def test_gradient_of_tied_maxima_goes_to_the_pixel_nearest_to_the_destination(self, device, backend):
        edge = torch.full((1, 1, 3), 0.5, device=device, requires_grad=True)
        path_affinity(edge, radius=3, backend=backend)[:, destinations(3).index((0, 2))].sum().backward()
        assert edge.grad.flatten().tolist() == [0, 0, -1]

    def test_nan_makes_the_pairs_across_it_nan_and_nothing_else(self, device, backend):
        edge = torch.tensor([[[0.1, -torch.nan, 0.2, 0.3, 0.4]]], device=device, requires_grad=True)
        out = path_affinity(edge, radius=3, backend=backend)
        assert out[0, 0, 0].isnan().tolist() == [True, True, False, False, False]  # destination (0, 1)
        assert out[0, 2, 0].isnan().tolist() == [True, True, False, False, False]  # destination (0, 2)
        out.sum().backward()
        assert edge.grad.isfinite().all()

    def test_opcheck(self, device, backend):
        (edge,), _ = self.inputs(self.small, torch.float32, device)
        torch.library.opcheck(FWD, (edge, 3, backend))
        torch.library.opcheck(BWD, (FWD(edge, 3, backend), edge, 3, backend))

    def test_exceptions(self, device, backend):
        with pytest.raises(ValueError, match=r"expected edge \(B, H, W\) with H, W >= 1, got \(2, 1, 4, 4\)"):
            path_affinity(torch.ones(2, 1, 4, 4, device=device))
        with pytest.raises(ValueError, match=r"got \(2, 0, 4\)"):
            path_affinity(torch.ones(2, 0, 4, device=device))
        with pytest.raises(ValueError, match="expected radius >= 1, got 0"):
            path_affinity(torch.ones(2, 4, 4, device=device), radius=0)


@pytest.mark.parametrize("radius", [3, 5, 10])
def test_paths_are_the_authors_in_their_order(radius, golden):
    arrays = golden("irn_path_index")
    groups = [arrays[f"r{radius}_paths_g{i}"] for i in range(arrays[f"r{radius}_n_groups"])]
    expected = [[tuple(pixel) for pixel in path] for group in groups for path in group]
    assert [list(path) for path in paths(radius)] == expected
    assert [tuple(d) for d in arrays[f"r{radius}_search_dst"]] == list(destinations(radius))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_triton_kernels_compile_for_several_gpu_generations(dtype):
    kernels = pytest.importorskip("fastcam.kernels.path_affinity")
    shared = {"edge_ptr": f"*{dtype}", "offsets_ptr": "*i32", "starts_ptr": "*i32", "winner_ptr": "*i16"}
    shared |= dict.fromkeys(("H", "W", "P"), "i32")
    size = {"BLOCK_N": kernels.BLOCK_N}
    for winners in (False, True):
        compile_for_gpus(
            kernels._path_affinity_fwd_kernel, {"out_ptr": f"*{dtype}", **shared}, {"WINNERS": winners, **size}
        )
    gradients = {"grad_ptr": f"*{dtype}", "grad_edge_ptr": f"*{dtype}"}
    compile_for_gpus(kernels._path_affinity_bwd_kernel, {**gradients, **shared}, size)
