"""Losses of segmentation networks: cross-entropy, its hardest pixels (OHEM), and the locally adaptive loss (LAL)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.ops.window_reduce import window_reduce

IGNORE = 255


@dataclass(frozen=True)
class LossConfig:
    """What a segmenter is trained with; its configuration inherits these fields.

    Attributes:
        loss: ``"ce"``, cross-entropy; ``"ohem"``, that of the pixels the network is least sure of; ``"lal"``, the
            locally adaptive loss.
        class_weights: of the losses of pixels, background first; empty for none.
        label_smoothing: of ``"ce"``.
        ohem_threshold: ``"ohem"`` keeps pixels whose true label is less probable,
        ohem_min_kept: or so many more of a batch.
        lal_window: side of the window, odd.
        lal_power: of the mean of the windows' losses; 1 is the plain mean, infinity the worst window.
        lal_sigma: of the windows' Gaussian, or ``None``; see :func:`fastcam.window_reduce`.
        lal_normalize: ``"count"`` or ``"weight"``, what a window's sum is divided by.
        lal_stride: a window at every so many pixels.
        lal_at: windows on the network's ``"scores"`` with masks made as small, or on scores resized to the ``"image"``.
    """

    loss: Literal["ce", "ohem", "lal"] = "ce"
    class_weights: tuple[float, ...] = ()
    label_smoothing: float = 0.0
    ohem_threshold: float = 0.7
    ohem_min_kept: int = 100_000
    lal_window: int = 5
    lal_power: float = 5.0
    lal_sigma: float | None = None
    lal_normalize: Literal["count", "weight"] = "count"
    lal_stride: int = 1
    lal_at: Literal["scores", "image"] = "scores"


def check_loss(method: str, config: LossConfig, num_labels: int) -> None:
    """Refuses settings that do not fit together.

    Raises:
        FastcamError: the first of them, after the name of the method.
    """
    if config.loss not in ("ce", "ohem", "lal"):
        raise FastcamError(f"{method}: loss is {config.loss!r}, expected ce, ohem or lal")
    if config.class_weights and len(config.class_weights) != num_labels:
        raise FastcamError(
            f"{method}: class_weights has {len(config.class_weights)} numbers, expected {num_labels}: "
            "the background's, then one a class"
        )
    if config.label_smoothing and config.loss != "ce":
        raise FastcamError(f"{method}: label_smoothing is for loss ce, got loss {config.loss}; set one of them")
    if config.ohem_min_kept < 0:
        raise FastcamError(f"{method}: ohem_min_kept is {config.ohem_min_kept}, expected at least 0")
    if config.lal_window < 1 or config.lal_window % 2 == 0:
        raise FastcamError(f"{method}: lal_window is {config.lal_window}, expected an odd number")
    if not config.lal_power >= 1:
        raise FastcamError(f"{method}: lal_power is {config.lal_power}, expected at least 1")
    if config.lal_sigma is not None and not config.lal_sigma > 0:
        raise FastcamError(f"{method}: lal_sigma is {config.lal_sigma}, expected more than 0")
    if config.lal_normalize not in ("count", "weight"):
        raise FastcamError(f"{method}: lal_normalize is {config.lal_normalize!r}, expected count or weight")
    if config.lal_stride < 1:
        raise FastcamError(f"{method}: lal_stride is {config.lal_stride}, expected at least 1")
    if config.lal_at not in ("scores", "image"):
        raise FastcamError(f"{method}: lal_at is {config.lal_at!r}, expected scores or image")


def segmentation_loss(
    scores: Tensor, mask: Tensor, config: LossConfig, class_weights: Tensor, *, align_corners: bool
) -> dict[str, Tensor]:
    """The loss of a segmenter's scores, and what tells how it goes.

    Args:
        scores: of the labels, ``(B, K, h, w)``, at the resolution the network gives.
        mask: int64 ``(B, H, W)``: 0 to K - 1, 255 where nothing is known.
        config: which loss.
        class_weights: ``(K,)``.
        align_corners: how scores are resized to the mask.

    Returns:
        ``"loss"``; ``"accuracy"``, the fraction of known pixels that are right; and beside other losses
        ``"cross_entropy"``, without a gradient, by which runs compare. All are 0 where no pixel is known.
    """
    scores = scores.float()
    logits = resize(scores, mask.shape[-2:], align_corners)
    known = mask != IGNORE
    right = (logits.detach().argmax(dim=1) == mask) & known
    scalars = {"accuracy": right.sum() / known.sum().clamp(min=1)}
    if config.loss == "ce":
        return {"loss": cross_entropy(logits, mask, class_weights, config.label_smoothing), **scalars}
    scalars["cross_entropy"] = cross_entropy(logits.detach(), mask, class_weights)
    if config.loss == "ohem":
        loss = ohem_cross_entropy(logits, mask, class_weights, config.ohem_threshold, config.ohem_min_kept)
        return {"loss": loss, **scalars}
    if config.lal_at == "scores":
        logits, mask = scores, resize_labels(mask, scores.shape[-2:], align_corners)
    loss = locally_adaptive_loss(
        logits,
        mask,
        class_weights,
        window=config.lal_window,
        sigma=config.lal_sigma,
        power=config.lal_power,
        normalize=config.lal_normalize,
        stride=config.lal_stride,
    )
    return {"loss": loss, **scalars}


def resize(scores: Tensor, size: tuple[int, ...] | torch.Size, align_corners: bool) -> Tensor:
    """Scores ``(B, K, h, w)`` brought to another size ``(H, W)``, bilinear."""
    if scores.shape[-2:] == tuple(size):
        return scores
    return F.interpolate(scores, tuple(size), mode="bilinear", align_corners=align_corners)


def resize_labels(mask: Tensor, size: tuple[int, ...] | torch.Size, align_corners: bool) -> Tensor:
    """Of a mask ``(B, H, W)``, the labels nearest to where scores of another size lie: ``(B, h, w)``.

    With ``align_corners`` 321 pixels and 41 scores give every eighth pixel, ``mask[:, ::8, ::8]``; without, the middle
    of each cell.
    """
    rows, columns = (_nearest(n, m, align_corners, mask.device) for n, m in zip(mask.shape[-2:], size, strict=True))
    return mask[:, rows][:, :, columns]


def _nearest(length: int, count: int, align_corners: bool, device: torch.device) -> Tensor:
    i = torch.arange(count, device=device)
    if align_corners:
        return (2 * i * (length - 1) + count - 1).div(2 * max(count - 1, 1), rounding_mode="floor")
    return ((2 * i + 1) * length).div(2 * count, rounding_mode="floor")


def cross_entropy(logits: Tensor, mask: Tensor, class_weights: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the pixels that are not 255, by weights; 0 where there are none (torch: NaN).

    Args:
        logits: ``(B, K, H, W)``.
        mask: int64 ``(B, H, W)``.
        class_weights: ``(K,)``; the sum is divided by the weights of the pixels' labels.
        label_smoothing: as in torch.
    """
    total = F.cross_entropy(
        logits, mask, class_weights, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing
    )
    return total / class_weights[mask[mask != IGNORE]].sum().clamp(min=1e-6)


