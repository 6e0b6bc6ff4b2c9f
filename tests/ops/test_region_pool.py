import pytest
import torch
from op_tester import OpTester, compile_for_gpus
from torch.nn import functional as F

from fastcam import region_pool
from fastcam.ops.region_pool import BWD, CANDIDATES, FWD


class TestRegionPool(OpTester):
    op = staticmethod(region_pool)
    candidates = CANDIDATES
    # (B, D, H, W, K, normalize); 33, 5 x 7 and 21 are no multiple of a block
    cases = (
        (0, 3, 2, 2, 4, "sum"),
        (1, 1, 1, 1, 1, "softmax"),
        (2, 3, 4, 5, 0, "sum"),
        (2, 33, 5, 7, 21, "softmax"),
        (2, 33, 5, 7, 21, "area"),
        (1, 5, 41, 43, 3, None),
        (3, 130, 9, 31, 5, "sum"),
    )
    small = (2, 5, 2, 3, 4, "softmax")

    def inputs(self, case, dtype, device):
        B, D, H, W, K, normalize = case
        g = torch.Generator().manual_seed(0)
        x = torch.randn(B, D, H, W, generator=g, dtype=torch.float64)
        w = torch.rand(B, K, H, W, generator=g, dtype=torch.float64)
        return (x.to(device, dtype), w.to(device, dtype)), {"normalize": normalize}

    def test_equals_the_gather_of_ocr(self, device, backend, golden):
        a = {k: torch.from_numpy(v).to(device) for k, v in golden("ocr_gather").items()}
        for scale in (1, 2):
            x, logits = a["feats"].clone().requires_grad_(), a["logits"].clone().requires_grad_()
            out = region_pool(x, scale * logits, normalize="softmax", backend=backend)
            torch.testing.assert_close(out.mT[..., None], a[f"out_scale{scale}"], rtol=1e-4, atol=1e-5)
            grads = torch.autograd.grad(out, (x, logits), a["cotangent"][..., 0].mT)
            expected = a[f"grad_feats_scale{scale}"], a[f"grad_logits_scale{scale}"]
            torch.testing.assert_close(grads, expected, rtol=1e-3, atol=1e-5)
        big = region_pool(a["feats"], a["logits_big"], normalize="softmax", backend=backend)
        torch.testing.assert_close(big.mT[..., None], a["out_big"], rtol=1e-4, atol=1e-5)

    def test_equals_the_masked_average_pooling_of_pfenet(self, device, backend, golden):
        a = {k: torch.from_numpy(v).to(device) for k, v in golden("dsmf_net_weighted_gap_soft").items()}
        x = a["feat"].requires_grad_()
        out = region_pool(x, a["mask"], eps=0.0005, backend=backend)
        torch.testing.assert_close(out.mT[..., None], a["proto"], rtol=1e-4, atol=1e-5)
        (grad,) = torch.autograd.grad(out, x, a["cotangent"][..., 0].mT)
        torch.testing.assert_close(grad, a["grad_feat"], rtol=1e-4, atol=1e-5)

    def test_gradient_equals_autograd_of_einsum(self, device, backend):
        (x, w), _ = self.inputs((2, 5, 3, 4, 6, "sum"), torch.float32, device)
        x.requires_grad_(), w.requires_grad_()
        normalized = {
            "sum": w / (w.sum(dim=(2, 3), keepdim=True) + 1e-8),
            "softmax": F.softmax(w.flatten(2), dim=2).reshape(w.shape),
            "area": w / 12,
            None: w,
        }
        for normalize, m in normalized.items():
            expected = torch.einsum("bkhw,bdhw->bkd", m, x)
            weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(device)
            actual = region_pool(x, w, normalize=normalize, backend=backend)
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(
                torch.autograd.grad(actual, (x, w), weight),
                torch.autograd.grad(expected, (x, w), weight, retain_graph=True),
                rtol=1e-4,
                atol=1e-6,
            )

    def test_region_without_weight_gives_zero_and_finite_gradients(self, device, backend):
        x = torch.ones(1, 3, 2, 2, device=device, requires_grad=True)
        w = torch.zeros(1, 2, 2, 2, device=device, requires_grad=True)
        out = region_pool(x, w, backend=backend)
        assert (out == 0).all()
        out.sum().backward()
        assert x.grad.isfinite().all()
        assert w.grad.isfinite().all()

    def test_huge_logits_pick_the_largest(self, device, backend):
        x = torch.tensor([1.0, 2.0, 3.0], device=device).reshape(1, 1, 1, 3)
        w = torch.tensor([[-1e4, 1e4, 0.0]], device=device).reshape(1, 1, 1, 3)
        assert region_pool(x, w, normalize="softmax", backend=backend).item() == 2

    def test_nan_stays_in_its_region_or_channel(self, device, backend):
        x, w = torch.ones(1, 3, 2, 2, device=device), torch.ones(1, 2, 2, 2, device=device)
        w[0, 1, 0, 1] = torch.nan
        for normalize in ("sum", "softmax", "area", None):
            out = region_pool(x, w, normalize=normalize, backend=backend)
            assert out.isnan().tolist() == [[[False] * 3, [True] * 3]]
        x[0, 2, 1, 1] = torch.nan
        assert region_pool(x, w[:, :1], backend=backend).isnan().tolist() == [[[False, False, True]]]

    def test_opcheck(self, device, backend):
        (x, w), _ = self.inputs(self.small, torch.float32, device)
        torch.library.opcheck(FWD, (x, w, "sum", 1e-8, backend))
        out, r = FWD(x, w, "sum", 1e-8, backend)
        torch.library.opcheck(BWD, (torch.ones_like(out), x, w, out, r, "sum", backend))

    def test_exceptions(self, device, backend):
        x, w = torch.ones(1, 3, 2, 2, device=device), torch.ones(1, 5, 2, 2, device=device)
        with pytest.raises(
            ValueError, match=r"^region_pool: expected features \(B, D, H, W\) .* got \(1, 3, 2, 2\) and"
        ):
            region_pool(x, torch.ones(1, 5, 2, 3, device=device))
        with pytest.raises(ValueError, match="expected normalize 'sum', 'softmax', 'area' or None, got 'mean'"):
            region_pool(x, w, normalize="mean")
        with pytest.raises(ValueError, match="expected eps >= 0, got -1"):
            region_pool(x, w, eps=-1)
        with pytest.raises(TypeError, match="expected one dtype, got features float32, weights float64"):
            region_pool(x, w.double())


