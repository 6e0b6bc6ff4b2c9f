import pytest
import torch
from op_tester import OpTester, compile_for_gpus
from torch.nn import functional as F

import fastcam
from fastcam.ops.attention_maps import BWD, CANDIDATES, FWD


def attention_maps(*args, **kwargs):
    """Both results in one tensor, so that values and gradients of both are tested."""
    out, maps = fastcam.attention_maps(*args, **kwargs)
    return torch.cat([out.flatten(), maps.flatten().to(out.dtype)])


class TestAttentionMaps(OpTester):
    op = staticmethod(attention_maps)
    candidates = CANDIDATES
    # (B, H, N, M, d, rows, skip, with a sum to add to); 53, 101 and 33 are no multiple of a block
    cases = (
        (0, 2, 3, 3, 4, 3, 0, True),
        (1, 1, 1, 1, 1, 1, 0, False),
        (2, 3, 1, 7, 5, 0, 2, False),
        (2, 2, 53, 101, 33, 53, 4, True),
        (1, 3, 101, 101, 16, 4, 4, False),
    )
    small = (2, 2, 5, 6, 3, 3, 1, True)

    def inputs(self, case, dtype, device):
        B, H, N, M, d, rows, skip, summed = case
        g = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(B, H, n, d, generator=g, dtype=torch.float64) for n in (N, M, M))
        args = tuple(t.to(device, dtype) for t in (2 * q, k, v))
        if summed:
            total = torch.rand(B, rows, M - skip, generator=g, dtype=torch.float64)
            args = (*args, total.to(device, torch.promote_types(dtype, torch.float32)))
        return args, {"rows": rows, "skip": skip}

    def test_equals_scaled_dot_product_attention_and_softmax_with_their_gradients(self, device, backend):
        (q, k, v, total), _ = self.inputs((2, 3, 53, 61, 16, 53, 5, True), torch.float32, device)
        inputs = [t.requires_grad_() for t in (q, k, v, total)]
        out, maps = fastcam.attention_maps(*inputs, skip=5, scale=0.3, backend=backend)
        expected_out = F.scaled_dot_product_attention(q, k, v, scale=0.3)
        expected_maps = total + (q @ k.mT * 0.3).softmax(-1).mean(1)[:, :, 5:]
        torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(maps, expected_maps, rtol=1e-5, atol=1e-6)
        g = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=g).to(device) for t in (out, maps)]
        torch.testing.assert_close(
            torch.autograd.grad((out, maps), inputs, weights),
            torch.autograd.grad((expected_out, expected_maps), inputs, weights),
            rtol=1e-4,
            atol=1e-5,
        )

    @pytest.mark.parametrize("which", [0, 1])
    def test_gradient_of_either_result_alone(self, device, backend, which):
        args, kwargs = self.inputs(self.small, torch.float32, device)
        q, k, v = inputs = [t.requires_grad_() for t in args[:3]]
        result = fastcam.attention_maps(*inputs, **kwargs, backend=backend)[which]
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        expected = (weights @ v, weights.mean(1)[:, : kwargs["rows"], kwargs["skip"] :])[which]
        cotangent = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(device)
        actual = torch.autograd.grad(result, inputs, cotangent)
        reached = [q, k, v][: 3 - which]  # maps do not depend on the values
        torch.testing.assert_close(
            actual[: len(reached)], torch.autograd.grad(expected, reached, cotangent), rtol=1e-4, atol=1e-6
        )
        assert which == 0 or actual[2].count_nonzero() == 0

    def test_rows_over_all_keys_sum_to_the_number_of_blocks(self, device, backend):
        args, _ = self.inputs((2, 3, 9, 9, 4, 9, 0, False), torch.float32, device)
        maps = None
        for blocks in (1, 2):
            _, maps = fastcam.attention_maps(*args, maps, backend=backend)
            torch.testing.assert_close(maps.sum(-1), torch.full((2, 9), float(blocks), device=device))

    def test_large_scores_stay_finite_and_pick_one_key(self, device, backend):
        q = torch.full((1, 1, 2, 4), 100.0, device=device)
        k = torch.zeros(1, 1, 3, 4, device=device)
        k[:, :, 1] = 100
        v = torch.arange(3.0, device=device).view(1, 1, 3, 1).expand(1, 1, 3, 4)
        out, maps = fastcam.attention_maps(q, k, v, backend=backend)
        assert maps.tolist() == [[[0, 1, 0]] * 2]
        assert (out == 1).all()

    def test_nan_query_stays_in_its_row(self, device, backend):
        args, _ = self.inputs((1, 2, 5, 5, 4, 5, 0, False), torch.float32, device)
        args[0][0, 1, 3] = torch.nan
        out, maps = fastcam.attention_maps(*args, backend=backend)
        assert maps.isnan().all(2).tolist() == [[False, False, False, True, False]]
        assert maps.isnan().sum() == 5
        assert out[0, 1, 3].isnan().all()
        assert out.isnan().sum() == 4

    def test_maps_of_16_bit_inputs_are_float32(self, device, backend):
        args, kwargs = self.inputs(self.small, torch.bfloat16, device)
        out, maps = fastcam.attention_maps(*args, **kwargs, backend=backend)
        assert (out.dtype, maps.dtype) == (torch.bfloat16, torch.float32)

    def test_opcheck(self, device, backend):
        (q, k, v, total), _ = self.inputs(self.small, torch.float32, device)
        torch.library.opcheck(FWD, (q, k, v, total, 3, 1, 0.5, backend))
        torch.library.opcheck(FWD, (q, k, v, None, 5, 0, 0.5, backend))
        out, maps, lse = FWD(q, k, v, None, 3, 1, 0.5, backend)
        for grad_maps in (None, torch.ones_like(maps)):
            torch.library.opcheck(BWD, (torch.ones_like(out), grad_maps, q, k, v, lse, 1, 0.5, backend))

    def test_exceptions(self, device, backend):
        q = torch.ones(1, 2, 3, 4, device=device)
        with pytest.raises(ValueError, match=r"expected q \(B, H, N, d\) .* got \(1, 2, 3, 4\), \(1, 2, 3, 5\)"):
            fastcam.attention_maps(q, q.new_ones(1, 2, 3, 5), q.new_ones(1, 2, 3, 5))
        with pytest.raises(ValueError, match=r"expected q \(B, H, N, d\)"):
            fastcam.attention_maps(q[0], q[0], q[0])
        with pytest.raises(ValueError, match="at least one head, key and channel, got 2, 0 and 4"):
            fastcam.attention_maps(q, q[:, :, :0], q[:, :, :0])
        with pytest.raises(ValueError, match=r"rows in 0\.\.3 .* got 4 and 0"):
            fastcam.attention_maps(q, q, q, rows=4)
        with pytest.raises(ValueError, match=r"skip in 0\.\.3 .* got 3 and -1"):
            fastcam.attention_maps(q, q, q, skip=-1)
        with pytest.raises(ValueError, match=r"expected total \(1, 3, 3\), got \(1, 2, 3\)"):
            fastcam.attention_maps(q, q, q, q.new_ones(1, 2, 3))
        with pytest.raises(TypeError, match="expected one dtype, got q float32, k float64, v float64"):
            fastcam.attention_maps(q, q.double(), q.double())
        with pytest.raises(TypeError, match=r"expected total in float32 on \w+, got float64"):
            fastcam.attention_maps(q, q, q, q.new_ones(1, 3, 3).double())


