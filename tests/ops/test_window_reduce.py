import math

import numpy as np
import pytest
import torch
from op_tester import OpTester, compile_for_gpus

from fastcam import window_reduce
from fastcam.ops.window_reduce import BWD, CANDIDATES, FWD, ring_weights


def regions(B, H, W, count, seed=0):
    """Labels in square patches, some of them ignored, so that windows of one, of several and of no label occur."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.randint(count, (B, -(-H // 9), -(-W // 9)), generator=g)
    coarse[torch.rand(coarse.shape, generator=g) < 0.1] = 255
    return coarse.repeat_interleave(9, 1).repeat_interleave(9, 2)[:, :H, :W].contiguous()


def by_hand(x, labels, window, sigma, normalize, ignore=255):
    """Every window of one image in float64, as the paper words it."""
    K, H, W = x.shape
    out, reach = np.zeros((K, H, W)), window // 2
    for i in range(H):
        for j in range(W):
            total, weights, count = np.zeros(K), 0.0, 0
            for a in range(max(0, i - reach), min(H, i + reach + 1)):
                for b in range(max(0, j - reach), min(W, j + reach + 1)):
                    if labels[a, b] == labels[i, j] != ignore:
                        w = np.exp(-(max(abs(a - i), abs(b - j)) ** 2) / (2 * sigma**2))
                        total, weights, count = total + w * x[:, a, b], weights + w, count + 1
            if count:
                out[:, i, j] = total / (count if normalize == "count" else weights)
    return out


class TestWindowReduce(OpTester):
    op = staticmethod(window_reduce)
    candidates = CANDIDATES
    # (B, K, H, W, labels, window, sigma, normalize); windows beyond the image, widths that are no multiple of a block
    cases = (
        (0, 3, 4, 5, 2, 5, None, "count"),
        (2, 0, 4, 5, 2, 5, None, "count"),
        (1, 1, 1, 1, 1, 5, None, "weight"),
        (1, 2, 3, 5, 2, 21, math.inf, "count"),
        (2, 3, 17, 33, 3, 1, None, "count"),
        (1, 3, 19, 70, 2, 3, 0.5, "weight"),
        (2, 4, 41, 67, 3, 7, None, "count"),
        (1, 2, 40, 100, 1, 9, math.inf, "weight"),
        (2, 21, 41, 97, 4, 5, 1.0, "count"),
    )
    small = (2, 3, 3, 5, 2, 3, None, "count")

    def inputs(self, case, dtype, device):
        B, K, H, W, count, window, sigma, normalize = case
        g = torch.Generator().manual_seed(0)
        x = torch.randn(B, K, H, W, generator=g, dtype=torch.float64)
        labels = regions(B, H, W, count)
        if case == self.small:
            labels = torch.randint(count, (B, H, W), generator=g)
            labels[0, 1] = 255
        options = {"labels": labels.to(device), "window": window, "sigma": sigma, "normalize": normalize}
        return (x.to(device, dtype),), options

    @pytest.mark.parametrize("normalize", ["count", "weight"])
    @pytest.mark.parametrize(("window", "sigma"), [(1, 1.0), (3, 0.5), (5, 1.0), (7, 1.5), (5, math.inf)])
    def test_equals_every_window_by_hand(self, device, backend, window, sigma, normalize):
        rng = np.random.default_rng(0)
        x, labels = rng.standard_normal((2, 6, 7)), rng.integers(0, 3, (6, 7))
        labels[rng.random((6, 7)) < 0.2] = 255
        expected = torch.from_numpy(by_hand(x, labels, window, sigma, normalize)).float()
        options = {"window": window, "sigma": sigma, "normalize": normalize, "backend": backend}
        y = torch.from_numpy(labels)[None].to(device)
        actual = window_reduce(torch.from_numpy(x).float()[None].to(device), y, **options)
        torch.testing.assert_close(actual[0].cpu(), expected, rtol=1e-5, atol=1e-6)

    def test_one_label_gives_the_factor_of_the_paper_inside_and_a_true_mean_by_weight(self, device, backend):
        x, labels = torch.ones(1, 1, 9, 9, device=device), torch.zeros(1, 9, 9, dtype=torch.int64, device=device)
        inside = (1 + 8 * math.exp(-0.5) + 16 * math.exp(-2)) / 25
        assert window_reduce(x, labels, backend=backend)[0, 0, 4, 4].item() == pytest.approx(inside, rel=1e-6)
        torch.testing.assert_close(window_reduce(x, labels, normalize="weight", backend=backend), x)

    def test_backward_is_the_transpose(self, device, backend):
        g = torch.Generator().manual_seed(3)
        x, u = torch.randn(2, 2, 2, 12, 40, generator=g).to(device)
        labels = regions(2, 12, 40, 2).to(device)
        for normalize in ("count", "weight"):
            leaf = x.clone().requires_grad_()
            out = window_reduce(leaf, labels, window=3, normalize=normalize, backend=backend)
            out.backward(u)
            # out is linear in x: <P x, u> = <x, P^T u>
            assert float((out.detach() * u).sum()) == pytest.approx(float((x * leaf.grad).sum()), rel=1e-4)

    def test_other_labels_do_not_reach_a_pixel_even_if_not_a_number(self, device, backend):
        labels = torch.tensor([0, 0, 1, 1, 255, 255]).expand(1, 6, 6).contiguous().to(device)
        x = torch.randn(1, 2, 6, 6, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
        plain = window_reduce(x, labels, backend=backend)
        dirty = x.detach().clone()
        dirty[..., 2:] = torch.tensor([math.nan, math.inf, math.nan, -math.inf], device=device)
        out = window_reduce(dirty, labels, backend=backend)
        torch.testing.assert_close(out[..., :2], plain[..., :2].detach(), rtol=0, atol=0)
        assert not out[..., 4:].any()
        (grad,) = torch.autograd.grad(plain, x, torch.where(labels[:, None] == 0, 1.0, math.nan).expand_as(plain))
        assert grad[..., :2].isfinite().all()
        assert not grad[..., 4:].any()

    def test_all_different_labels_change_nothing(self, device, backend):
        x = torch.randn(1, 2, 8, 9, generator=torch.Generator().manual_seed(0)).to(device)
        labels = torch.arange(72, device=device).reshape(1, 8, 9)
        torch.testing.assert_close(window_reduce(x, labels, ignore_index=-1, backend=backend), x)

    def test_border_windows_equal_those_of_a_padded_image(self, device, backend):
        x = torch.randn(1, 2, 8, 40, generator=torch.Generator().manual_seed(0)).to(device)
        labels = regions(1, 8, 40, 2).to(device)
        padded = torch.full((1, 10, 42), 7, device=device)
        padded[:, 1:-1, 1:-1] = labels
        wide = torch.zeros(1, 2, 10, 42, device=device)
        wide[..., 1:-1, 1:-1] = x
        actual = window_reduce(wide, padded, window=3, backend=backend)[..., 1:-1, 1:-1]
        torch.testing.assert_close(actual, window_reduce(x, labels, window=3, backend=backend))

    def test_mirror_image_and_transposition_commute(self, device, backend):
        x = torch.randn(1, 2, 20, 37, generator=torch.Generator().manual_seed(0)).to(device)
        labels = regions(1, 20, 37, 3).to(device)
        out = window_reduce(x, labels, backend=backend)
        torch.testing.assert_close(window_reduce(x.flip(-1), labels.flip(-1), backend=backend).flip(-1), out)
        torch.testing.assert_close(window_reduce(x.mT, labels.mT, backend=backend).mT, out)

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
    def test_every_integer_type_of_labels_gives_the_same(self, device, backend, dtype):
        x, labels = torch.randn(1, 2, 9, 40).to(device), regions(1, 9, 40, 3).to(device)
        labels[:, :4, :4] = 255
        expected = window_reduce(x, labels, backend=backend)
        torch.testing.assert_close(window_reduce(x, labels.to(dtype), backend=backend), expected, rtol=0, atol=0)

    def test_opcheck(self, device, backend):
        (x,), options = self.inputs(self.small, torch.float32, device)
        labels, rings = options["labels"].int(), ring_weights(3)
        torch.library.opcheck(FWD, (x, labels, rings, True, backend))
        out, r = FWD(x, labels, rings, True, backend)
        torch.library.opcheck(BWD, (torch.ones_like(out), labels, r, rings, backend))

    def test_exceptions(self, device, backend):
        x, labels = torch.ones(1, 3, 2, 2, device=device), torch.zeros(1, 2, 2, dtype=torch.int64, device=device)
        with pytest.raises(ValueError, match=r"^window_reduce: expected x \(B, K, H, W\) .* got \(1, 3, 2, 2\) and"):
            window_reduce(x, labels[:, :1])
        with pytest.raises(ValueError, match="expected an odd window >= 1, got 4"):
            window_reduce(x, labels, window=4)
        with pytest.raises(ValueError, match="expected sigma > 0, got nan"):
            window_reduce(x, labels, sigma=math.nan)
        with pytest.raises(ValueError, match="expected normalize 'count' or 'weight', got 'sum'"):
            window_reduce(x, labels, normalize="sum")
        with pytest.raises(TypeError, match="expected integer labels, got float32"):
            window_reduce(x, labels.float())


def test_default_rings_are_a_bell_whose_edge_weighs_e_to_minus_two():
    assert ring_weights(1) == [1.0]
    for window in (5, 7, 9):
        assert ring_weights(window)[-1] == pytest.approx(math.exp(-2))
    assert ring_weights(3) == pytest.approx([1.0, math.exp(-2)])
    assert ring_weights(5, math.inf) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("dtype", "K", "backward"), [("fp32", 21, False), ("fp16", 1, False), ("bf16", 150, True)])
def test_triton_kernel_compiles_for_several_gpu_generations(dtype, K, backward):
    kernels = pytest.importorskip("fastcam.kernels.window_reduce")
    x = f"*{dtype}"
    numbers = ("H", "W", "K", "reach", "x_stride_b", "x_stride_k", "x_stride_h", "x_stride_w")
    pointers = {"x_ptr": x, "labels_ptr": "*i32", "rings_ptr": "*fp32", "r_ptr": "*fp32", "out_ptr": x}
    compile_for_gpus(
        kernels._window_reduce_kernel,
        {**pointers, **dict.fromkeys(numbers, "i32")},
        {"BACKWARD": backward, "BY_COUNT": not backward, **kernels.blocks(K)},
    )