@pytest.mark.parametrize(("dtype", "K", "softmax"), [("fp32", 21, True), ("fp16", 1, False), ("bf16", 150, True)])
def test_triton_kernels_compile_for_several_gpu_generations(dtype, K, softmax):
    kernels = pytest.importorskip("fastcam.kernels.region_pool")
    size, x = kernels.blocks(K), f"*{dtype}"
    sizes = dict.fromkeys(("N", "D", "K", "x_stride_b", "x_stride_d", "x_stride_n"), "i32")
    strides = dict.fromkeys(("w_stride_b", "w_stride_k", "w_stride_n"), "i32")
    flags = {"SOFTMAX": softmax}
    compile_for_gpus(
        kernels._region_pool_fwd_kernel,
        {"x_ptr": x, "w_ptr": x, "shift_ptr": "*fp32", "parts_ptr": "*fp32", **sizes, "splits": "i32", **strides},
        {**flags, "SPLIT": kernels.SPLIT, **size},
    )
    compile_for_gpus(
        kernels._region_pool_bwd_features_kernel,
        {"grad_ptr": x, "w_ptr": x, "r_ptr": "*fp32", "grad_x_ptr": x, "N": "i32", "D": "i32", "K": "i32", **strides},
        {**flags, **size},
    )
    compile_for_gpus(
        kernels._region_pool_bwd_weights_kernel,
        {"grad_ptr": x, "x_ptr": x, "w_ptr": x, "out_ptr": x, "r_ptr": "*fp32", "grad_w_ptr": x, **sizes, **strides},
        {**flags, "CENTRED": True, **size},
    )
