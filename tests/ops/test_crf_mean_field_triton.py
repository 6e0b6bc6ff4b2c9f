"""The Triton backend of crf_mean_field and Lattice: tiny problems in the interpreter, compilation, a GPU if any.

It computes in float32, so that the float64 tests of test_crf_mean_field.py are not for it; here float32 is compared
with the reference in float64.
"""

import numpy as np
import pytest
import torch
from op_tester import OpTester, assert_within_policy, compile_for_gpus

from fastcam import Lattice, backends, crf_mean_field
from fastcam.ops.crf_mean_field import BWD, FWD, NORMALIZATIONS
from fastcam.reference import crf_mean_field as reference

ONLY = {"triton": backends.needs_gpu}
VECTOR, MATRIX = [-3.0, -1.0, 0.5], [[0, 1.0, 2], [1, 0, 1], [3, 1, 0]]


def noise(B, K, H, W, device):
    g = torch.Generator().manual_seed(0)
    unary = 2 * torch.randn(B, K, H, W, generator=g)
    return unary.to(device), torch.randint(0, 256, (B, 3, H, W), generator=g, dtype=torch.uint8).to(device)


class TestCrfMeanFieldTriton(OpTester):
    op = staticmethod(crf_mean_field)
    candidates = ONLY
    small = (1, 3, 2, 3, {"gaussian": None})  # the other terms have tests of their own
    cases = (
        (0, 3, 4, 5, {}),
        (2, 2, 1, 9, {"kernel": "lattice", "normalization": "before"}),
        (1, 151, 9, 3, {"kernel": "lattice", "normalization": "none", "gaussian": (1.5, 0.3), "bilateral": (8, 30, 1)}),
        (3, 40, 75, 50, {"valid": [[75, 50], [4, 9], [1, 1]]}),
        (1, 81, 70, 33, {"kernel": "exact"}),
    )  # fmt: skip

    def inputs(self, case, dtype, device):
        B, K, H, W, options = case
        unary, image = noise(B, K, H, W, device)
        kwargs = {"image": image, "iterations": 1, "gaussian": (3, 3), "bilateral": (8, 40, 5), **options}
        if "valid" in kwargs:
            kwargs["valid"] = torch.tensor(kwargs["valid"], device=device)
        return (unary.to(dtype),), kwargs

    @pytest.mark.parametrize(
        ("case", "options"),
        [
            ((1, 1, 1, 1), {}),
            ((1, 2, 6, 7), {"kernel": "lattice"}),
            ((1, 21, 3, 5), {"kernel": "lattice", "gaussian": ((2, 5), 1), "normalization": "after"}),
            ((1, 33, 1, 17), {"normalization": "before"}),
            ((1, 3, 5, 4), {"gaussian": (1.5, MATRIX), "bilateral": (8, 40, VECTOR), "normalization": "none"}),
            ((2, 3, 3, 4), {"kernel": "lattice", "gaussian": (2, VECTOR), "bilateral": (8, 40, MATRIX)}),
            ((1, 3, 6, 7), {"kernel": "exact", "normalization": "before", "gaussian": None}),
            ((1, 21, 9, 8), {"kernel": "exact", "gaussian": (3, 1)}),
            ((1, 70, 4, 3), {"bilateral": None}),
        ],
        ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else "",
    )
    def test_every_kind_of_problem_agrees_with_the_reference(self, device, backend, case, options):
        options = {"gaussian": (2, 0.4), "bilateral": (8, 40, 0.3), **options}
        (unary,), kwargs = self.inputs((*case, options), torch.float32, device)
        for run in (self.run_forward, self.run_backward):
            exact = run((unary.double(),), kwargs, "reference")[0]
            single = run((unary,), kwargs, "reference")[0]
            assert_within_policy(run((unary,), kwargs, backend)[0], exact, single, torch.float32, run.__name__)

    def test_both_terms_on_lattices_give_the_numbers_of_pydensecrf(self, device, backend, golden):
        arrays = golden("postprocess_densecrf_small")
        unary = torch.from_numpy(arrays["unary"]).reshape(1, 3, 16, 18).to(device)
        image = torch.from_numpy(arrays["image"]).permute(2, 0, 1)[None].to(device)
        for name, steps, options in (
            ("q_kernel_const", 2, {"gaussian": (3, 3), "bilateral": (8, 13, 10)}),
            ("q_gauss_none_t1", 1, {"gaussian": (3, 3), "bilateral": None, "normalization": "none"}),
        ):
            q = crf_mean_field(unary, image, iterations=steps, kernel="lattice", backend=backend, **options)
            np.testing.assert_allclose(q[0].cpu(), arrays[name], rtol=1e-4, atol=1e-5, err_msg=name)

    @pytest.mark.parametrize("kernel", ["fast", "lattice", "exact"])
    def test_padded_images_equal_images_alone(self, device, backend, kernel):
        unary, image = noise(3, 2, 4, 5, device)
        image = image.float()
        unary[1, :, 3:] = torch.nan  # what lies outside takes no part
        image[1, :, :, 3:] = torch.nan
        sizes = [[4, 5], [3, 3], [0, 4]]
        options = {"iterations": 1, "kernel": kernel, "gaussian": (2, 3), "bilateral": (8, 40, 5), "backend": backend}
        q = crf_mean_field(unary, image, valid=torch.tensor(sizes, device=device), **options)
        assert (q[2] == 0).all()
        assert (q[1, :, 3:] == 0).all()
        assert (q[1, :, :, 3:] == 0).all()
        for b, (h, w) in enumerate(sizes[:2]):
            alone = crf_mean_field(unary[b : b + 1, :, :h, :w], image[b : b + 1, :, :h, :w], **options)
            torch.testing.assert_close(q[b : b + 1, :, :h, :w], alone)

    @pytest.mark.parametrize("kernel", ["fast", "lattice", "exact"])
    def test_a_batch_of_images_without_pixels_gives_zeros(self, device, backend, kernel):
        unary, image = noise(2, 3, 2, 3, device)
        valid = torch.zeros((2, 2), dtype=torch.int64, device=device)
        q = crf_mean_field(unary, image, iterations=1, kernel=kernel, valid=valid, backend=backend)
        torch.testing.assert_close(q, torch.zeros_like(q))

    def test_the_same_input_gives_the_same_bits(self, device, backend):
        (unary,), kwargs = self.inputs((1, 2, 4, 5, {}), torch.float32, device)
        first = self.run_backward((unary,), kwargs, backend)
        torch.testing.assert_close(self.run_backward((unary,), kwargs, backend), first, rtol=0, atol=0)

    @pytest.mark.parametrize("kernel", ["fast", "lattice", "exact"])
    def test_gradient_of_compatibilities_equals_that_of_the_reference(self, device, backend, kernel):
        from fastcam.kernels.crf_mean_field import crf_mean_field_bwd

        unary, image = noise(1, 3, 4, 5, device)
        weight = torch.linspace(-1, 1, unary.numel()).reshape(unary.shape).to(device)
        compats = [torch.tensor(c, dtype=torch.float64, device=device) / 4 for c in (VECTOR, MATRIX)]
        compats[1] = compats[1] + compats[1].T
        rest = [2.0, 1.5], [8.0, 8.0, 40.0, 40.0, 40.0], 2, "before", kernel
        grad, *of_compats = crf_mean_field_bwd(weight, True, unary, image, None, *(c.float() for c in compats), *rest)

        for c in compats:
            c.requires_grad_()
        u = unary[0].flatten(1).double().requires_grad_()
        terms = reference._terms(4, 5, image[0], *compats, *rest[:2], *rest[3:])
        q = reference._mean_field(u, terms, 2)[-1]
        expected = torch.autograd.grad((q * weight[0].flatten(1)).sum(), (u, *compats))
        torch.testing.assert_close(grad[0].flatten(1).double(), expected[0], rtol=1e-4, atol=1e-5)
        for actual, of_compat in zip(of_compats, expected[1:], strict=True):
            torch.testing.assert_close(actual.double(), of_compat, rtol=1e-4, atol=1e-5)

    def test_infinite_energy_rules_a_label_out(self, device, backend):
        (unary,), kwargs = self.inputs((1, 3, 3, 4, {}), torch.float32, device)
        unary[0, 2] = torch.inf
        q = crf_mean_field(unary, **kwargs, backend=backend)
        assert (q[0, 2] == 0).all()
        torch.testing.assert_close(q[:, :2], crf_mean_field(unary[:, :2], **kwargs, backend=backend))

    def test_refusals_name_the_argument(self, device, backend):
        unary, image = noise(1, 3, 2, 3, device)

        def refused(message, u=unary, i=image, error=ValueError, **options):
            with pytest.raises(error, match=message):
                crf_mean_field(u, i, backend=backend, **{"iterations": 1, "bilateral": None, **options})

        for bad in (torch.nan, -torch.inf):
            u = unary.clone()
            u[0, 1, 1, 2] = bad
            refused("^crf_mean_field: expected unary without NaN and -inf", u=u)
        refused("expected unary .* with a finite energy at every pixel", u=torch.full_like(unary, torch.inf))
        for bad in (torch.nan, torch.inf, 3e38):
            i = image.float()
            i[0, 1, 1, 2] = bad
            refused("^crf_mean_field: expected finite lattice features", i=i, bilateral=(80, 13, 10))
        refused("fit 63 bits in the triton backend, got 98.1", i=image, bilateral=(0.01, 0.001, 10))
        refused("expected finite compatibilities", gaussian=(3, float("inf")))
        valid = torch.tensor([[2, 4]], device=device)
        refused(r"expected valid heights in \[0, 2\] and widths in \[0, 3\], got \[\[2, 4\]\]", valid=valid)
        refused("the triton backend computes in float32, got unary float64", u=unary.double(), error=TypeError)

    def test_opcheck(self, device, backend):
        unary, image = noise(1, 3, 2, 3, device)
        compat = torch.full((3,), -2.0, device=device)
        rest = (image, None, compat, None, [1.0] * 2, [], 1, "symmetric", "fast", backend)
        torch.library.opcheck(FWD, (unary, *rest))
        torch.library.opcheck(BWD, (torch.ones_like(unary), True, unary, *rest))

    def test_steps_run_in_a_cuda_graph(self, device, backend):
        if device != "cuda":
            pytest.skip("CUDA graphs are a GPU's")
        from fastcam.kernels.crf_mean_field import MeanField

        unary, image = noise(2, 21, 60, 83, device)
        compat = torch.full((21,), -3.0, device=device)
        field = MeanField(
            unary, image, None, compat, compat, [3.0, 3.0], [80.0, 80.0, 13.0, 13.0, 13.0], "symmetric", "fast"
        )
        expected = field.result(3)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = field.result(3)
        graph.replay()
        torch.testing.assert_close(captured, expected, rtol=0, atol=0)

    @pytest.mark.parametrize("normalization", NORMALIZATIONS)
    def test_a_photograph_on_a_gpu_gives_what_the_reference_gives(self, device, backend, normalization):
        if device != "cuda":
            pytest.skip("too slow in the interpreter")
        data = pytest.importorskip("skimage.data", reason="needs scikit-image")
        image = torch.from_numpy(data.coffee()[:200, :301].copy()).permute(2, 0, 1)[None].to(device)
        unary, _ = noise(1, 21, 200, 301, device)
        for kernel in ("fast", "lattice"):
            options = {"iterations": 2, "kernel": kernel, "normalization": normalization}
            if normalization == "none":
                options |= {"gaussian": (3, 0.1), "bilateral": (80, 13, 0.001)}
            actual = crf_mean_field(unary, image, backend=backend, **options)
            expected = crf_mean_field(unary.double(), image, backend="reference", **options)
            torch.testing.assert_close(actual.double(), expected, rtol=1e-3, atol=1e-4)


