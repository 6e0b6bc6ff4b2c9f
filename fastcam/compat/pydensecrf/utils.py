"""Energies and features for ``densecrf``, as ``pydensecrf.utils`` defines them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from fastcam.compat.pydensecrf._arguments import Floats, count, numbers, sigmas


def unary_from_labels(labels: ArrayLike, n_labels: int, gt_prob: float, zero_unsure: bool = True) -> Floats:
    """Energies of a label map that is right with probability ``gt_prob``; the other labels share the rest.

    Args:
        labels: integers of any shape with N elements.
        n_labels: M, at least 2; without the 0 of ``zero_unsure``.
        gt_prob: in (0, 1).
        zero_unsure: 0 means unknown (the same energy for all labels), and ``v > 0`` is row ``v - 1`` of the result.
            Otherwise ``v`` is row ``v``.

    Returns:
        float32 :math:`(M, N)`.

    Raises:
        ValueError: a number out of range, or a label without a row.
        TypeError: labels that are not integers.
    """
    where = "unary_from_labels"
    M = count(where, "n_labels", n_labels, 2)
    _check_probability(where, "gt_prob", gt_prob, gt_prob < 1)
    given = numbers(where, "labels", labels)
    if given.dtype.kind == "f":
        raise TypeError(f"{where}: expected labels of integers, got {given.dtype}")
    row = given.ravel().astype(np.int64) - bool(zero_unsure)
    unknown = row == -1 if zero_unsure else np.zeros(row.shape, bool)
    if ((row < 0) & ~unknown).any() or (row >= M).any():
        raise ValueError(
            f"{where}: expected labels in [0, {M if zero_unsure else M - 1}], got {given.min()} to {given.max()}"
        )
    energy = np.full((M, len(row)), -np.log((1 - gt_prob) / (M - 1)), np.float32)
    energy[row, np.arange(len(row))] = -np.log(gt_prob)
    energy[:, unknown] = np.log(M)
    return energy


def unary_from_softmax(sm: ArrayLike, scale: float | None = None, clip: float | None = 1e-5) -> Floats:
    """Energies ``-log(p)`` of scores.

    Args:
        sm: scores :math:`(M, ...)`. They need not sum to 1, since inference normalises.
        scale: confidence in the scores, in (0, 1]: they are mixed with a uniform distribution, ``scale * sm +
            (1 - scale) / M``.
        clip: smallest score; those above 1 count as 1. ``None``: scores as they are, and 0 gives ``inf``.

    Returns:
        float32 :math:`(M, N)`, N the product of the other axes.

    Raises:
        ValueError: NaN; without ``clip`` a negative score; a number out of range; no axis of labels.
        TypeError: not numbers.
    """
    where = "unary_from_softmax"
    given = numbers(where, "sm", sm)
    p = given.astype(np.promote_types(given.dtype, np.float32), copy=False)
    if p.ndim == 0 or len(p) == 0:
        raise ValueError(f"{where}: expected sm (M, ...) with M > 0, got shape {p.shape}")
    p = p.reshape(len(p), -1)
    if scale is not None:
        _check_probability(where, "scale", scale, scale <= 1)
        p = scale * p + (1 - scale) / len(p)
    if clip is not None:
        _check_probability(where, "clip", clip, clip < 1)
        p = np.clip(p, clip, 1)
    if not (p >= 0).all():
        raise ValueError(f"{where}: expected sm without NaN" + ("" if clip is not None else " and of at least 0"))
    with np.errstate(divide="ignore"):
        return -np.log(p).astype(np.float32)


def create_pairwise_gaussian(sdims: float | Sequence[float], shape: Sequence[int]) -> Floats:
    """Features of a Gaussian on coordinates, for ``addPairwiseEnergy``.

    The first axis comes first: for an image y, while ``addPairwiseGaussian`` begins with x. The model is the same, its
    lattice is not.

    Args:
        sdims: standard deviation along each axis, or one for all.
        shape: of the grid, d numbers.

    Returns:
        float32 :math:`(d, N)`, N the number of points.

    Raises:
        ValueError: a number out of range, or not as many as axes.
        TypeError: not numbers.
    """
    where = "create_pairwise_gaussian"
    sizes = [count(where, "shape", n, 1) for n in shape]
    return _coordinates(sizes, sigmas(where, "sdims", sdims, len(sizes)))


def create_pairwise_bilateral(
    sdims: float | Sequence[float], schan: float | Sequence[float], img: ArrayLike, chdim: int = -1
) -> Floats:
    """Features of a Gaussian on coordinates and values, for ``addPairwiseEnergy``.

    Coordinates are in the order of :func:`create_pairwise_gaussian`.

    Args:
        sdims: standard deviation along each axis of the grid, or one for all.
        schan: standard deviation of each channel, or one for all.
        img: values on the grid, with an axis of channels if ``chdim`` names one.
        chdim: which axis of ``img`` holds channels; -1 for none.

    Returns:
        float32 :math:`(d + c, N)`: d coordinates, c channels.

    Raises:
        ValueError: a number out of range, not as many as axes or channels, or no such axis.
        TypeError: not numbers.
    """
    where = "create_pairwise_bilateral"
    values = numbers(where, "img", img)
    if chdim != -1 and not -values.ndim <= chdim < values.ndim:
        raise ValueError(f"{where}: expected chdim an axis of img {values.shape} or -1 for none, got {chdim}")
    channels = values[None] if chdim == -1 else np.moveaxis(values, chdim, 0)
    planes = channels.astype(np.float32).reshape(len(channels), -1)
    planes /= np.array(sigmas(where, "schan", schan, len(channels)), np.float32)[:, None]
    coordinates = _coordinates(channels.shape[1:], sigmas(where, "sdims", sdims, channels.ndim - 1))
    return np.concatenate([coordinates, planes])


def compute_unary(labels: ArrayLike, M: int, GT_PROB: float = 0.5) -> Floats:
    """Old name of :func:`unary_from_labels`."""
    warnings.warn("compute_unary is deprecated, use unary_from_labels", DeprecationWarning, stacklevel=2)
    return unary_from_labels(labels, M, GT_PROB)


def softmax_to_unary(sm: ArrayLike, GT_PROB: float = 1) -> Floats:
    """Old name of :func:`unary_from_softmax`, with ``GT_PROB`` for ``scale`` and without ``clip``."""
    warnings.warn("softmax_to_unary is deprecated, use unary_from_softmax", DeprecationWarning, stacklevel=2)
    return unary_from_softmax(sm, None if GT_PROB == 1 else GT_PROB, clip=None)


def _check_probability(where: str, name: str, given: float, below: bool) -> None:
    if not (given > 0 and below):
        raise ValueError(f"{where}: expected {name} in (0, 1{']' if name == 'scale' else ')'}, got {given}")


def _coordinates(shape: Sequence[int], sigma: Sequence[float]) -> Floats:
    """Coordinates of a grid's points over their standard deviations: :math:`(d, N)`."""
    grid = np.indices(shape, dtype=np.float32).reshape(len(shape), -1)
    return grid / np.array(sigma, np.float32)[:, None]
