import pytest
import torch
from op_tester import OpTester, compile_for_gpus
from torch.nn import functional as F

import fastcam
from fastcam.ops.pairwise_max import BWD, CANDIDATES, FWD


def pairwise_max(*args, **kwargs):
    """The values alone, whose gradient and dtype are tested."""
    return fastcam.pairwise_max(*args, **kwargs)[0]


class TestPairwiseMax(OpTester):
    op = staticmethod(pairwise_max)
    candidates = CANDIDATES
    # (B, D, N, M, metric, masked)
    cases = (
        (0, 3, 2, 4, "cosine", False),
        (1, 1, 1, 1, "cosine", False),
        (2, 3, 5, 0, "cosine", False),
        (2, 33, 53, 21, "dot", True),
        (3, 130, 61, 117, "cosine", True),
    )
    small = (2, 5, 4, 6, "cosine", True)

    def inputs(self, case, dtype, device):
        B, D, N, M, metric, masked = case
        g = torch.Generator().manual_seed(0)
        q = torch.randn(B, D, N, generator=g, dtype=torch.float64)
        s = torch.randn(B, D, M, generator=g, dtype=torch.float64)
        mask = (torch.rand(B, M, generator=g) > 0.5).to(device) if masked else None
        return (q.to(device, dtype), s.to(device, dtype)), {"metric": metric, "mask": mask}

    @pytest.mark.parametrize("metric", ["cosine", "dot"])
    def test_equals_the_maximum_of_all_similarities(self, device, backend, metric):
        (q, s), kwargs = self.inputs((2, 7, 13, 11, metric, True), torch.float32, device)
        q.requires_grad_(), s.requires_grad_()
        if metric == "dot":
            every = torch.einsum("bdn,bdm->bnm", q, s)
        else:
            every = F.cosine_similarity(q[..., :, None], s[..., None, :], dim=1)
        expected, place = every.masked_fill(~kwargs["mask"][:, None], -torch.inf).max(dim=2)
        values, indices = fastcam.pairwise_max(q, s, **kwargs, backend=backend)
        torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-6)
        assert torch.equal(indices, place)
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(device)
        torch.testing.assert_close(
            torch.autograd.grad(values, (q, s), weight),
            torch.autograd.grad(expected, (q, s), weight),
            rtol=1e-4,
            atol=1e-6,
        )

    def test_equals_the_prior_mask_of_pfenet(self, device, backend, golden):
        a = {k: torch.from_numpy(v).to(device) for k, v in golden("dsmf_net_prior").items()}
        mask = F.interpolate(a["mask"], (5, 5), mode="bilinear", align_corners=True)
        support = (a["supp_feat_4"] * mask).flatten(2)
        value = pairwise_max(a["query_feat_4"].flatten(2), support, backend=backend)
        low, high = value.amin(1, keepdim=True), value.amax(1, keepdim=True)
        prior = ((value - low) / (high - low + 1e-7)).reshape(2, 1, 5, 5)
        torch.testing.assert_close(prior, a["prior"], rtol=1e-4, atol=1e-5)

    def test_smallest_index_wins_a_tie_and_masked_support_none(self, device, backend):
        q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], device=device)
        s = torch.tensor([[[2.0, 3.0, 3.0, 0.0], [0.0, 1.0, 1.0, 0.0]]], device=device)
        values, indices = fastcam.pairwise_max(q, s, metric="dot", backend=backend)
        assert (values.tolist(), indices.tolist()) == ([[3.0, 1.0]], [[1, 1]])
        mask = torch.tensor([[True, False, True, True]], device=device)
        assert fastcam.pairwise_max(q, s, metric="dot", mask=mask, backend=backend)[1].tolist() == [[2, 2]]

    def test_ties_far_apart_go_to_the_smallest_index(self, device, backend):
        s = torch.zeros(1, 2, 200, device=device)
        s[0, 0, [70, 130, 199]] = 1.0
        q = torch.tensor([[[1.0] * 3, [0.0] * 3]], device=device)
        assert fastcam.pairwise_max(q, s, backend=backend)[1].tolist() == [[70, 70, 70]]

    def test_no_support_gives_zero_index_minus_one_and_no_gradient(self, device, backend):
        q = torch.ones(2, 3, 2, device=device, requires_grad=True)
        s = torch.ones(2, 3, 4, device=device, requires_grad=True)
        mask = torch.tensor([[False] * 4, [True] * 4], device=device)
        values, indices = fastcam.pairwise_max(q, s, mask=mask, metric="dot", backend=backend)
        assert values.tolist() == [[0.0, 0.0], [3.0, 3.0]]
        assert indices.tolist() == [[-1, -1], [0, 0]]
        values.sum().backward()
        assert q.grad[0].count_nonzero() == s.grad[0].count_nonzero() == 0
        assert s.grad[1, :, 0].tolist() == [2.0] * 3
        empty, nowhere = fastcam.pairwise_max(q, s[:, :, :0], backend=backend)
        assert (empty == 0).all()
        assert (nowhere == -1).all()

    def test_zero_features_have_cosine_zero_and_finite_gradients(self, device, backend):
        q = torch.zeros(1, 3, 2, device=device, requires_grad=True)
        s = torch.zeros(1, 3, 4, device=device, requires_grad=True)
        values, indices = fastcam.pairwise_max(q, s, backend=backend)
        assert (values == 0).all()
        assert (indices == 0).all()
        values.sum().backward()
        assert q.grad.isfinite().all()
        assert s.grad.isfinite().all()

    def test_nan_is_the_largest(self, device, backend):
        q = torch.ones(1, 2, 3, device=device)
        s = torch.ones(1, 2, 5, device=device)
        s[0, 1, 2] = torch.nan
        values, indices = fastcam.pairwise_max(q, s, backend=backend)
        assert values.isnan().all()
        assert indices.tolist() == [[2, 2, 2]]
        mask = torch.tensor([[True, True, False, True, True]], device=device)
        assert pairwise_max(q, s, mask=mask, backend=backend).isfinite().all()
        q[0, 0, 1] = torch.nan
        assert pairwise_max(q, s, mask=mask, backend=backend).isnan().tolist() == [[False, True, False]]

    def test_opcheck(self, device, backend):
        (q, s), kwargs = self.inputs(self.small, torch.float32, device)
        torch.library.opcheck(FWD, (q, s, kwargs["mask"], True, 1e-7, backend))
        values, indices = FWD(q, s, kwargs["mask"], True, 1e-7, backend)
        torch.library.opcheck(BWD, (torch.ones_like(values), q, s, indices, True, 1e-7, backend))

    def test_exceptions(self, device, backend):
        q, s = torch.ones(1, 3, 2, device=device), torch.ones(1, 3, 4, device=device)
        with pytest.raises(
            ValueError, match=r"^pairwise_max: expected query \(B, D, N\) .* got \(1, 3, 2\) and \(1, 4, 2"
        ):
            fastcam.pairwise_max(q, torch.ones(1, 4, 2, device=device))
        with pytest.raises(ValueError, match="expected metric 'cosine' or 'dot', got 'l2'"):
            fastcam.pairwise_max(q, s, metric="l2")
        with pytest.raises(ValueError, match="expected eps > 0, got 0"):
            fastcam.pairwise_max(q, s, eps=0)
        with pytest.raises(ValueError, match=r"expected mask \(B, M\) = \(1, 4\), got \(1, 2\)"):
            fastcam.pairwise_max(q, s, mask=torch.ones(1, 2, dtype=torch.bool, device=device))
        with pytest.raises(TypeError, match="expected mask of dtype bool, got float32"):
            fastcam.pairwise_max(q, s, mask=torch.ones(1, 4, device=device))
        with pytest.raises(TypeError, match="expected one dtype, got query float32, support float64"):
            fastcam.pairwise_max(q, s.double())