class TestLatticeTriton:
    candidates = ONLY

    @pytest.mark.parametrize("d", [1, 2, 3, 5, 7])
    def test_vertices_weights_and_neighbours_are_the_reference_s(self, device, backend, d):
        features = 4 * torch.randn(d, 63, generator=torch.Generator().manual_seed(d))
        lattice = Lattice(features.to(device), backend=backend)
        vertex, weight, neighbour = (t.cpu() for t in lattice._lattices[0].tables())
        expected = reference.Lattice(features)
        M = expected.neighbour.shape[1]
        assert neighbour.shape == (d + 1, M, 2)
        torch.testing.assert_close(weight, expected.weight, rtol=0, atol=0)
        name = torch.full((M + 1,), -1)  # the reference's number of each of ours
        name[vertex.flatten().long()] = expected.vertex.flatten()
        name[M] = M
        torch.testing.assert_close(name[vertex.long()], expected.vertex, rtol=0, atol=0)
        named = name[:M] >= 0  # all but those of pydensecrf's padding
        ours, theirs = name[neighbour.long()][:, named], expected.neighbour[:, name[:M][named]]
        torch.testing.assert_close(torch.where(ours < 0, theirs, ours), theirs, rtol=0, atol=0)
        x = torch.randn(3, 63, generator=torch.Generator().manual_seed(0))
        for reverse in (False, True):
            torch.testing.assert_close(
                lattice.filter(x.to(device), reverse).cpu(), expected.filter(x, reverse), rtol=1e-5, atol=1e-5
            )

    def test_equals_pydensecrf(self, device, backend, golden):
        arrays = golden("postprocess_permutohedral_rand3d")
        lattice = Lattice(torch.from_numpy(arrays["features"]).to(device), backend=backend)
        _, weight, neighbour = (t.cpu().numpy() for t in lattice._lattices[0].tables())
        assert neighbour.shape[1] == int(arrays["M"])
        np.testing.assert_array_equal(weight, arrays["barycentric"])
        values = torch.from_numpy(arrays["values"]).to(device)
        for actual, name in (
            (lattice.filter(values), "filtered"),
            (lattice.filter(values, reverse=True), "filtered_reverse"),
        ):
            np.testing.assert_allclose(actual.cpu(), arrays[name], rtol=1e-5, atol=1e-5, err_msg=name)

    def test_reverse_order_is_the_adjoint_and_gives_the_gradient(self, device, backend):
        g = torch.Generator().manual_seed(0)
        features, a, b = (torch.randn(n, 40, generator=g).to(device) for n in (3, 70, 70))  # 70: two blocks of values
        lattice = Lattice(features, backend=backend)
        b.requires_grad_()
        out = lattice.filter(b)
        expected = lattice.filter(a, reverse=True)
        torch.testing.assert_close((a * out).sum(), (expected * b).sum(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(torch.autograd.grad(out, b, a)[0], expected, rtol=0, atol=0)

    def test_a_vertex_of_many_points_is_summed_in_parts(self, device, backend):
        features = 1e-3 * torch.rand(2, 333, generator=torch.Generator().manual_seed(0)).to(device)
        x = torch.rand(2, 333, generator=torch.Generator().manual_seed(1)).to(device)
        out = Lattice(features, backend=backend).filter(x)
        torch.testing.assert_close(out, Lattice(features, backend="reference").filter(x), rtol=1e-5, atol=1e-4)

    def test_exceptions(self, device, backend):
        with pytest.raises(ValueError, match="expected finite lattice features"):
            Lattice(torch.full((2, 5), torch.nan, device=device), backend=backend)
        with pytest.raises(ValueError, match=r"^Lattice: expected 1 to 15 features, got 16"):
            Lattice(torch.rand(16, 5, device=device), backend=backend)
        with pytest.raises(ValueError, match=r"^Lattice: .* fit 63 bits in the triton backend, got "):
            Lattice(1000 * torch.randn(7, 50, device=device), backend=backend)
        with pytest.raises(TypeError, match=r"the triton backend computes in float32, got torch\.float64"):
            Lattice(torch.rand(2, 5, device=device), backend=backend).filter(torch.rand(1, 5, device=device).double())
        assert Lattice(torch.rand(2, 5, device=device), backend=backend).filter(
            torch.rand(0, 5, device=device)
        ).shape == (0, 5)


TYPES = {"alpha": "fp32", "sigma": "fp32"}  # of arguments; pointers are to float32, numbers are 32-bit integers else
for types, names in (
    ("*i1", "inside"),
    ("*i32", "vertex pair_row vertex_first part_first first neighbour bad"),
    ("*i64", "points layout key start order count unique"),
):
    TYPES |= {f"{name}_ptr": types for name in names.split()}


def compiles(kernel, constants, **options):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {name: TYPES.get(name, "*fp32" if name.endswith("_ptr") else "i32") for name in names}
    compile_for_gpus(kernel, signature, constants, **options)


def test_kernels_of_the_lattice_compile_for_several_gpu_generations():
    k = pytest.importorskip("fastcam.kernels.lattice")
    pairs = {"NO_KEY": k.NO_KEY, "PART": k.PART, "BLOCK": k.POINTS}
    for d in (2, 5):
        search = {"D": d, "SCALES": k.scales(d), "BLOCK": k.POINTS}
        compiles(k._lattice_search_kernel, {"NO_KEY": k.NO_KEY, **search}, **k.EXACT)
    compiles(k._lattice_range_kernel, {"LIMIT": k.COORDINATE_LIMIT, **search}, **k.EXACT)
    compiles(k._lattice_starts_kernel, pairs)
    compiles(k._lattice_number_kernel, {**pairs, "CORNERS": d + 1})
    compiles(k._lattice_neighbours_kernel, {"D": d, "BLOCK": k.POINTS})
    size = {"WIDTH": 24, **k.blocks(24, most=64)}
    compiles(k._lattice_sum_kernel, {"GATHER": True, "WIDTH": 1, **k.blocks(1)})
    compiles(k._lattice_sum_kernel, {"GATHER": True, **size})
    compiles(k._lattice_sum_kernel, {"GATHER": False, **size})
    compiles(k._lattice_blur_kernel, size)
    compiles(k._lattice_slice_kernel, {"SCALED": True, "ADD": True, "CORNERS": d + 1, **size})


@pytest.mark.parametrize("width", [24, 152])
def test_kernels_of_the_mean_field_compile_for_several_gpu_generations(width):
    k = pytest.importorskip("fastcam.kernels.crf_mean_field")
    heard = {"MESSAGE": True, "CORNERS": 6, "WIDTH": width, **k.blocks(width)}
    compiles(k._crf_update_kernel, heard)
    compiles(k._crf_gradient_kernel, heard)
    if width == 24:
        down = {"ENTER": True, "SCALED": False, "after_ptr": None, "compat_ptr": None, "ADD": False, "WIDTH": width}
        along = {"ENTER": False, "SCALED": True, "before_ptr": None, "ADD": True, "WIDTH": width}
        compiles(k._crf_spatial_kernel, {**down, **k.SPATIAL})
        compiles(k._crf_spatial_kernel, {**along, **k.SPATIAL, "BLOCK_C": k._dot_block(width)})
        exact = {"D": 5, "WIDTH": width, "BLOCK_K": k._dot_block(width), **k.EXACT}
        compiles(k._crf_exact_kernel, {"SCALED": True, "ADD": True, **exact})
