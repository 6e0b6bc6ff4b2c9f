"""Peak stimulation and the walk from a peak back to the image."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastcam.nn import peak_backprop, peak_response_maps, peak_stimulation
from fastcam.nn.peaks import TopDown, conv_topdown


def tensors(golden, name):
    return {key: torch.from_numpy(value) for key, value in golden(name).items() if value.dtype.kind != "U"}


@pytest.fixture
def plain(golden):
    """The authors' tiny network, with its weights, and their results on it."""
    arrays = tensors(golden, "prm_plain")
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2, 2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 3, 1),
    )
    network.load_state_dict({key[2:]: value for key, value in arrays.items() if key.startswith("w_")})
    return network.eval(), arrays


class Residual(nn.Module):
    """A block with batch norms, and a sum in one of the ways that networks write it."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.first, self.second = (nn.Conv2d(6, 6, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(2))

    def forward(self, x):
        y = self.norms[1](self.second(F.relu6(self.norms[0](self.first(x)))))
        if self.how == "+=":
            y += x
        else:
            y = torch.add(y, x) if self.how == "add" else y + x
        return F.relu(y, inplace=True)


def residual(how="+"):
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, 2, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(), Residual(how), nn.Conv2d(6, 3, 1)
    )
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.weight, -1, 2)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.running_mean, -0.2, 0.2)
    return network.eval()


class TestPeakStimulation:
    def test_equals_the_authors_logits_and_gradients(self, golden):
        a = tensors(golden, "prm_stimulation")
        filters = {"none": None, "median": "median", "mean": "mean", "max": "max", "const": 0.5}
        for window in (3, 5, 7):
            for name, threshold in filters.items():
                key, x = f"rnd_w{window}_{name}", a["rnd_in"].clone().requires_grad_()
                logits, peaks, _ = peak_stimulation(x, window=window, threshold=threshold, exact_grad=False)
                torch.testing.assert_close(logits, a[f"{key}_agg"], rtol=1e-4, atol=1e-6)
                assert torch.equal(peaks, a[f"{key}_peaks"])
                (grad,) = torch.autograd.grad(logits.sum(), x)
                torch.testing.assert_close(grad, a[f"{key}_grad"], rtol=1e-4, atol=1e-6)
        logits, peaks, _ = peak_stimulation(a["plateau_in"], threshold=None)
        assert torch.equal(peaks, a["plateau_peaks"])
        torch.testing.assert_close(logits, a["plateau_agg"])

    def test_equals_the_authors_through_a_network(self, plain):
        network, a = plain
        x = a["x"].clone().requires_grad_()
        maps = network(x)
        logits, peaks, _ = peak_stimulation(maps, exact_grad=False)
        assert torch.equal(peaks, a["peak_list"])
        torch.testing.assert_close(logits, a["aggregation"], rtol=1e-4, atol=1e-6)
        grads = torch.autograd.grad(logits, [maps, x], a["agg_cotangent"])
        torch.testing.assert_close(grads, (a["grad_crm"], a["grad_x"]), rtol=1e-4, atol=1e-6)

    def test_exact_gradient_is_the_derivative(self):
        x = torch.rand(2, 2, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        assert torch.autograd.gradcheck(lambda m: peak_stimulation(m)[0], x)
        (exact,) = torch.autograd.grad(peak_stimulation(x)[0].sum(), x)
        logits, peaks, counts = peak_stimulation(x, exact_grad=False)
        (official,) = torch.autograd.grad(logits.sum(), x)
        assert counts.min() > 1
        torch.testing.assert_close(official, exact * counts[:, :, None, None])
        on = torch.zeros_like(x, dtype=torch.bool)
        on[tuple(peaks.T)] = True
        assert torch.equal(exact != 0, on)

    def test_logit_lies_between_the_extremes_moves_with_the_map_and_is_the_maximum_for_max(self):
        maps = torch.randn(2, 3, 8, 9, generator=torch.Generator().manual_seed(1))
        logits = peak_stimulation(maps)[0]
        assert ((logits >= maps.amin((2, 3))) & (logits <= maps.amax((2, 3)))).all()
        torch.testing.assert_close(peak_stimulation(maps + 2)[0], logits + 2)
        torch.testing.assert_close(peak_stimulation(3 * maps)[0], 3 * logits)
        torch.testing.assert_close(peak_stimulation(maps[:, [2, 0, 1]])[0], logits[:, [2, 0, 1]])
        torch.testing.assert_close(peak_stimulation(maps[1:])[0], logits[1:])
        torch.testing.assert_close(peak_stimulation(maps, threshold="max")[0], maps.amax((2, 3)))

    def test_threshold_above_the_maximum_gives_the_maximum_and_its_gradient(self):
        maps = torch.tensor([[[[1.0, 3.0], [2.0, 0.0]], [[9.0, 1.0], [1.0, 1.0]]]]).requires_grad_()
        logits, peaks, counts = peak_stimulation(maps, threshold=5.0)
        assert logits.tolist() == [[3.0, 9.0]]
        assert peaks.tolist() == [[0, 1, 0, 0]]
        assert counts.tolist() == [[0, 1]]
        (grad,) = torch.autograd.grad(logits.sum(), maps)
        assert grad.tolist() == [[[[0, 1], [0, 0]], [[1, 0], [0, 0]]]]

    def test_map_of_nan_gives_nan_and_an_empty_batch_none(self):
        assert peak_stimulation(torch.full((1, 1, 3, 3), torch.nan))[0].isnan().all()
        assert peak_stimulation(torch.ones(1, 1, 1, 1))[0].tolist() == [[1.0]]
        assert peak_stimulation(torch.ones(0, 2, 3, 3))[0].shape == (0, 2)
        with pytest.raises(ValueError, match=r"^peak_stimulation: expected maps with .* got \(1, 2, 0, 3\)"):
            peak_stimulation(torch.ones(1, 2, 0, 3))


class TestConvTopdown:
    @pytest.mark.parametrize(
        ("stride", "padding", "dilation", "groups", "kernel"),
        [(1, 1, 1, 1, 3), (2, 1, 1, 1, 3), (3, 2, 1, 2, 5), (1, 2, 2, 1, 3), (2, 0, 1, 4, 2), (1, "same", 1, 1, 2)],
    )
    def test_keeps_the_mass_and_is_linear(self, stride, padding, dilation, groups, kernel):
        torch.manual_seed(0)
        conv = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups, dtype=torch.float64)
        x = torch.rand(2, 4, 11, 10, dtype=torch.float64).requires_grad_()
        with TopDown():
            y = conv(x)
        torch.testing.assert_close(y, conv(x))
        p = torch.rand_like(y)
        mass = torch.autograd.grad(y, x, p, retain_graph=True)[0]
        assert mass.min() >= 0
        torch.testing.assert_close(mass.sum(), p.sum())
        torch.testing.assert_close(torch.autograd.grad(y, x, 3 * p)[0], 3 * mass)

    def test_one_pixel_by_hand(self):
        u, w = torch.tensor([2.0, 1.0, 0.0]), torch.tensor([1.0, -5.0, 4.0])
        positive = w.clamp(min=0)
        args = u[None, :, None, None], positive[None, :, None, None], torch.tensor([[[[2.0]]]])
        mass = conv_topdown(*args, torch.tensor([[[[3.0]]]]), (1, 1), (0, 0), (1, 1))
        assert mass.flatten().tolist() == [3.0, 0.0, 0.0]  # 3 u w+ / (u . w+)

    def test_scaling_weights_or_activations_changes_nothing(self):
        g = torch.Generator().manual_seed(0)
        u, w = torch.rand(1, 3, 6, 6, generator=g), torch.rand(2, 3, 3, 3, generator=g)
        p = torch.rand(1, 2, 4, 4, generator=g)

        def mass(u, w):
            return conv_topdown(u, w, F.conv2d(u, w), p, (1, 1), (0, 0), (1, 1))

        torch.testing.assert_close(mass(7 * u, w), mass(u, w))
        torch.testing.assert_close(mass(u, 0.1 * w), mass(u, w))

    def test_layer_without_positive_weights_passes_no_mass(self):
        conv = nn.Conv2d(3, 2, 3)
        conv.weight.data.abs_().neg_()
        raw = peak_backprop(conv, torch.rand(3, 6, 5), torch.tensor([[0, 1, 1]]))
        assert raw.abs().max() == 0
        assert peak_response_maps(raw).abs().max() == 0


class TestPeakBackprop:
    def test_equals_the_authors_maps(self, plain):
        network, a = plain
        raw = peak_backprop(network, a["x"][0], a["valid_peak_list"][:, 1:])
        torch.testing.assert_close(raw[:1], a["raw_backprop_first_peak"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(raw.sum((1, 2, 3)), torch.ones(len(raw)))
        maps = peak_response_maps(raw)
        torch.testing.assert_close(maps, a["prm"], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(maps.sum((1, 2)), torch.ones(len(raw)))

    def test_stays_in_the_receptive_field(self, plain):
        network, a = plain
        peak = torch.tensor([[1, 5, 4]])
        reach = torch.zeros(24, 20)
        reach[2 * 5 - 3 : 2 * 5 + 5, 2 * 4 - 3 : 2 * 4 + 5] = 1
        response = peak_response_maps(peak_backprop(network, a["x"][0], peak))[0]
        assert response[reach == 0].abs().max() == 0

    @pytest.mark.parametrize("conserve", [False, True])
    @pytest.mark.parametrize("how", ["+", "+=", "add"])
    def test_all_peaks_at_once_equal_a_loop_over_peaks_and_leave_the_network_alone(self, how, conserve):
        network, image = residual(how), torch.randn(3, 16, 14, generator=torch.Generator().manual_seed(2))
        peaks = torch.tensor([[0, 1, 2], [1, 3, 3], [2, 0, 0], [2, 7, 6], [0, 4, 4]])
        before = network(image[None])
        once = peak_backprop(network, image, peaks, conserve=conserve, chunk=3)
        loop = torch.cat([peak_backprop(network, image, peak[None], conserve=conserve) for peak in peaks])
        torch.testing.assert_close(once, loop)
        assert torch.equal(network(image[None]), before)
        assert all(p.grad is None for p in network.parameters())
        assert not once.requires_grad

    @pytest.mark.parametrize("how", ["+", "+=", "add"])
    def test_without_conserving_batch_norm_scales_and_sums_copy_as_plain_gradients_do(self, how):
        block = Residual(how).eval()
        with torch.no_grad():
            for conv in (block.first, block.second):  # the identity
                conv.weight.zero_()
                conv.weight[range(6), range(6), 1, 1] = 1
            block.norms[0].weight.fill_(0.5)
            block.norms[1].weight.fill_(0.2)
        x = torch.rand(6, 4, 4) + 0.1
        raw = peak_backprop(block, x, torch.tensor([[2, 1, 1]]))
        # U - min(U) is what the first convolution shares out, and it has one input here: all of the mass.
        expected = torch.zeros(6, 4, 4)
        expected[2, 1, 1] = 1 + 0.5 * 0.2 / (1 + 1e-5)
        torch.testing.assert_close(raw[0], expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("how", ["+", "+=", "add"])
    def test_conserving_keeps_the_mass_through_batch_norm_and_sums(self, how):
        network, image = residual(how), torch.randn(3, 16, 14, generator=torch.Generator().manual_seed(2))
        network[4].weight.data.abs_()  # else a peak may have no input to hand its mass to
        peaks = torch.tensor([[0, 1, 2], [1, 3, 3], [2, 7, 6]])
        mass = peak_backprop(network, image, peaks, conserve=True)
        assert mass.min() >= 0
        torch.testing.assert_close(mass.sum((1, 2, 3)), torch.ones(3))

    def test_works_in_inference_mode(self, plain):
        network, a = plain
        with torch.inference_mode():
            raw = peak_backprop(network, a["x"][0] + 0, a["valid_peak_list"][:2, 1:])
        torch.testing.assert_close(peak_response_maps(raw), a["prm"][:2], rtol=1e-4, atol=1e-6)

    def test_mirror_image_gives_mirrored_maps(self, plain):
        network, a = plain
        mirrored = nn.Sequential(network[0], network[1], network[3], network[4], network[5])
        for layer in (mirrored[0], mirrored[2]):
            layer.weight.data = (layer.weight.data + layer.weight.data.flip(-1)) / 2
        image = a["x"][0]
        response = peak_response_maps(peak_backprop(mirrored, image, torch.tensor([[1, 5, 4]])))
        flipped = peak_response_maps(peak_backprop(mirrored, image.flip(-1), torch.tensor([[1, 5, 15]])))
        torch.testing.assert_close(flipped, response.flip(-1))

    def test_no_peaks_give_no_maps(self, plain):
        network, a = plain
        raw = peak_backprop(network, a["x"][0], torch.zeros(0, 3, dtype=torch.int64))
        assert raw.shape == (0, 3, 24, 20)
        assert peak_response_maps(raw).shape == (0, 24, 20)

    def test_exceptions(self, plain):
        network, a = plain
        with pytest.raises(ValueError, match=r"^peak_backprop: expected image \(K, H, W\) .* got \(1, 3, 24, 20\)"):
            peak_backprop(network, a["x"], torch.zeros(1, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match="expected chunk >= 1, got 0"):
            peak_backprop(network, a["x"][0], torch.zeros(1, 3, dtype=torch.int64), chunk=0)
        with pytest.raises(ValueError, match=r"expected maps \(1, C, h, w\) of the network, got \(1, 1440\)"):
            peak_backprop(nn.Flatten(), a["x"][0], torch.zeros(1, 3, dtype=torch.int64))