def ohem_cross_entropy(
    logits: Tensor, mask: Tensor, class_weights: Tensor, threshold: float = 0.7, min_kept: int = 100_000
) -> Tensor:
    """Cross-entropy of the pixels whose true label has a low probability (OCR's online hard example mining).

    The bound is the larger of ``threshold`` and the probability of rank ``min_kept``, counted from 0 and from the
    lowest; pixels strictly below count, and their weighted losses are divided by their number, as published.

    Args:
        logits: ``(B, K, H, W)``.
        mask: int64 ``(B, H, W)``; 255 does not count.
        class_weights: ``(K,)``.
        threshold: a probability.
        min_kept: number of pixels of the batch.

    Returns:
        The mean; 0 where no pixel counts.
    """
    losses = F.cross_entropy(logits, mask, ignore_index=IGNORE, reduction="none")
    known = mask != IGNORE
    losses, labels = losses[known], mask[known]
    if len(losses) == 0:
        return logits[known[:, None].expand_as(logits)].sum()
    p = losses.detach().neg().exp()
    bound = p.kthvalue(min(min_kept, len(p) - 1) + 1).values.clamp(min=threshold)
    hard = p < bound
    return (losses * class_weights[labels] * hard).sum() / hard.sum().clamp(min=1)


def locally_adaptive_loss(
    logits: Tensor,
    mask: Tensor,
    class_weights: Tensor | None = None,
    *,
    window: int = 5,
    sigma: float | None = None,
    power: float = 5.0,
    normalize: Literal["count", "weight"] = "count",
    stride: int = 1,
    ignore_index: int = IGNORE,
) -> Tensor:
    r"""Locally adaptive learning loss (Guo, Ren, Gu, Xu, Wu, arXiv 1802.08290), in the place of cross-entropy.

    Around every pixel p the scores of those neighbours that have its true label are averaged to :math:`f_p` (eq. 3,
    :func:`fastcam.window_reduce`); :math:`l_p` is the cross-entropy of that average (eq. 4), and the loss (eq. 5)

    .. math:: L = \Big( \frac{1}{M} \sum_p l_p^k \Big)^{1/k}

    over the M windows of the batch whose centre has a label. Values do not compare with those of cross-entropy: with
    ``"count"`` scores inside a label are scaled down. Several processes average their own L, which is not the L of all
    their windows.

    Args:
        logits: ``(B, K, h, w)``.
        mask: int64 ``(B, h, w)``: 0 to K - 1 or ``ignore_index``.
        class_weights: ``(K,)``; multiply :math:`l_p` before the power, M stays a count.
        window: side of the windows, odd; 1 with ``power=1`` is cross-entropy.
        sigma: of their Gaussian, in pixels of ``logits``; ``None`` for the default of :func:`fastcam.window_reduce`.
        power: k, at least 1; infinity for the largest :math:`l_p`.
        normalize: see :func:`fastcam.window_reduce`.
        stride: only pixels at multiples of it are centres.
        ignore_index: label of pixels without one.

    Returns:
        A number; 0 with a zero gradient where no pixel has a label or all :math:`l_p` are 0.

    Raises:
        ValueError: as :func:`fastcam.window_reduce`, or ``power`` below 1, or ``stride`` below 1.
    """
    if stride < 1:
        raise ValueError(f"locally_adaptive_loss: expected stride >= 1, got {stride}")
    pooled = window_reduce(logits, mask, window=window, sigma=sigma, normalize=normalize, ignore_index=ignore_index)
    pooled = pooled[:, :, ::stride, ::stride].to(torch.promote_types(pooled.dtype, torch.float32))
    centres = mask[:, ::stride, ::stride]
    known = centres != ignore_index
    losses = F.cross_entropy(pooled, centres, ignore_index=ignore_index, reduction="none")
    if class_weights is not None:
        losses = losses * class_weights[centres.where(known, 0)]
    return power_mean(losses, known, power)


def power_mean(values: Tensor, known: Tensor, power: float) -> Tensor:
    """Mean of power ``power`` of the values that are ``known``: at least their mean, at most their maximum.

    Its gradient in a value is ``(value / mean) ** (power - 1)`` of that of the plain mean. Values are divided by the
    largest first, so that powers neither overflow nor vanish.

    Args:
        values: not negative.
        known: bool, the same shape.
        power: at least 1, or infinity.

    Returns:
        A number; 0 with a zero gradient where nothing is known or all values are 0.

    Raises:
        ValueError: ``power`` below 1.
    """
    if not power >= 1:
        raise ValueError(f"power_mean: expected power >= 1, got {power}")
    values = values.where(known, 0)
    if values.numel() == 0:
        return values.sum()
    if math.isinf(power):
        return values.amax()
    largest = values.detach().amax()
    zero = largest == 0  # the root has no derivative there
    shares = (values / largest.where(~zero, 1)) ** power
    mean = shares.sum() / known.sum().clamp(min=1)
    return torch.where(zero, 0, largest * mean.where(~zero, 1) ** (1 / power))
