"""Class activation maps: normalisation, background, and the fusion of several views of one image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastcam.ops.cam_fuse import cam_fuse


class FusedCams(NamedTuple):
    """The maps of a batch of images at full size.

    ``maps`` ``(B, C, H, W)``: one map a class in [0, 1], 0 for absent classes. ``background`` ``(B, H, W)``, or
    ``None`` where the method leaves the background to a threshold; a pixel is background where ``background`` is at
    least the largest map.
    """

    maps: Tensor
    background: Tensor | None = None


def max_normalize(maps: Tensor, eps: float = 1e-5) -> Tensor:
    """Divides every map of ``(..., H, W)`` by its maximum plus ``eps``: a zero map stays zero."""
    return maps / (maps.amax(dim=(-2, -1), keepdim=True) + eps)


def background_channel(maps: Tensor) -> Tensor:
    """``1 - max_k``: the background ``(B, 1, H, W)`` of normalised maps ``(B, C, H, W)``."""
    return 1 - maps.amax(dim=1, keepdim=True)


def fuse_views(
    cams: Callable[[Tensor, Tensor | None], Tensor],
    views: Sequence[Tensor],
    size: tuple[int, int],
    tags: Tensor | None = None,
    *,
    activation: Literal["relu"] | None = "relu",
    reduce: Literal["sum", "mean", "max"] = "sum",
    normalize: Literal["max", "minmax"] | None = "max",
    align_corners: bool = False,
    multiple: int = 1,
) -> FusedCams:
    """Maps of every view and of its mirror image, fused at the size of the image.

    The defaults are IRN's ``make_cam`` with ``multiple=16``: its maps are resized to the image's size rounded up to a
    multiple of the output stride, because a map covers whole cells, then cut to the image.

    Args:
        cams: ``(images (B, 3, h, w), tags) -> (B, C, h', w')``, the maps of one view.
        views: the images at one scale each, ``(B, 3, h_s, w_s)``.
        size: ``(H, W)`` of the result.
        tags: ``(B, C)``; absent classes give 0. ``None``: every class counts as present.
        activation, reduce, normalize, align_corners: as :func:`fastcam.ops.cam_fuse.cam_fuse`.
        multiple: resize to multiples of this and cut.

    Returns:
        ``FusedCams`` without background.
    """
    if not views:
        raise ValueError("fuse_views: expected at least one view, got none")
    maps: list[Tensor] = []
    twice = None if tags is None else torch.cat([tags, tags])
    for view in views:
        maps += cams(torch.cat([view, view.flip(-1)]), twice).chunk(2)
    height, width = size
    fused = cam_fuse(
        maps,
        size,
        grid=(-(-height // multiple) * multiple, -(-width // multiple) * multiple),
        flips=[False, True] * len(views),
        present=None if tags is None else tags > 0,
        activation=activation,
        reduce=reduce,
        normalize=normalize,
        align_corners=align_corners,
    )
    return FusedCams(fused)