@pytest.mark.parametrize(("dtype", "d"), [("fp32", 32), ("bf16", 64)])
def test_triton_kernels_compile_for_several_gpu_generations(dtype, d):
    kernels = pytest.importorskip("fastcam.kernels.attention_maps")
    x, f, size = f"*{dtype}", "*fp32", kernels.blocks(d, torch.float32 if dtype == "fp32" else torch.bfloat16)
    sizes = dict.fromkeys(("H", "N", "M", "D", "rows", "skip"), "i32") | {"scale": "fp32"}
    inputs = {"q_ptr": x, "k_ptr": x, "v_ptr": x, "lse_ptr": f}
    few = {name: sizes[name] for name in ("N", "M", "D", "scale")}
    compile_for_gpus(kernels._attention_maps_fwd_kernel, {**inputs, "out_ptr": x, **few}, size)
    mean = {"q_ptr": x, "k_ptr": x, "lse_ptr": f, "total_ptr": f, "maps_ptr": f}
    compile_for_gpus(kernels._attention_maps_mean_kernel, {**mean, **sizes}, {"HAS_TOTAL": True, **size})
    both = {**inputs, "grad_ptr": x, "grad_maps_ptr": f, "inner_ptr": f, **sizes}
    has = {"HAS_MAPS": True, **size}
    compile_for_gpus(kernels._attention_maps_bwd_queries_kernel, {**both, "grad_q_ptr": x}, has)
    compile_for_gpus(kernels._attention_maps_bwd_keys_kernel, {**both, "grad_k_ptr": x, "grad_v_ptr": x}, has)
