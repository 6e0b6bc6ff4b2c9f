"""Pixel correlation: maps spread along the similarity of features (the PCM of SEAM and SFC)."""

from __future__ import annotations

from torch import Tensor

from fastcam.ops.correlation_propagate import correlation_propagate


def pixel_correlation(maps: Tensor, features: Tensor, steps: int = 1, *, eps: float = 1e-5) -> Tensor:
    """:func:`fastcam.correlation_propagate`, which see, with maps in the precision of the features.

    Args:
        maps: ``(B, C, H, W)``.
        features: ``(B, D, H, W)``, unnormalised. A pixel whose feature is zero gives 0.
        steps: number of multiplications.
        eps: added to norms and sums.

    Returns:
        ``(B, C, H, W)`` in the dtype of ``features``.
    """
    return correlation_propagate(maps.to(features.dtype), features, steps=steps, eps=eps)
