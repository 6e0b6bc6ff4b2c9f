import math
import os

import numpy as np
import pytest
import torch
from op_tester import OpTester, compile_for_gpus

from fastcam import path_affinity, random_walk
from fastcam._chebyshev import coefficients, walk_degree
from fastcam._paths import destinations, paths
from fastcam.ops.random_walk import BWD, CANDIDATES, FWD

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def dense_transition(affinity, radius, beta):
    """T, written plainly: a symmetric matrix of affinities, to the power beta, each column divided by its sum."""
    H, W = affinity.shape[1:]
    a = np.eye(H * W)
    for p, (dy, dx) in enumerate(destinations(radius)):
        for y in range(H):
            for x in range(W):
                if y + dy < H and 0 <= x + dx < W:
                    i, j = y * W + x, (y + dy) * W + x + dx
                    a[i, j] = a[j, i] = affinity[p, y, x] ** beta
    return a / a.sum(0)


class TestRandomWalk(OpTester):
    op = staticmethod(random_walk)
    candidates = CANDIDATES
    # (B, C, H, W, radius, steps, method); images smaller than the radius, one to many channels, odd and even steps
    cases = (
        (0, 2, 4, 5, 3, 4, "chebyshev"),
        (2, 0, 4, 5, 3, 4, "chebyshev"),
        (1, 1, 1, 1, 3, 64, "chebyshev"),
        (1, 3, 3, 4, 7, 9, "steps"),
        (2, 2, 4, 5, 1, 64, "chebyshev"),
        (1, 1, 9, 21, 5, 64, "chebyshev"),
        (1, 4, 12, 37, 5, 33, "chebyshev"),
        (2, 7, 23, 18, 4, 40, "chebyshev"),
    )
    small = (2, 2, 4, 5, 3, 6 if INTERPRETED else 24, "chebyshev")  # six: no recursion, which the dense test covers

    def inputs(self, case, dtype, device):
        B, C, H, W, radius, steps, method = case
        g = torch.Generator().manual_seed(0)
        x = torch.rand(B, C, H, W, generator=g, dtype=torch.float64)
        affinity = torch.rand(B, len(destinations(radius)), H, W, generator=g, dtype=torch.float64)
        options = {
            "radius": radius,
            "steps": steps,
            "method": method,
            "beta": 2.5 if C == 4 else 20.0,
        }  # high: else maps mix and gradients cancel
        return (x.to(device, dtype),), {"affinity": affinity.to(device, dtype), **options}

    @pytest.mark.parametrize("method", ["chebyshev", "steps"])
    @pytest.mark.parametrize("steps", [0, 1, 7, 64, 256])
    def test_equals_dense_matrix_power(self, device, backend, method, steps):
        if INTERPRETED and steps > (7 if method == "steps" else 64):
            pytest.skip("takes the interpreter minutes")
        rng = np.random.default_rng(0)
        affinity = rng.random((34, 7, 9)) ** 0.2  # many near 1, as between boundaries
        x = rng.random((3, 7, 9))
        T = np.linalg.matrix_power(dense_transition(affinity, 5, 10), steps)
        a = torch.from_numpy(affinity)[None].to(device, torch.float32)
        y = random_walk(
            torch.from_numpy(x)[None].to(device, torch.float32), a, steps=steps, method=method, backend=backend
        )
        expected = (x.reshape(3, -1) @ T).reshape(x.shape)
        np.testing.assert_allclose(y[0].cpu().numpy(), expected, rtol=0, atol=1e-4)  # as promised

    def test_equals_irn_on_a_map_padded_with_boundaries(self, device, backend):
        """The published recipe: pad by the radius, dense affinities between all pixels, crop, power, squarings."""
        if INTERPRETED:
            pytest.skip("takes the interpreter minutes")
        radius, H, W = 3, 6, 7
        rng = np.random.default_rng(0)
        edge, x = rng.random((H, W)) ** 3, rng.random((2, H, W))
        padded = np.pad(edge, ((0, radius), (radius, radius)), constant_values=1.0)
        full = np.eye(padded.size).reshape(*padded.shape, *padded.shape)
        for path in paths(radius):
            (dy, dx), margin = path[0], radius - 1
            for r in range(padded.shape[0] - margin):
                for c in range(margin, padded.shape[1] - margin):
                    value = 1 - max(padded[r + y, c + x_] for y, x_ in path)
                    full[r, c, r + dy, c + dx] = full[r + dy, c + dx, r, c] = value
        dense = full[:-radius, radius:-radius, :-radius, radius:-radius].reshape(H * W, H * W)
        T = dense**10 / (dense**10).sum(0)
        for _ in range(8):
            T = T @ T
        expected = ((x * (1 - edge)).reshape(2, -1) @ T).reshape(x.shape)
        e = torch.from_numpy(edge)[None].to(device, torch.float32)
        x_in = torch.from_numpy(x)[None].to(device, torch.float32) * (1 - e)
        actual = random_walk(x_in, path_affinity(e, radius=radius), radius=radius, beta=10, steps=256, backend=backend)
        np.testing.assert_allclose(actual[0].cpu().numpy(), expected, rtol=0, atol=1e-4)

    def test_gradient_is_the_transposed_dense_power(self, device, backend):
        rng = np.random.default_rng(1)
        affinity, g = rng.random((12, 4, 5)), rng.standard_normal((2, 4, 5))
        T = np.linalg.matrix_power(dense_transition(affinity, 3, 2), 20)
        x = torch.zeros(1, 2, 4, 5, device=device, requires_grad=True)
        a = torch.from_numpy(affinity)[None].to(device, torch.float32)
        random_walk(x, a, radius=3, beta=2, steps=20, backend=backend).backward(
            torch.from_numpy(g)[None].to(device, torch.float32)
        )
        expected = (g.reshape(2, -1) @ T.T).reshape(g.shape)
        np.testing.assert_allclose(x.grad[0].cpu().numpy(), expected, rtol=0, atol=1e-4)

    def test_pixels_apart_keep_their_value_and_zero_maps_stay_zero(self, device, backend):
        x = torch.rand(1, 2, 5, 6, generator=torch.Generator().manual_seed(0)).to(device)
        x[:, 1] = 0
        nothing = torch.zeros(1, 12, 5, 6, device=device)
        y = random_walk(x, nothing, radius=3, steps=30, backend=backend)
        torch.testing.assert_close(y, x, rtol=0, atol=1e-4)
        assert (y[:, 1] == 0).all()

    def test_constants_stay(self, device, backend):
        (x,), kwargs = self.inputs(self.small, torch.float32, device)
        y = random_walk(torch.ones_like(x), **kwargs, backend=backend)
        torch.testing.assert_close(y, torch.ones_like(x), rtol=0, atol=1e-4)

    def test_nothing_crosses_a_boundary(self, device, backend):
        edge = torch.zeros(1, 5, 9, device=device)
        edge[:, :, 4] = 1
        x = torch.zeros(1, 1, 5, 9, device=device)
        x[..., :4] = 1
        y = random_walk(x, path_affinity(edge, radius=3), radius=3, steps=30, backend=backend)
        torch.testing.assert_close(y, x, rtol=0, atol=1e-4)

    def test_affinities_outside_0_1_are_clamped_and_pairs_that_leave_the_image_ignored(self, device, backend):
        (x,), kwargs = self.inputs((1, 2, 4, 5, 3, 8, "chebyshev"), torch.float32, device)
        a = kwargs["affinity"] * 3 - 1
        inside = path_affinity(torch.zeros(1, 4, 5, device=device), radius=3) * a.clamp(0, 1)
        kwargs["affinity"] = a
        y = random_walk(x, **kwargs, backend=backend)
        torch.testing.assert_close(y, random_walk(x, **{**kwargs, "affinity": inside}, backend=backend))

    def test_strided_affinity(self, device, backend):
        (x,), kwargs = self.inputs(self.small, torch.float32, device)
        y = random_walk(x, **kwargs, backend=backend)
        kwargs["affinity"] = kwargs["affinity"].to(memory_format=torch.channels_last)
        torch.testing.assert_close(random_walk(x, **kwargs, backend=backend), y)

    def test_nan_in_a_map_stays_in_its_channel_and_image(self, device, backend):
        (x,), kwargs = self.inputs(self.small, torch.float32, device)
        x[0, 1, 0, 0] = torch.nan
        bad = random_walk(x, **kwargs, backend=backend).isnan().flatten(2).any(-1)
        assert bad.tolist() == [[False, True], [False, False]]

    def test_opcheck(self, device, backend):
        (x,), kwargs = self.inputs(self.small, torch.float32, device)
        steps = 2 if INTERPRETED else 16
        for method in ("chebyshev", "steps"):
            torch.library.opcheck(FWD, (x, kwargs["affinity"], 3, 8.0, steps, method, backend))
            torch.library.opcheck(BWD, (x, kwargs["affinity"], 3, 8.0, steps, method, backend))

    def test_exceptions(self, device, backend):
        x, a = torch.ones(1, 2, 4, 4, device=device), torch.ones(1, 34, 4, 4, device=device)
        with pytest.raises(ValueError, match=r"for radius 3, affinity \(B, 12, H, W\), got .* and \(1, 34, 4, 4\)"):
            random_walk(x, a, radius=3)
        with pytest.raises(ValueError, match=r"expected x \(B, C, H, W\) with H, W >= 1"):
            random_walk(x[:, :, :0], a[:, :, :0])
        with pytest.raises(ValueError, match="expected radius >= 1, got 0"):
            random_walk(x, a, radius=0)
        for beta in (0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="expected a finite beta > 0, got"):
                random_walk(x, a, beta=beta)
        with pytest.raises(ValueError, match="expected steps >= 0, got -1"):
            random_walk(x, a, steps=-1)
        with pytest.raises(ValueError, match="expected method 'chebyshev' or 'steps', got 'fft'"):
            random_walk(x, a, method="fft")
        with pytest.raises(TypeError, match="expected one dtype, got x float32, affinity float64"):
            random_walk(x, a.double())


