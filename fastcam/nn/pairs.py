"""Pairs of nearby pixels: what their labels say about them, and the losses that teach affinities (IRN, AffinityNet)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcam._paths import destinations

IGNORE = 255
EPS = 1e-5


class Pairs(NamedTuple):
    """Which pairs a loss may use, bool ``(B, P, H, W)`` each: pixel and offset as in ``path_affinity``.

    A pair counts where both ends are inside the map and both labels are known.
    """

    background: Tensor
    foreground: Tensor
    different: Tensor


def neighbours(x: Tensor, radius: int, fill: float) -> Tensor:
    """The value at the other end of every pair.

    Args:
        x: ``(B, H, W)``.
        radius: pairs are closer than this.
        fill: value outside the map.

    Returns:
        ``(B, P, H, W)``, P offsets in the order of ``destinations``.
    """
    reach = radius - 1
    height, width = x.shape[-2:]
    padded = F.pad(x, (reach, reach, 0, reach), value=fill)
    shifted = [padded[:, dy : dy + height, reach + dx : reach + dx + width] for dy, dx in destinations(radius)]
    return torch.stack(shifted, dim=1)


def label_pairs(labels: Tensor, radius: int) -> Pairs:
    """Pairs of equal and of different labels.

    Args:
        labels: integers ``(B, H, W)``: 0 background, class k + 1, 255 unknown.
        radius: pairs are closer than this.

    Returns:
        Pairs of the background, pairs of one class, and pairs of two different labels.
    """
    here, there = labels[:, None], neighbours(labels, radius, IGNORE)
    known = (here != IGNORE) & (there != IGNORE)
    same = known & (here == there)
    return Pairs(same & (here == 0), same & (here > 0), known & (here != there))


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x`` where ``mask`` is true; 0, not NaN, where it is nowhere."""
    return (x * mask).sum() / (mask.sum() + EPS)


def affinity_loss(affinity: Tensor, pairs: Pairs) -> Tensor:
    r"""Cross-entropy of the affinities of labelled pairs, each kind of pair with a weight of its own.

    .. math:: L = \tfrac14 L^+_{bg} + \tfrac14 L^+_{fg} + \tfrac12 L^-,\quad
              L^+ = -\log(a + \epsilon),\ L^- = -\log(1 + \epsilon - a),\ \epsilon = 10^{-5}

    (AffinityNet, CVPR 2018, eq. 5 and 6; IRN, CVPR 2019, eq. 5.) Each term is the mean over its pairs.

    Args:
        affinity: in [0, 1], ``(B, P, H, W)``.
        pairs: of the same shape.

    Returns:
        A scalar; 0 where no pair is labelled.
    """
    positive, negative = -(affinity + EPS).log(), -(1 + EPS - affinity).log()
    alike = masked_mean(positive, pairs.background) + masked_mean(positive, pairs.foreground)
    return alike / 4 + masked_mean(negative, pairs.different) / 2


def displacement_loss(displacement: Tensor, pairs: Pairs, radius: int) -> tuple[Tensor, Tensor]:
    r"""Losses of a displacement field: pixels of one object point to one place, pixels of the background nowhere.

    .. math:: L_{fg} = \operatorname{mean} |D_i - D_j - (x_j - x_i)|,\quad L_{bg} = \operatorname{mean} |D_i - D_j|

    (IRN, eq. 7 and 8.)

    Args:
        displacement: rows and columns from a pixel to its object's centre, ``(B, 2, H, W)``.
        pairs: ``(B, P, H, W)``; different labels say nothing here.
        radius: of the pairs.

    Returns:
        Foreground and background loss, scalars.
    """
    offsets = torch.tensor(destinations(radius), device=displacement.device, dtype=displacement.dtype)
    foreground = background = displacement.new_zeros(())
    for axis in range(2):
        here = displacement[:, axis]
        delta = here[:, None] - neighbours(here, radius, 0)
        foreground = foreground + masked_mean((delta - offsets[:, axis, None, None]).abs(), pairs.foreground) / 2
        background = background + masked_mean(delta.abs(), pairs.background) / 2
    return foreground, background


def labels_at(labels: Tensor, size: Sequence[int]) -> Tensor:
    """Labels ``(B, H, W)`` at the centres of the cells of a coarser map of ``size``."""
    return F.interpolate(labels[:, None].float(), tuple(size), mode="nearest-exact")[:, 0].long()
