import pytest
import torch
import torch.nn.functional as F
from op_tester import OpTester, compile_for_gpus

from fastcam import prototype_similarity
from fastcam.ops.prototype_similarity import BWD, CANDIDATES, FWD


class TestPrototypeSimilarity(OpTester):
    op = staticmethod(prototype_similarity)
    candidates = CANDIDATES
    # (B, D, H, W, K, a set of prototypes for each image); 33, 5 x 7 and 21 are no multiple of a block
    cases = ((0, 3, 2, 2, 4, False), (1, 1, 1, 1, 1, False), (2, 33, 5, 7, 21, False), (3, 130, 9, 31, 5, True))
    small = (2, 5, 2, 3, 4, True)

    def inputs(self, case, dtype, device):
        B, D, H, W, K, batched = case
        g = torch.Generator().manual_seed(0)
        x = torch.randn(B, D, H, W, generator=g, dtype=torch.float64)
        p = torch.randn(*((B,) if batched else ()), K, D, generator=g, dtype=torch.float64)
        return (x.to(device, dtype), p.to(device, dtype)), {"activation": "relu"}

    def test_equals_cosine_similarity_of_torch(self, device, backend):
        (x, p), _ = self.inputs((2, 33, 5, 7, 21, False), torch.float32, device)
        expected = F.cosine_similarity(x[:, None], p[None, :, :, None, None], dim=2)
        torch.testing.assert_close(prototype_similarity(x, p, backend=backend), expected, rtol=1e-5, atol=1e-6)
        relu = prototype_similarity(x, p, activation="relu", backend=backend)
        torch.testing.assert_close(relu, expected.relu(), rtol=1e-5, atol=1e-6)

    def test_gradient_equals_autograd_of_normalize_and_einsum(self, device, backend):
        (x, p), _ = self.inputs(self.small, torch.float32, device)
        x.requires_grad_(), p.requires_grad_()
        expected = torch.einsum("bdhw,bkd->bkhw", F.normalize(x, dim=1), F.normalize(p, dim=2)).relu()
        weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(device)
        actual = prototype_similarity(x, p, activation="relu", backend=backend)
        torch.testing.assert_close(
            torch.autograd.grad(actual, (x, p), weight),
            torch.autograd.grad(expected, (x, p), weight),
            rtol=1e-4,
            atol=1e-6,
        )

    def test_zero_feature_and_zero_prototype_give_zero_and_finite_gradients(self, device, backend):
        x = torch.zeros(1, 4, 2, 2, device=device, requires_grad=True)
        p = torch.zeros(3, 4, device=device, requires_grad=True)
        out = prototype_similarity(x, p, backend=backend)
        assert (out == 0).all()
        out.sum().backward()
        assert x.grad.isfinite().all()
        assert p.grad.isfinite().all()

    def test_features_shorter_than_eps_are_divided_by_eps(self, device, backend):
        x = torch.tensor([3.0, 4.0], device=device).reshape(1, 2, 1, 1).requires_grad_()
        p = torch.tensor([[1.0, 0.0]], device=device)
        out = prototype_similarity(x, p, eps=10.0, backend=backend)
        out.sum().backward()
        assert out.item() == pytest.approx(3 / 10 * 1 / 10)  # both norms, 5 and 1, are below eps
        assert x.grad.flatten().tolist() == pytest.approx([0.01, 0.0])

    def test_nan_feature_gives_nan_at_its_pixel_only(self, device, backend):
        x = torch.ones(1, 3, 1, 4, device=device)
        x[0, 1, 0, 2] = torch.nan
        out = prototype_similarity(x, torch.ones(2, 3, device=device), activation="relu", backend=backend)
        assert out.isnan().any(dim=1).flatten().tolist() == [False, False, True, False]

    def test_opcheck(self, device, backend):
        (x, p), _ = self.inputs(self.small, torch.float32, device)
        torch.library.opcheck(FWD, (x, p, True, 1e-12, backend))
        out, r = FWD(x, p, True, 1e-12, backend)
        torch.library.opcheck(BWD, (torch.ones_like(out), x, p, out, r, True, 1e-12, backend))

    def test_exceptions(self, device, backend):
        x = torch.ones(1, 3, 2, 2, device=device)
        with pytest.raises(ValueError, match=r"expected features \(B, D, H, W\) .* got \(1, 3, 2, 2\) and \(5, 4\)"):
            prototype_similarity(x, torch.ones(5, 4, device=device))
        with pytest.raises(ValueError, match="got 2 sets for 1 images"):
            prototype_similarity(x, torch.ones(2, 5, 3, device=device))
        with pytest.raises(ValueError, match="expected activation None or 'relu', got 'gelu'"):
            prototype_similarity(x, torch.ones(5, 3, device=device), activation="gelu")
        with pytest.raises(ValueError, match="expected eps > 0, got 0"):
            prototype_similarity(x, torch.ones(5, 3, device=device), eps=0)
        with pytest.raises(TypeError, match="expected one dtype, got features float32, prototypes float64"):
            prototype_similarity(x, torch.ones(5, 3, device=device, dtype=torch.float64))


@pytest.mark.parametrize(("dtype", "K"), [("fp32", 21), ("fp16", 1), ("bf16", 150)])
def test_triton_kernels_compile_for_several_gpu_generations(dtype, K):
    kernels = pytest.importorskip("fastcam.kernels.prototype_similarity")
    size = kernels.blocks(K)
    x, sizes = f"*{dtype}", dict.fromkeys(("N", "D", "K", "x_stride_b", "x_stride_d", "x_stride_n"), "i32")
    last = {"p_stride_b": "i32", "eps": "fp32"}
    compile_for_gpus(
        kernels._prototype_similarity_fwd_kernel,
        {"x_ptr": x, "p_ptr": "*fp32", "out_ptr": x, "r_ptr": "*fp32", **sizes, **last},
        {"RELU": True, **size},
    )
    compile_for_gpus(
        kernels._prototype_similarity_bwd_features_kernel,
        {"grad_ptr": x, "x_ptr": x, "p_ptr": "*fp32", "out_ptr": x, "r_ptr": "*fp32", "grad_x_ptr": x, **sizes, **last},
        {"RELU": True, **size},
    )
    compile_for_gpus(
        kernels._prototype_similarity_bwd_prototypes_kernel,
        {"grad_ptr": x, "x_ptr": x, "out_ptr": x, "r_ptr": "*fp32", "parts_ptr": "*fp32", **sizes, "splits": "i32"},
        {"RELU": True, "SPLIT": kernels.SPLIT, **size},
    )