def test_chebyshev_coefficients_are_those_of_numpy():
    for n in (1, 2, 7, 16):
        np.testing.assert_allclose(coefficients(n, n), np.polynomial.chebyshev.poly2cheb([0] * n + [1]), atol=1e-12)


@pytest.mark.parametrize("steps", [64, 256, 1000])
def test_terms_left_out_stay_within_the_promise_for_the_worst_vector(steps):
    """The largest error of any x with |x| <= 1 is the largest row sum of the error matrix: the bound, on a bad case."""
    H, W, P = 4, 12, 12
    affinity = np.ones((P, H, W))
    affinity[:, :, 8:] = 0  # a clique beside pixels of few neighbours: column sums of all sizes
    T = dense_transition(affinity, 3, 1)
    degree = walk_degree("chebyshev", steps, P, H * W)
    before, now = np.eye(H * W), T
    c = coefficients(steps, degree)
    total = c[0] * before + c[1] * now
    for k in range(2, degree + 1):
        before, now = now, 2 * now @ T - before
        total += c[k] * now
    assert degree < steps
    assert np.abs(total - np.linalg.matrix_power(T, steps)).sum(0).max() < 1e-4


@pytest.mark.parametrize(("dtype", "C"), [("fp32", 4), ("bf16", 1)])
def test_triton_kernels_compile_for_several_gpu_generations(dtype, C):
    kernels = pytest.importorskip("fastcam.kernels.random_walk")
    size = kernels.blocks(C)
    shared = {"offsets_ptr": "*i32", "weight_ptr": "*fp32", **dict.fromkeys(("H", "W", "P"), "i32")}
    pixels = {"BLOCK_N": size["BLOCK_N"]}
    compile_for_gpus(
        kernels._random_walk_weights_kernel, {"affinity_ptr": f"*{dtype}", "beta": "fp32", **shared}, pixels
    )
    compile_for_gpus(kernels._random_walk_sums_kernel, {"sums_ptr": "*fp32", **shared}, pixels)
    maps = dict.fromkeys(("now_ptr", "sums_ptr", "next_ptr", "difference_ptr", "total_ptr"), "*fp32")
    for recursion in (False, True):
        compile_for_gpus(
            kernels._random_walk_step_kernel,
            {**maps, **shared, "C": "i32", "share": "fp32"},
            {"RECURSION": recursion, **size},
        )
