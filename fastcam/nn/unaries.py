"""Energies for a CRF from scores and from labels."""

from __future__ import annotations

import torch
from torch import Tensor


def unary_from_softmax(p: Tensor, scale: float | None = None, clip: float = 1e-5) -> Tensor:
    """Energies :math:`-\\log(\\mathrm{clip}(p, clip, 1))` of scores, as pydensecrf defines them.

    Args:
        p: scores :math:`(B, K, H, W)`, or :math:`(K, ...)` when ``scale`` is ``None``. They need not sum to 1, since
            mean field renormalises; values above 1 count as 1.
        scale: confidence in the scores, in (0, 1]: they are mixed with a uniform distribution, ``scale * p + (1 -
            scale) / K``.
        clip: smallest score, in (0, 1).

    Returns:
        Energies of the shape of ``p``.

    Raises:
        ValueError: ``scale`` or ``clip`` out of range.
        TypeError: ``p`` is not floating.
    """
    if not p.is_floating_point():
        raise TypeError(f"unary_from_softmax: expected floating scores, got {p.dtype}")
    if not 0 < clip < 1:
        raise ValueError(f"unary_from_softmax: expected clip in (0, 1), got {clip}")
    if scale is not None:
        if not 0 < scale <= 1:
            raise ValueError(f"unary_from_softmax: expected scale in (0, 1], got {scale}")
        if p.ndim != 4:
            raise ValueError(f"unary_from_softmax: expected scores (B, K, H, W), got {tuple(p.shape)}")
        p = scale * p + (1 - scale) / p.shape[1]
    return -p.clamp(clip, 1).log()


def unary_from_labels(labels: Tensor, num_labels: int, gt_prob: float, zero_unsure: bool = True) -> Tensor:
    """Energies of a label map that is right with probability ``gt_prob``, as pydensecrf defines them.

    Args:
        labels: integers :math:`(B, H, W)`.
        num_labels: K, at least 2: the other labels share ``1 - gt_prob``.
        gt_prob: in (0, 1).
        zero_unsure: label 0 means unknown (the same energy for all), and label ``v > 0`` is row ``v - 1`` of the
            result. Otherwise label ``v`` is row ``v``: what weakly supervised systems use.

    Returns:
        float32 energies :math:`(B, K, H, W)`.

    Raises:
        ValueError: wrong shape, fewer than two labels, ``gt_prob`` out of range, or a label without a row.
        TypeError: ``labels`` is not integral.
    """
    if labels.ndim != 3:
        raise ValueError(f"unary_from_labels: expected labels (B, H, W), got {tuple(labels.shape)}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"unary_from_labels: expected integer labels, got {labels.dtype}")
    if num_labels < 2:
        raise ValueError(f"unary_from_labels: expected at least 2 labels, got {num_labels}")
    if not 0 < gt_prob < 1:
        raise ValueError(f"unary_from_labels: expected gt_prob in (0, 1), got {gt_prob}")
    row = labels.long() - int(zero_unsure)
    lowest = -int(zero_unsure)
    if labels.numel() and not (lowest <= int(row.min()) and int(row.max()) < num_labels):
        raise ValueError(
            f"unary_from_labels: expected labels in [0, {num_labels - 1 + zero_unsure}], "
            f"got {labels.min()} to {labels.max()}"
        )
    right = row[:, None] == torch.arange(num_labels, device=labels.device)[:, None, None]
    sure, other, unknown = (-torch.tensor([gt_prob, (1 - gt_prob) / (num_labels - 1), 1 / num_labels]).log()).tolist()
    energy = torch.full(right.shape, other, device=labels.device).masked_fill_(right, sure)
    return energy.masked_fill_((row < 0)[:, None], unknown)
