import numpy as np
import pytest
import torch
from op_tester import OpTester

from fastcam import Lattice, crf_mean_field
from fastcam.nn.unaries import unary_from_labels, unary_from_softmax
from fastcam.ops.crf_mean_field import BWD, CANDIDATES, FWD, KERNELS, NORMALIZATIONS

BOTH = {"gaussian": (3, 3), "bilateral": (8, 13, 10)}
ANY = [1.0] * 2, [1.0] * 5
DOUBLE = {name: runs for name, runs in CANDIDATES.items() if name != "triton"}  # float64 too; test_..._triton.py has it


def photograph(H, W, device, top=100, left=150):
    """A crop of scikit-image's cup of coffee: uint8 `(1, 3, H, W)`."""
    data = pytest.importorskip("skimage.data", reason="needs scikit-image")
    crop = data.coffee()[top : top + H, left : left + W]
    return torch.from_numpy(crop.copy()).permute(2, 0, 1)[None].to(device)


def noise(B, K, H, W, device="cpu", dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    unary = 2 * torch.randn(B, K, H, W, generator=g, dtype=torch.float64)
    image = torch.randint(0, 256, (B, 3, H, W), generator=g, dtype=torch.uint8)
    return unary.to(device, dtype), image.to(device)


class TestCrfMeanField(OpTester):
    op = staticmethod(crf_mean_field)
    candidates = DOUBLE
    # (B, K, H, W, keyword arguments); 21 and 151 labels, 5 x 7 and 70 pixels are no multiple of a vector or a tile
    cases = (
        (0, 3, 4, 5, {}),
        (1, 1, 1, 1, {}),
        (2, 2, 1, 9, {"kernel": "lattice", "normalization": "before"}),
        (1, 4, 5, 7, {"normalization": "after", "gaussian": ((2, 5), [-3.0, -1.0, -2.0, 0.5])}),
        (1, 21, 6, 70, {"kernel": "exact", "bilateral": ((8, 5), (13, 20, 30), 4)}),
        (
            1,
            151,
            9,
            3,
            {"kernel": "lattice", "normalization": "none", "gaussian": (1.5, 0.3), "bilateral": (8, 30, 0.5)},
        ),
        (3, 40, 11, 17, {"valid": [[11, 17], [4, 9], [1, 1]], "iterations": 2}),
    )
    small = (
        2,
        3,
        3,
        4,
        {"iterations": 2, "gaussian": (1.5, np.array([[0, 1.0, 2], [1, 0, 1], [3, 1, 0]])), "valid": [[3, 4], [2, 3]]},
    )

    def inputs(self, case, dtype, device):
        B, K, H, W, options = case
        unary, image = noise(B, K, H, W, device, dtype)
        kwargs = {"image": image, "iterations": 3, "gaussian": (3, 3), "bilateral": (8, 40, 5), **options}
        if "valid" in kwargs:
            kwargs["valid"] = torch.tensor(kwargs["valid"], device=device)
        return (unary,), kwargs

    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    @pytest.mark.parametrize("steps", [0, 1, 3])
    def test_equals_pydensecrf_for_every_normalization(self, device, backend, golden, normalization, steps):
        arrays = golden("postprocess_densecrf_small")
        for term, only in (("gauss", {**BOTH, "bilateral": None}), ("bil", {**BOTH, "gaussian": None})):
            expected = arrays[f"q_{term}_{normalization}_t{steps}"]
            actual = self.golden_crf(arrays, device, backend, iterations=steps, normalization=normalization, **only)
            np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5, err_msg=term)

    def test_equals_pydensecrf_for_both_terms(self, device, backend, golden):
        arrays = golden("postprocess_densecrf_small")
        for steps, name in ((2, "q_kernel_const"), (2, "q_kernel_diag"), (2, "q_kernel_full"), (5, "q_step5")):
            actual = self.golden_crf(arrays, device, backend, iterations=steps, **BOTH)
            np.testing.assert_allclose(actual, arrays[name], rtol=1e-4, atol=1e-5, err_msg=name)

    def test_equals_pydensecrf_for_every_compatibility(self, device, backend, golden):
        arrays = golden("postprocess_densecrf_small")
        compats = {
            "vector": arrays["compat_vector"],
            "matrix": arrays["compat_matrix"],
            "potts": 3,
            "potts_as_matrix": 3 * (1 - torch.eye(3)),
        }
        for name, compat in compats.items():
            actual = self.golden_crf(arrays, device, backend, iterations=2, gaussian=(3, compat), bilateral=None)
            np.testing.assert_allclose(actual, arrays[f"q_compat_{name}"], rtol=1e-4, atol=1e-5, err_msg=name)
        actual = self.golden_crf(arrays, device, backend, iterations=2, gaussian=((2, 5), 3), bilateral=None)
        np.testing.assert_allclose(actual, arrays["q_gauss_sx2_sy5"], rtol=1e-4, atol=1e-5)

    def golden_crf(self, arrays, device, backend, **options):
        unary = torch.from_numpy(arrays["unary"]).reshape(1, 3, 16, 18).to(device)
        image = torch.from_numpy(arrays["image"]).permute(2, 0, 1)[None].to(device)
        return crf_mean_field(unary, image, kernel="lattice", backend=backend, **options)[0].cpu().numpy()

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_no_steps_and_no_compatibility_give_softmax(self, device, backend, kernel):
        unary, image = noise(1, 5, 6, 7, device)
        expected = torch.softmax(-unary, dim=1)
        for options in (
            {"iterations": 0},
            {"gaussian": (3, 0), "bilateral": (8, 13, 0)},
            {"gaussian": None, "bilateral": None},
        ):
            torch.testing.assert_close(
                crf_mean_field(unary, image, kernel=kernel, backend=backend, **options), expected
            )

    def test_labels_permute_and_energies_shift(self, device, backend):
        unary, image = noise(1, 5, 6, 7, device)
        q = crf_mean_field(unary, image, backend=backend, **BOTH)
        torch.testing.assert_close(q.sum(1), torch.ones_like(q[:, 0]))
        order = torch.tensor([3, 0, 4, 1, 2], device=device)
        torch.testing.assert_close(crf_mean_field(unary[:, order], image, backend=backend, **BOTH), q[:, order])
        shift = torch.randn(1, 1, 6, 7, generator=torch.Generator().manual_seed(2)).to(device)
        torch.testing.assert_close(
            crf_mean_field(unary + shift, image, backend=backend, **BOTH), q, rtol=1e-4, atol=1e-5
        )

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_uniform_and_unanimous_unaries_stay(self, device, backend, kernel):
        _, image = noise(1, 3, 6, 7, device)
        uniform = torch.zeros(1, 3, 6, 7, device=device)
        q = crf_mean_field(uniform, image, kernel=kernel, backend=backend, **BOTH)
        torch.testing.assert_close(q, torch.full_like(q, 1 / 3))
        uniform[:, 1] = -4
        assert (crf_mean_field(uniform, image, kernel=kernel, backend=backend, **BOTH).argmax(1) == 1).all()

    def test_exact_equals_a_dense_sum_in_float64(self, device, backend):
        unary, image = noise(1, 4, 7, 9, device, torch.float64)
        y, x = torch.meshgrid(torch.arange(7.0), torch.arange(9.0), indexing="ij")
        place = torch.stack([x, y]).double().reshape(2, -1).to(device)
        colour = image[0].reshape(3, -1).double()
        u = unary[0].reshape(4, -1)
        q = torch.softmax(-u, 0)
        for _ in range(3):
            message = 0
            for f, w in ((place / 2, 3), (torch.cat([place / 5, colour / 60]), 6)):
                k = torch.exp(-0.5 * (f[:, :, None] - f[:, None]).square().sum(0))
                d = k.sum(1).rsqrt()
                message = message + w * (q * d) @ k * d
            q = torch.softmax(-u + message, 0)
        options = {"iterations": 3, "gaussian": (2, 3), "bilateral": (5, 60, 6), "kernel": "exact", "backend": backend}
        torch.testing.assert_close(crf_mean_field(unary, image, **options)[0].reshape(4, -1), q, rtol=1e-10, atol=1e-12)
        single = crf_mean_field(unary.float(), image, **options)[0].reshape(4, -1)
        torch.testing.assert_close(single, q.float(), rtol=0, atol=1e-5)

    def test_exact_is_invariant_to_a_shift_of_all_colours(self, device, backend):
        unary, image = noise(1, 3, 6, 7, device, torch.float64)
        shifted = crf_mean_field(unary, image.float() + 500, kernel="exact", backend=backend, **BOTH)
        torch.testing.assert_close(shifted, crf_mean_field(unary, image, kernel="exact", backend=backend, **BOTH))

    @pytest.mark.parametrize("kernel", ["fast", "lattice"])
    def test_lattice_labels_a_photograph_as_exact_sums_do(self, device, backend, kernel):
        image = photograph(36, 44, device)
        grey = image.float().mean(1, keepdim=True)
        unary = torch.cat([(grey - centre).abs() / 40 for centre in (30, 110, 200)], dim=1)
        unary = unary + 0.5 * torch.randn(unary.shape, generator=torch.Generator().manual_seed(0)).to(device)
        for options in (
            BOTH,
            {"gaussian": (3, 3), "bilateral": (80, 13, 10)},
            {"gaussian": (3, 3), "bilateral": (50, 5, 10)},
        ):
            exact = crf_mean_field(unary, image, iterations=1, kernel="exact", backend=backend, **options)
            near = crf_mean_field(unary, image, iterations=1, kernel=kernel, backend=backend, **options)
            assert (near - exact).abs().mean() < 0.01
            assert (near.argmax(1) == exact.argmax(1)).float().mean() >= 0.99

    def test_backends_agree_on_a_photograph(self, device, backend):
        image = photograph(60, 83, device)
        unary, _ = noise(1, 5, 60, 83, device)
        for kernel in ("fast", "lattice"):
            actual = crf_mean_field(unary, image, iterations=2, kernel=kernel, backend=backend)
            expected = crf_mean_field(unary.double(), image, iterations=2, kernel=kernel, backend="reference")
            torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("kernel", KERNELS)
    def test_padded_images_equal_images_alone(self, device, backend, kernel):
        unary, image = noise(3, 4, 9, 10, device)
        sizes = [[9, 10], [5, 3], [0, 7]]
        unary[1, :, 5:] = torch.nan  # what lies outside takes no part
        valid = torch.tensor(sizes, device=device)
        q = crf_mean_field(unary, image, kernel=kernel, valid=valid, backend=backend, **BOTH)
        for b, (h, w) in enumerate(sizes[:2]):
            alone = crf_mean_field(
                unary[b : b + 1, :, :h, :w], image[b : b + 1, :, :h, :w], kernel=kernel, backend=backend, **BOTH
            )
            torch.testing.assert_close(q[b : b + 1, :, :h, :w], alone)
            assert (q[b, :, h:] == 0).all()
            assert (q[b, :, :, w:] == 0).all()
        assert (q[2] == 0).all()

    def test_uint8_and_float_images_are_the_same(self, device, backend):
        unary, image = noise(1, 3, 6, 7, device)
        expected = crf_mean_field(unary, image, backend=backend, **BOTH)
        for dtype in (torch.float32, torch.float16, torch.float64):
            torch.testing.assert_close(crf_mean_field(unary, image.to(dtype), backend=backend, **BOTH), expected)

    def test_extremes_that_are_legal(self, device, backend):
        unary, image = noise(1, 3, 6, 70, device)
        flat = torch.full_like(image, 255)
        for options in (
            {"bilateral": (0.01, 0.01, 10)},  # every pixel has vertices of its own
            {"gaussian": (1e-3, 3), "bilateral": None},
            {"gaussian": (1e6, 3), "bilateral": (1e6, 1e6, 10)},
            {"gaussian": (3, 1e30), "bilateral": None},
        ):
            for kernel in ("fast", "lattice"):
                q = crf_mean_field(unary, flat, kernel=kernel, backend=backend, **options)
                assert q.isfinite().all(), (options, kernel)
        lonely = crf_mean_field(
            unary, image, gaussian=None, bilateral=(0.01, 0.01, 10), normalization="after", backend=backend
        )
        alone = torch.softmax(-unary, 1)
        for _ in range(10):  # a pixel without neighbours hears itself only
            alone = torch.softmax(-unary + 10 * alone, 1)
        torch.testing.assert_close(lonely, alone, rtol=1e-3, atol=1e-4)

    def test_infinite_energy_rules_a_label_out(self, device, backend):
        unary, image = noise(1, 3, 5, 6, device)
        unary[0, 2] = torch.inf
        unary.requires_grad_()
        q = crf_mean_field(unary, image, backend=backend, **BOTH)
        assert (q[0, 2] == 0).all()
        torch.testing.assert_close(q[:, :2], crf_mean_field(unary[:, :2], image, backend=backend, **BOTH))
        (grad,) = torch.autograd.grad(q.square().sum(), unary)
        assert grad.isfinite().all()

    @pytest.mark.parametrize("bad", [torch.nan, -torch.inf, "all inf"])
    def test_unary_without_a_distribution_is_refused(self, device, backend, bad):
        unary, image = noise(1, 3, 5, 6, device)
        if bad == "all inf":
            unary[0, :, 2, 3] = torch.inf
        else:
            unary[0, 1, 2, 3] = bad
        with pytest.raises(ValueError, match=r"^crf_mean_field: expected unary without NaN and -inf"):
            crf_mean_field(unary, image, backend=backend)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
    def test_image_without_a_place_in_the_lattice_is_refused(self, device, backend, bad):
        unary, image = noise(1, 3, 5, 6, device)
        image = image.float()
        image[0, 1, 2, 3] = bad
        with pytest.raises(ValueError, match=r"^crf_mean_field: expected finite lattice features"):
            crf_mean_field(unary, image, backend=backend)
        with pytest.raises(ValueError, match=r"^crf_mean_field: expected finite lattice features"):
            crf_mean_field(unary, image, gaussian=(1e-30, 3), bilateral=None, kernel="lattice", backend=backend)

    @pytest.mark.parametrize("kernel", KERNELS)
    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    def test_gradcheck_of_every_kernel(self, device, backend, kernel, normalization):
        unary, image = noise(1, 2, 2, 3, device, torch.float64)

        def crf(u):
            return crf_mean_field(
                u, image, iterations=2, gaussian=(2, 0.4), bilateral=(4, 60, [[0.0, 1], [2, -1]]),
                kernel=kernel, normalization=normalization, backend=backend,
            )  # fmt: skip

        assert torch.autograd.gradcheck(crf, (unary.requires_grad_(),))

    @pytest.mark.parametrize("K", (2, 3, 6))
    def test_gradcheck_of_compatibilities(self, device, backend, K):
        unary, image = noise(2, K, 3, 4, device, torch.float64)
        generator = torch.Generator().manual_seed(3)
        vector, matrix = (torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in (K, (K, K)))
        number = torch.tensor(0.7, dtype=torch.float64, device=device)

        def crf(spatial, bilateral):
            return crf_mean_field(
                unary, image, iterations=2, gaussian=(2, spatial), bilateral=(4, 60, bilateral), backend=backend
            )

        for pair in ((vector, matrix), (number, vector), (matrix, number)):
            assert torch.autograd.gradcheck(crf, tuple(p.clone().requires_grad_() for p in pair))

    def test_problems_that_share_an_image_equal_problems_alone(self, device, backend):
        unary, image = noise(3, 2, 6, 7, device)
        more = torch.stack([unary, unary.flip(1), 0.5 * unary], dim=1)
        valid = torch.tensor([[6, 7], [5, 7], [6, 3]], device=device)
        leaf = more.clone().requires_grad_()
        q = crf_mean_field(leaf, image, valid=valid, backend=backend, **BOTH)
        weight = torch.linspace(-1, 1, q.numel(), device=device).view(q.shape)
        (q * weight).sum().backward()
        for g in range(3):
            alone = more[:, g].clone().requires_grad_()
            expected = crf_mean_field(alone, image, valid=valid, backend=backend, **BOTH)
            (expected * weight[:, g]).sum().backward()
            torch.testing.assert_close(q[:, g], expected)
            torch.testing.assert_close(leaf.grad[:, g], alone.grad)

    def test_opcheck(self, device, backend):
        unary, image = noise(1, 3, 4, 5, device)
        compat = torch.full((3,), -2.0, device=device)
        rest = (image, torch.tensor([[3, 5]], device=device), compat, None, *ANY, 2, "symmetric", "fast", backend)
        torch.library.opcheck(FWD, (unary, *rest))
        torch.library.opcheck(BWD, (torch.ones_like(unary), True, unary, *rest))

    def test_fast_is_the_lattice_beyond_four_labels(self, device, backend):
        for K in (4, 5):
            unary, image = noise(1, K, 9, 11, device)
            fast, lattice = (
                crf_mean_field(unary, image, **BOTH, kernel=k, backend=backend) for k in ("fast", "lattice")
            )
            assert torch.equal(fast, lattice) == (K > 4)

    def test_exceptions(self, device, backend):
        unary, image = noise(2, 3, 4, 5, device)

        def refused(message, u=unary, i=image, error=ValueError, **options):
            with pytest.raises(error, match=message):
                crf_mean_field(u, i, backend=backend, **options)

        refused(r"^crf_mean_field: expected unary \(B, K, H, W\) or .* got \(3, 4, 5\)", u=unary[0])
        refused(r"with K > 0, got \(2, 0, 4, 5\)", u=unary[:, :0])
        refused(r"expected image \(2, 3, 4, 5\), as unary, got \(2, 3, 4, 4\)", i=image[..., :4])
        refused(r"expected an image, or bilateral=None, got None", i=None)
        refused(r"expected image uint8 or floating, got torch.int64", i=image.long(), error=TypeError)
        refused(r"the image has no gradient", i=image.float().requires_grad_())
        refused(r"expected gaussian sxy a positive number or 2 of them, got 0", gaussian=(0, 3))
        refused(r"expected bilateral srgb a positive number or 3 of them, got", bilateral=(80, (1, 2), 3))
        refused(r"expected bilateral sxy .* got nan", bilateral=(float("nan"), 13, 3))
        refused(r"expected gaussian compatibility a number, \(3,\) or \(3, 3\), got \(2,\)", gaussian=(3, [1, 2]))
        refused(r"expected finite compatibilities", gaussian=(3, float("inf")))
        refused(r"expected iterations >= 0, got -1", iterations=-1)
        refused(r"expected normalization in .* got 'both'", normalization="both")
        refused(r"expected kernel in .* got 'slow'", kernel="slow")
        refused(r"expected valid int64 \(2, 2\), got torch.int32 \(2, 2\)", valid=torch.ones(2, 2, dtype=torch.int32))
        refused(r"expected valid heights in \[0, 4\] and widths in \[0, 5\]", valid=torch.tensor([[4, 5], [5, 5]]))