def test_reference_gives_the_same_in_blocks(monkeypatch):
    from fastcam.reference import pairwise_max as reference

    q, s = torch.randn(2, 5, 17), torch.randn(2, 5, 9)
    whole = reference.pairwise_max_fwd(q, s, None, True, 1e-7)
    monkeypatch.setattr(reference, "BLOCK_ELEMENTS", 2 * 9 * 4)
    torch.testing.assert_close(reference.pairwise_max_fwd(q, s, None, True, 1e-7), whole)


@pytest.mark.parametrize(("dtype", "cosine"), [("fp32", True), ("fp16", False), ("bf16", True)])
def test_triton_kernels_compile_for_several_gpu_generations(dtype, cosine):
    kernels = pytest.importorskip("fastcam.kernels.pairwise_max")
    x, sizes = f"*{dtype}", dict.fromkeys(("N", "M", "D"), "i32")
    strides = dict.fromkeys((f"{t}_stride_{i}" for t in "qs" for i in "bdn"), "i32")
    compile_for_gpus(
        kernels._pairwise_max_fwd_kernel,
        {
            "q_ptr": x,
            "s_ptr": x,
            "mask_ptr": "*i8",
            "s_norm_ptr": "*fp32",
            "value_ptr": x,
            "index_ptr": "*i64",
            **sizes,
            **strides,
            "eps": "fp32",
        },
        {"COSINE": cosine, "MASKED": True, **kernels.blocks()},
    )
    compile_for_gpus(
        kernels._pairwise_max_bwd_support_kernel,
        {
            "order_ptr": "*i64",
            "start_ptr": "*i64",
            "q_ptr": x,
            "s_ptr": x,
            "to_q_ptr": "*fp32",
            "radial_ptr": "*fp32",
            "grad_s_ptr": x,
            **sizes,
        },
        {"BLOCK_D": 64},
    )
