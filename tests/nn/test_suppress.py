"""Discriminative region suppression: values, gradient, and its place in a network."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.nn import SuppressedReLU, create_trunk, score_head, suppress, suppress_activations

GOLDEN = {"rtol": 1e-4, "atol": 1e-5}


def with_gradient(x, controller, grad, cap=math.inf):
    x = x.detach().clone().requires_grad_()
    y = suppress(x, controller, cap)
    y.backward(grad)
    return y.detach(), x.grad


class TestGolden:
    def test_fixed_controller(self, golden):
        arrays = {k: torch.from_numpy(v) for k, v in golden("drs_fixed").items()}
        out, grad = with_gradient(arrays["x"], float(arrays["delta"]), arrays["grad_out"])
        torch.testing.assert_close(out, arrays["out"], **GOLDEN)
        torch.testing.assert_close(grad, arrays["grad_x"], **GOLDEN)

    def test_learnable_controller_within_a_network(self, golden):
        arrays = {k: torch.from_numpy(v) for k, v in golden("drs_chain").items()}
        names = ("conv1_w", "conv1_b", "conv2_w", "conv2_b", "drs_fc")
        p = {name: arrays[name].requires_grad_() for name in names}
        x = suppress(F.conv2d(arrays["x"], p["conv1_w"], p["conv1_b"], padding=1), p["drs_fc"])
        logit = F.conv2d(x, p["conv2_w"], p["conv2_b"]).mean((2, 3))
        loss = F.multilabel_soft_margin_loss(logit, arrays["label"])
        loss.backward()
        torch.testing.assert_close(logit, arrays["logit"], **GOLDEN)
        torch.testing.assert_close(loss, arrays["loss"], **GOLDEN)
        for name in names:
            torch.testing.assert_close(p[name].grad, arrays[f"grad_{name}"], **GOLDEN)


class TestFormula:
    def test_case_by_hand(self):
        x = torch.tensor([[[[-1.0, 1.0, 4.0, 3.0]]]])
        out, grad = with_gradient(x, 0.5, torch.tensor([[[[1.0, 10.0, 100.0, 1000.0]]]]))
        assert out.tolist() == [[[[0, 1, 2, 2]]]]
        assert grad.tolist() == [[[[0, 10, 550, 0]]]]  # half of the clipped pixels' 1100 goes to the maximum

    @pytest.mark.parametrize("cap", [math.inf, 1.0])
    @pytest.mark.parametrize("controller", [0.55, 1.0, "learnable"])
    def test_gradient_is_exact(self, controller, cap):
        torch.manual_seed(0)
        x = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
        if controller == "learnable":
            weight = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
            assert torch.autograd.gradcheck(lambda x, w: suppress(x, w, cap), (x, weight))
        else:
            assert torch.autograd.gradcheck(lambda x: suppress(x, controller, cap), (x,))

    @pytest.mark.parametrize("layout", ["channels last", "transposed", "every other"])
    @pytest.mark.parametrize("controller", [0.5, torch.ones(4, 4)])
    def test_strides_make_no_difference(self, controller, layout):
        torch.manual_seed(0)
        grad = torch.randn(2, 4, 6, 6)
        x = {
            "channels last": torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last),
            "transposed": torch.randn(2, 4, 6, 6).transpose(2, 3),
            "every other": torch.randn(2, 4, 12, 12)[..., ::2, ::2],
        }[layout].requires_grad_()
        y = suppress(x, controller)
        expected, expected_grad = with_gradient(x.contiguous(), controller, grad)
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], expected_grad)

    @pytest.mark.parametrize("cap", [math.inf, 6.0])
    def test_share_of_one_is_the_plain_activation_even_where_maxima_tie(self, cap):
        torch.manual_seed(0)
        x, grad = (torch.randn(2, 4, 5, 7) * 6).round(), torch.randn(2, 4, 5, 7)
        plain = x.clone().requires_grad_()
        expected = plain.clamp(0, cap)
        F.hardtanh(plain, 0, cap).backward(grad) if cap < math.inf else F.relu(plain).backward(grad)
        out, got = with_gradient(x, 1.0, grad, cap)
        assert torch.equal(out, expected)
        assert torch.equal(got, plain.grad)

    def test_values_stay_below_the_limit_and_reach_it(self):
        torch.manual_seed(0)
        x = torch.randn(3, 5, 6, 6)
        y, z = suppress(x, 0.4), x.relu()
        limit = 0.4 * z.amax((2, 3), keepdim=True)
        assert (y <= limit).all()
        assert torch.equal(y[z <= limit], z[z <= limit])
        assert torch.equal(y.amax((2, 3), keepdim=True), limit)

    def test_scale_of_the_input_scales_the_output_of_the_fixed_one(self):
        x = torch.randn(2, 3, 4, 4)
        torch.testing.assert_close(suppress(4 * x, 0.55), 4 * suppress(x, 0.55))

    def test_twice_lowers_the_maximum_twice(self):
        x = torch.rand(1, 2, 4, 4)
        twice = suppress(suppress(x, 0.5), 0.5)
        torch.testing.assert_close(twice.amax((2, 3)), 0.25 * x.amax((2, 3)))

    def test_channels_and_images_do_not_see_each_other(self):
        torch.manual_seed(0)
        x, weight = torch.randn(3, 4, 5, 5), torch.randn(4, 4)
        torch.testing.assert_close(suppress(x, 0.6)[1:2, 2:3], suppress(x[1:2, 2:3], 0.6))
        torch.testing.assert_close(suppress(x, weight)[1:2], suppress(x[1:2], weight))

    def test_order_of_pixels_does_not_matter(self):
        torch.manual_seed(0)
        x, weight, order = torch.randn(2, 3, 1, 20), torch.randn(3, 3), torch.randperm(20)
        torch.testing.assert_close(suppress(x, weight)[..., order], suppress(x[..., order], weight))

    @pytest.mark.parametrize("controller", [0.55, torch.ones(2, 2)])
    def test_channel_without_positive_values_gives_zero_and_no_gradient(self, controller):
        x = -torch.rand(1, 2, 3, 3)
        out, grad = with_gradient(x, controller, torch.ones(1, 2, 3, 3))
        assert out.count_nonzero() == 0
        assert grad.count_nonzero() == 0

    def test_constant_channel_hands_its_whole_gradient_to_the_first_pixel(self):
        grad = torch.randn(1, 1, 3, 4)
        out, got = with_gradient(torch.full((1, 1, 3, 4), 2.0), 0.25, grad)
        assert out.unique().tolist() == [0.5]
        assert got.flatten()[0].item() == pytest.approx(0.25 * grad.sum().item())
        assert got.flatten()[1:].count_nonzero() == 0

    def test_sum_of_the_gradient(self):
        torch.manual_seed(0)
        x, grad = torch.randn(2, 3, 6, 7), torch.randn(2, 3, 6, 7)
        clipped = x > 0.55 * x.relu().amax((2, 3), keepdim=True)
        expected = grad[~clipped & (x > 0)].sum() + 0.55 * grad[clipped].sum()
        torch.testing.assert_close(with_gradient(x, 0.55, grad)[1].sum(), expected)

    def test_zero_weight_is_a_half_and_a_large_one_is_the_relu(self):
        x = torch.randn(2, 3, 4, 4)
        assert torch.equal(suppress(x, torch.zeros(3, 3)), suppress(x, 0.5))
        assert torch.equal(suppress(x, torch.full((3, 3), 1e6)), x.relu())

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_clipped_pixels_hold_one_value_in_half_precision(self, dtype):
        torch.manual_seed(0)
        x = torch.randn(2, 3, 20, 20).to(dtype)
        out, grad = with_gradient(x, 0.55, torch.ones_like(x))
        limit = (x.amax((2, 3)) * 0.55)[:, :, None, None]
        assert out.dtype == grad.dtype == dtype
        assert torch.equal(out[x > limit], limit.expand_as(x)[x > limit])

    def test_one_pixel(self):
        out, grad = with_gradient(torch.tensor([[[[2.0]]]]), 0.5, torch.tensor([[[[3.0]]]]))
        assert (out.item(), grad.item()) == (1.0, 1.5)

    def test_no_image_gives_no_image(self):
        assert suppress(torch.zeros(0, 3, 4, 4), 0.5).shape == (0, 3, 4, 4)

    def test_nan_stays_in_its_channel(self):
        x = torch.ones(1, 2, 2, 2)
        x[0, 0, 0, 0] = torch.nan
        out = suppress(x, 0.5)
        assert out[0, 0].isnan().any()
        assert out[0, 1].unique().tolist() == [0.5]

    def test_bad_arguments_are_refused(self):
        with pytest.raises(
            ValueError, match=r"suppress: expected x \(B, C, H, W\) floating point .* got torch.float32"
        ):
            suppress(torch.zeros(2, 3), 0.5)
        with pytest.raises(ValueError, match="with at least one pixel"):
            suppress(torch.zeros(2, 3, 0, 4), 0.5)
        with pytest.raises(ValueError, match=r"suppress: expected a controller \(3, 3\), got \(2, 3\)"):
            suppress(torch.zeros(1, 3, 2, 2), torch.zeros(2, 3))
        for share in (0.0, 1.1, math.nan):
            with pytest.raises(ValueError, match=r"suppress: expected a controller above 0 and at most 1"):
                suppress(torch.zeros(1, 3, 2, 2), share)
        with pytest.raises(ValueError, match="SuppressedReLU: expected delta above 0"):
            SuppressedReLU(2.0)
        with pytest.raises(ValueError, match="SuppressedReLU: expected delta, or channels"):
            SuppressedReLU()


class TestPlugIn:
    def test_every_relu_that_learns_is_replaced_in_the_order_of_running(self):
        pytest.importorskip("timm")
        backbone = create_trunk("resnet10t", output_stride=16)
        new = suppress_activations(backbone)
        assert [m.controller.shape[0] for m in new] == [24, 32, 64, 64, 64, 128, 128, 256, 256, 512, 512]
        assert not any(isinstance(m, nn.ReLU) for m in backbone.modules())

    def test_frozen_stages_keep_their_activations(self):
        pytest.importorskip("timm")
        backbone = create_trunk("mobilenetv2_035", output_stride=16, frozen_stages=3)
        before = sum(isinstance(m, nn.ReLU6) for m in backbone.modules())
        new = suppress_activations(backbone, 0.5)
        assert {m.cap for m in new} == {6.0}
        assert sum(isinstance(m, nn.ReLU6) for m in backbone.modules()) == before - len(new)
        assert 0 < len(new) < before

    def test_last_ones_alone(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU())
        assert suppress_activations(net, 0.5, last=1) == [net[3]]
        assert isinstance(net[1], nn.ReLU)
        with pytest.raises(ValueError, match="suppress_activations: expected last of 1 or more, or None, got 0"):
            suppress_activations(net, last=0)

    def test_share_of_one_leaves_the_network_as_it_was(self):
        pytest.importorskip("timm")
        torch.manual_seed(0)
        backbone, image = create_trunk("mobilenetv2_035", output_stride=16).eval(), torch.randn(1, 3, 64, 64)
        with torch.no_grad():
            before = backbone(image)
            suppress_activations(backbone, 1.0)
            for a, b in zip(backbone(image), before, strict=True):
                assert torch.equal(a, b)

    def test_statistics_and_modes_are_left_alone(self):
        net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).train()
        suppress_activations(net, 0.5)
        assert net.training
        assert net[1].num_batches_tracked == 0
        assert isinstance(net[2], SuppressedReLU)

    def test_shared_activation_and_network_without_relu_are_refused(self):
        relu = nn.ReLU()
        shared = nn.Sequential(nn.Conv2d(3, 4, 3), relu, nn.Conv2d(4, 5, 3), relu)
        with pytest.raises(FastcamError, match="activation '1' serves layers of several shapes"):
            suppress_activations(shared)
        with pytest.raises(FastcamError, match="network Sequential: has no ReLU behind a layer that learns"):
            suppress_activations(nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU()))


class TestTrunk:
    def test_vgg16_has_the_layout_of_the_authors(self):
        pytest.importorskip("timm")
        backbone = create_trunk("vgg16", output_stride=8)
        pools = [m for m in backbone.net.modules() if isinstance(m, nn.MaxPool2d)]
        assert [(m.kernel_size, m.stride, m.padding) for m in pools[3:]] == [(3, 1, 1), (1, 1, 0)]
        convolutions = [m for m in backbone.net.modules() if isinstance(m, nn.Conv2d)]
        assert [(m.dilation, m.padding) for m in convolutions[-3:]] == [((2, 2), (2, 2))] * 3
        assert (backbone.channels[-1], backbone.strides[-1]) == (512, 8)

    def test_head_has_its_layers(self):
        head = score_head(8, 5, width=6, layers=2)
        assert [type(m).__name__ for m in head] == ["Conv2d", "ReLU", "Conv2d", "ReLU", "Conv2d"]
        assert head(torch.zeros(1, 8, 4, 4)).shape == (1, 5, 4, 4)
        assert len(score_head(8, 5, layers=0)) == 1