def test_an_image_too_large_for_the_machine_is_refused_before_anything_is_allocated():
    unary = torch.zeros(1).expand(1, 2, 30000, 30000)
    image = torch.zeros(1, dtype=torch.uint8).expand(1, 3, 30000, 30000)
    with pytest.raises(
        ValueError, match=r"^crf_mean_field: an image of 30000 x 30000 with 2 labels needs about \d+ GB"
    ):
        crf_mean_field(unary, image, backend="cpp")


class TestLattice:
    candidates = DOUBLE

    def test_equals_pydensecrf(self, device, backend, golden):
        arrays = golden("postprocess_permutohedral_rand3d")
        lattice = Lattice(torch.from_numpy(arrays["features"]).to(device), backend=backend)
        vertex, weight, neighbour = (t.cpu().numpy() for t in lattice._lattices[0].tables())
        M = int(arrays["M"])
        np.testing.assert_array_equal(vertex, arrays["offset"])
        np.testing.assert_array_equal(np.where(neighbour == M, -1, neighbour), arrays["blur_neighbors"])
        np.testing.assert_array_equal(weight, arrays["barycentric"])
        values = torch.from_numpy(arrays["values"]).to(device)
        for actual, name in (
            (lattice.filter(values), "filtered"),
            (lattice.filter(values, reverse=True), "filtered_reverse"),
            (lattice.filter(torch.ones_like(values[:1]))[0], "norm"),
        ):
            np.testing.assert_allclose(actual.cpu(), arrays[name], rtol=1e-5, atol=1e-5, err_msg=name)

    @pytest.mark.parametrize("d", [1, 2, 3, 5, 7, 11])
    def test_backends_agree_on_vertices_for_any_dimension(self, device, backend, d):
        features = 5 * torch.randn(d, 203, generator=torch.Generator().manual_seed(0))
        tables = [Lattice(features.to(device), backend=name)._lattices[0].tables() for name in (backend, "reference")]
        for actual, expected in zip(*tables, strict=True):
            torch.testing.assert_close(actual.to(expected.dtype), expected, rtol=0, atol=0)
        _, weight, _ = tables[0]
        assert weight.min() >= -1e-6
        torch.testing.assert_close(weight.sum(1), torch.ones_like(weight[:, 0]))

    def test_reverse_order_is_the_adjoint_and_filtering_is_linear(self, device, backend):
        g = torch.Generator().manual_seed(0)
        features, a, b = (torch.randn(n, 150, generator=g, dtype=torch.float64).to(device) for n in (4, 3, 3))
        lattice = Lattice(features, backend=backend)
        torch.testing.assert_close((a * lattice.filter(b)).sum(), (lattice.filter(a, reverse=True) * b).sum())
        torch.testing.assert_close(lattice.filter(2 * a - b), 2 * lattice.filter(a) - lattice.filter(b))

    @pytest.mark.parametrize("normalization", [None, "symmetric", "before", "after"])
    def test_gradcheck(self, device, backend, normalization):
        g = torch.Generator().manual_seed(0)
        features, x = (torch.randn(2, n, 9, generator=g, dtype=torch.float64).to(device) for n in (2, 3))
        lattice = Lattice(features, backend=backend)
        assert torch.autograd.gradcheck(lambda x: lattice.filter(x, normalization=normalization), (x.requires_grad_(),))

    def test_after_normalisation_keeps_constants(self, device, backend):
        features = torch.randn(2, 5, 77, generator=torch.Generator().manual_seed(0)).to(device)
        out = Lattice(features, backend=backend).filter(
            torch.full((2, 1, 77), 3.0, device=device), normalization="after"
        )
        torch.testing.assert_close(out, torch.full_like(out, 3.0))

    def test_follows_the_exact_gaussian(self, device, backend, golden):
        arrays = golden("postprocess_permutohedral_rand3d")
        lattice = Lattice(torch.from_numpy(arrays["features"]).to(device), backend=backend)
        actual = lattice.filter(torch.from_numpy(arrays["values"]).to(device), normalization="after").cpu().numpy()
        expected = arrays["exact_gauss_filtered"] / arrays["exact_gauss_norm"]
        assert np.corrcoef(actual.ravel(), expected.ravel())[0, 1] > 0.97

    def test_random_sizes_never_leave_the_arrays(self, device, backend):
        g = torch.Generator().manual_seed(0)
        for case in range(60):
            d, N, V = (int(torch.randint(1, high, (), generator=g)) for high in (8, 140, 12))
            scale = 10 ** float(torch.empty(()).uniform_(-6, 4, generator=g))
            features = scale * torch.randn(d, N, generator=g)
            x = torch.rand(V, N, generator=g)
            out = Lattice(features.to(device), backend=backend).filter(x.to(device), normalization="after")
            assert out.min() > -1e-4, case
            assert out.max() < 1 + 1e-4, case

    def test_exceptions(self, device, backend):
        with pytest.raises(ValueError, match=r"^Lattice: expected features \(d, N\) or .* got \(5,\)"):
            Lattice(torch.ones(5))
        with pytest.raises(TypeError, match=r"^Lattice: "):
            Lattice(torch.ones(2, 5, dtype=torch.int64))
        with pytest.raises(ValueError, match="expected finite lattice features"):
            Lattice(torch.full((2, 5), torch.nan), backend=backend)
        if backend == "cpp":
            with pytest.raises(ValueError, match=r"^Lattice: expected 1 to 15 features, got 16"):
                Lattice(torch.rand(16, 5), backend=backend)
            with pytest.raises(ValueError, match=r"^Lattice: expected features whose lattice coordinates fit 128 bits"):
                Lattice(1000 * torch.randn(15, 50), backend=backend)
        lattice = Lattice(torch.rand(2, 5), backend=backend)
        with pytest.raises(ValueError, match=r"^Lattice.filter: expected x \(V, 5\), got \(1, 4\)"):
            lattice.filter(torch.rand(1, 4))
        with pytest.raises(ValueError, match="expected normalization symmetric, before, after or None, got 'both'"):
            lattice.filter(torch.rand(1, 5), normalization="both")


