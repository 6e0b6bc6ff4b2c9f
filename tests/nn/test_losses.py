"""Losses of segmenters against torch, sorting, finite differences and windows by hand."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.nn import LossConfig, locally_adaptive_loss, ohem_cross_entropy, power_mean
from fastcam.nn.losses import check_loss, cross_entropy, resize_labels, segmentation_loss

K = 4


def problem(B=2, H=9, W=11, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(B, K, H, W, generator=g, dtype=dtype)
    mask = torch.randint(K, (B, -(-H // 3), -(-W // 3)), generator=g)
    mask = mask.repeat_interleave(3, 1).repeat_interleave(3, 2)[:, :H, :W].contiguous()
    mask[torch.rand(mask.shape, generator=g) < 0.15] = 255
    return logits, mask


def lal_by_hand(logits, mask, window, sigma, power, normalize, weights=None):
    """Section by section as the paper has it: choose, weigh, average, cross-entropy, power mean."""
    x, y, losses = logits.numpy(), mask.numpy(), []
    reach = window // 2
    for b, i, j in zip(*np.nonzero(y != 255), strict=True):
        total, count, weight = np.zeros(K), 0, 0.0
        for p in range(max(0, i - reach), min(y.shape[1], i + reach + 1)):
            for q in range(max(0, j - reach), min(y.shape[2], j + reach + 1)):
                if y[b, p, q] == y[b, i, j]:
                    w = math.exp(-(max(abs(p - i), abs(q - j)) ** 2) / (2 * sigma**2))
                    total, count, weight = total + w * x[b, :, p, q], count + 1, weight + w
        f = total / (count if normalize == "count" else weight)
        loss = math.log(np.exp(f).sum()) - f[y[b, i, j]]
        losses.append(loss * (1 if weights is None else float(weights[y[b, i, j]])))
    return np.mean(np.array(losses) ** power) ** (1 / power)


@pytest.mark.parametrize("normalize", ["count", "weight"])
@pytest.mark.parametrize(
    ("window", "sigma", "power"), [(1, 1.0, 1), (3, 0.5, 5), (5, 1.0, 2), (7, 1.5, 5), (5, math.inf, 1)]
)
def test_lal_equals_every_window_by_hand(window, sigma, power, normalize):
    logits, mask = problem()
    expected = lal_by_hand(logits, mask, window, sigma, power, normalize)
    options = {"window": window, "sigma": sigma, "power": power, "normalize": normalize}
    assert float(locally_adaptive_loss(logits, mask, **options)) == pytest.approx(expected, rel=1e-10)
    assert float(locally_adaptive_loss(logits.float(), mask, **options)) == pytest.approx(expected, rel=1e-5)


def test_lal_weighs_window_losses_before_the_power():
    logits, mask = problem()
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    expected = lal_by_hand(logits, mask, 3, 0.5, 5, "count", weights)
    assert float(locally_adaptive_loss(logits, mask, weights, window=3)) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("normalize", ["count", "weight"])
def test_lal_of_one_pixel_and_power_one_is_cross_entropy_with_its_gradient(normalize):
    logits, mask = problem()
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss = locally_adaptive_loss(a, mask, window=1, power=1, normalize=normalize)
    expected = F.cross_entropy(b, mask, ignore_index=255)
    loss.backward(), expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(a.grad, b.grad)


def test_lal_gradient_agrees_with_finite_differences():
    logits, mask = problem(B=1, H=4, W=5)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: locally_adaptive_loss(x, mask, window=3), logits)


def test_lal_gradient_is_zero_over_classes_and_at_unlabelled_pixels():
    logits, mask = problem()
    logits.requires_grad_()
    (grad,) = torch.autograd.grad(locally_adaptive_loss(logits, mask), logits)
    torch.testing.assert_close(grad.sum(1), torch.zeros_like(grad[:, 0]), atol=1e-12, rtol=0)
    assert not grad.movedim(1, -1)[mask == 255].any()
    assert grad.movedim(1, -1)[mask != 255].any()


def test_lal_does_not_see_an_offset_of_all_logits_nor_the_order_of_classes():
    logits, mask = problem()
    loss = locally_adaptive_loss(logits, mask)
    torch.testing.assert_close(locally_adaptive_loss(logits + torch.randn(2, 1, 9, 11), mask), loss)
    order = torch.tensor([2, 0, 3, 1])
    moved = torch.where(mask == 255, 255, order.argsort()[mask.clamp(max=K - 1)])
    torch.testing.assert_close(locally_adaptive_loss(logits[:, order], moved), loss)


def test_lal_by_weight_over_the_whole_image_is_the_loss_of_class_means():
    logits, mask = problem(B=1)
    actual = locally_adaptive_loss(logits, mask, window=23, sigma=math.inf, power=1, normalize="weight")
    means = torch.stack([logits[0][:, mask[0] == c].mean(1) for c in range(K)])
    torch.testing.assert_close(actual, F.cross_entropy(means[mask[mask != 255]], mask[mask != 255]))


def test_lal_with_a_stride_counts_centres_at_its_multiples_only():
    logits, mask = problem(B=1)
    blank = torch.full_like(mask, 255)
    blank[:, ::2, ::2] = mask[:, ::2, ::2]
    known = blank != 255
    from fastcam import window_reduce

    losses = F.cross_entropy(window_reduce(logits, mask), mask, ignore_index=255, reduction="none")
    expected = (losses[known] ** 5).mean() ** 0.2
    torch.testing.assert_close(locally_adaptive_loss(logits, mask, stride=2), expected)


@pytest.mark.parametrize("power", [1.0, 5.0, math.inf])
def test_lal_without_labels_or_without_losses_is_zero_with_zero_gradient(power):
    logits, mask = problem(dtype=torch.float32)
    for x, y in (
        (logits, torch.full_like(mask, 255)),
        (1e4 * F.one_hot(mask % K, K).movedim(-1, 1).float(), mask % K),
        (logits[:0], mask[:0]),
    ):
        x = x.clone().requires_grad_()
        loss = locally_adaptive_loss(x, y, power=power)
        loss.backward()
        assert loss == 0
        assert not x.grad.any()


def test_lal_of_a_nan_is_nan_rather_than_zero():
    logits, mask = problem()
    logits.movedim(1, -1)[mask != 255] = math.nan
    assert locally_adaptive_loss(logits, mask).isnan()


def test_power_mean_lies_between_mean_and_maximum_and_grows_with_the_power():
    values, known = torch.rand(50, dtype=torch.float64), torch.arange(50) < 40
    means = [float(power_mean(values, known, p)) for p in (1, 1.5, 2, 5, 16, 200, math.inf)]
    assert means == sorted(means)
    assert means[0] == pytest.approx(float(values[:40].mean()))
    assert means[-1] == float(values[:40].max())
    same = torch.full((3,), 0.7, dtype=torch.float64)
    for p in (1, 5, 100, math.inf):
        assert float(power_mean(same, torch.ones(3, dtype=torch.bool), p)) == pytest.approx(0.7)


def test_power_mean_gradient_is_concentrated_as_the_closed_form_says():
    values = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=torch.float64, requires_grad=True)
    known = torch.ones(4, dtype=torch.bool)
    mean = power_mean(values, known, 5)
    (grad,) = torch.autograd.grad(mean, values)
    torch.testing.assert_close(grad, (values / mean).detach() ** 4 / 4)
    assert grad[3] / grad[2] == pytest.approx(2**4)
    assert float((grad * values.detach()).sum()) == pytest.approx(float(mean.detach()))  # homogeneous of degree 1
    assert power_mean(torch.full((3,), 1e30), known[:3], 5).isfinite()


@pytest.mark.parametrize(("threshold", "min_kept"), [(0.3, 5), (0.3, 60), (0.0, 0), (0.9, 10_000)])
def test_ohem_keeps_what_sorting_keeps(threshold, min_kept):
    logits, mask = problem()
    weights = torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64)
    known = mask != 255
    p = logits.softmax(1).gather(1, mask.clamp(max=K - 1)[:, None])[:, 0][known]
    bound = max(float(p.sort().values[min(min_kept, len(p) - 1)]), threshold)
    losses = (weights[mask[known]] * -p.log())[p < bound]
    expected = losses.mean() if len(losses) else torch.tensor(0.0)
    actual = ohem_cross_entropy(logits, mask, weights, threshold, min_kept)
    torch.testing.assert_close(actual, expected.to(actual), rtol=1e-6, atol=1e-9)


def test_ohem_drops_the_surest_pixel_where_all_would_be_kept_as_published():
    logits = torch.tensor([[2.0, 1.0, 3.0], [0.0, 0.0, 0.0]], dtype=torch.float64).reshape(1, 2, 1, 3)
    loss = ohem_cross_entropy(logits, torch.zeros(1, 1, 3, dtype=torch.int64), torch.ones(2), 0.0, 100)
    expected = F.cross_entropy(logits[..., :2], torch.zeros(1, 1, 2, dtype=torch.int64))
    torch.testing.assert_close(loss, expected)


def test_losses_of_a_batch_without_labels_are_zero_with_zero_gradient():
    logits = torch.randn(2, K, 3, 3, requires_grad=True)
    mask, weights = torch.full((2, 3, 3), 255), torch.ones(K)
    for loss in (cross_entropy(logits, mask, weights), ohem_cross_entropy(logits, mask, weights)):
        (grad,) = torch.autograd.grad(loss, logits)
        assert loss == 0
        assert not grad.any()


def test_labels_are_taken_where_scores_lie():
    mask = torch.arange(321)[None, None].expand(1, 321, 321)
    torch.testing.assert_close(resize_labels(mask, (41, 41), True), mask[:, ::8, ::8])
    cells = torch.arange(16)[None, None].expand(1, 16, 16)
    assert resize_labels(cells, (4, 4), False)[0, 0].tolist() == [2, 6, 10, 14]
    torch.testing.assert_close(
        resize_labels(cells, (5, 7), False)[0],
        F.interpolate(cells[None].float(), (5, 7), mode="nearest-exact")[0, 0].long(),
    )
    assert resize_labels(cells, (1, 16), True)[0, 0].tolist() == list(range(16))


@pytest.mark.parametrize("align_corners", [True, False])
@pytest.mark.parametrize("at", ["scores", "image"])
def test_segmentation_loss_applies_lal_at_the_chosen_resolution(at, align_corners):
    scores, _ = problem(B=1, H=5, W=5, dtype=torch.float32)
    mask = torch.zeros(1, 17, 17, dtype=torch.int64)
    mask[:, :, 9:] = 1
    config = LossConfig(loss="lal", lal_at=at)
    scalars = segmentation_loss(scores, mask, config, torch.ones(K), align_corners=align_corners)
    large = F.interpolate(scores, (17, 17), mode="bilinear", align_corners=align_corners)
    expected = (
        locally_adaptive_loss(large, mask)
        if at == "image"
        else locally_adaptive_loss(scores, resize_labels(mask, (5, 5), align_corners))
    )
    torch.testing.assert_close(scalars["loss"], expected)
    torch.testing.assert_close(scalars["cross_entropy"], F.cross_entropy(large, mask))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"loss": "focal"}, "loss is 'focal', expected ce, ohem or lal"),
        ({"class_weights": (1.0,)}, "class_weights has 1 numbers, expected 4"),
        ({"loss": "lal", "label_smoothing": 0.1}, "label_smoothing is for loss ce, got loss lal"),
        ({"ohem_min_kept": -1}, "ohem_min_kept is -1"),
        ({"lal_window": 4}, "lal_window is 4, expected an odd number"),
        ({"lal_power": math.nan}, "lal_power is nan, expected at least 1"),
        ({"lal_sigma": 0.0}, "lal_sigma is 0.0, expected more than 0"),
        ({"lal_normalize": "sum"}, "lal_normalize is 'sum', expected count or weight"),
        ({"lal_stride": 0}, "lal_stride is 0, expected at least 1"),
        ({"lal_at": "input"}, "lal_at is 'input', expected scores or image"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(config, message):
    with pytest.raises(FastcamError, match=f"^ocr: {message}"):
        check_loss("ocr", LossConfig(**config), K)


def test_wrong_numbers_are_refused_by_the_functions_too():
    logits, mask = problem()
    with pytest.raises(ValueError, match="locally_adaptive_loss: expected stride >= 1, got 0"):
        locally_adaptive_loss(logits, mask, stride=0)
    with pytest.raises(ValueError, match=r"power_mean: expected power >= 1, got 0.5"):
        locally_adaptive_loss(logits, mask, power=0.5)