def test_unaries_equal_pydensecrf(golden):
    arrays = golden("postprocess_densecrf_small")
    p, zero = (torch.from_numpy(arrays[name])[None] for name in ("softmax", "softmax_with_zero"))
    labels = torch.from_numpy(arrays["labels"])[None]
    for actual, name in (
        (unary_from_softmax(p), "unary"),
        (unary_from_softmax(zero), "unary_clip"),
        (unary_from_softmax(zero, scale=0.6), "unary_scale06"),
        (unary_from_softmax(0.3 * zero), "unary_unnormalised_scores"),
        (unary_from_labels(labels, 3, 0.7, zero_unsure=False), "unary_from_labels_gt07_zero_not_unsure"),
        (unary_from_labels(labels, 2, 0.5), "unary_from_labels_gt05_zero_unsure"),
    ):
        np.testing.assert_allclose(actual[0].flatten(1), arrays[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_unaries_refuse_what_has_no_energy():
    labels = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"^unary_from_labels: expected at least 2 labels, got 1"):
        unary_from_labels(labels, 1, 0.7)
    with pytest.raises(ValueError, match=r"expected labels in \[0, 2\], got 0 to 3"):
        unary_from_labels(labels + torch.tensor([[0, 3], [0, 0]]), 3, 0.7, zero_unsure=False)
    with pytest.raises(ValueError, match=r"expected gt_prob in \(0, 1\), got 1"):
        unary_from_labels(labels, 3, 1)
    with pytest.raises(TypeError, match="expected integer labels"):
        unary_from_labels(labels.float(), 3, 0.7)
    with pytest.raises(ValueError, match=r"^unary_from_softmax: expected scale in \(0, 1\], got 2"):
        unary_from_softmax(torch.ones(1, 2, 2, 2), scale=2)
    with pytest.raises(TypeError, match=r"^unary_from_softmax: expected floating scores"):
        unary_from_softmax(labels)
