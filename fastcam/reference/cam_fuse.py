"""Fusion of class activation maps of several views, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cam_fuse_fwd(
    cams: Sequence[Tensor], present: Tensor | None, flips: Sequence[bool], size: Sequence[int], grid: Sequence[int],
    activation: str | None, reduce: str, normalize: str | None, align_corners: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Views ``(B, C, h_s, w_s)`` -> fused ``(B, C, H, W)``; maxima and minima before normalisation ``(B, C, 2)``."""
    x, _ = _fuse(_resize(cams, flips, size, grid, activation, align_corners), activation, reduce)
    stats = x.new_zeros((*x.shape[:2], 2))
    y = x
    if normalize is not None:
        stats = torch.stack([x.amax((2, 3)), x.amin((2, 3))], dim=-1)
        y, _, _ = _normalize(x, stats, normalize, eps)
    if present is not None:
        y = torch.where(present[:, :, None, None], y, 0)
        stats = torch.where(present[:, :, None], stats, 0)
    return y.to(cams[0].dtype), stats


def cam_fuse_bwd(
    grad: Tensor, cams: Sequence[Tensor], stats: Tensor, present: Tensor | None, flips: Sequence[bool],
    size: Sequence[int], grid: Sequence[int], activation: str | None, reduce: str, normalize: str | None,
    align_corners: bool, eps: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the views. The fused maps are computed again; ``stats`` is what the forward returned.

    With y = (x - low) / d, d = max - low + eps (low = 0 for ``"max"``) and s = sum(g y): dx = g / d, minus s / d shared
    by the pixels that hold the maximum, plus (s - sum(g)) / d shared by those that hold the minimum for ``"minmax"``
    and ``"seam"``. The latter passes no g where it put 0.
    """
    views = _resize(cams, flips, size, grid, activation, align_corners)
    x, takes = _fuse(views, activation, reduce)
    g = grad.to(x.dtype)
    if normalize is not None:
        y, least, d = _normalize(x, stats, normalize, eps)
        highest, lowest = ((x == stats[..., i, None, None]).to(x.dtype) for i in (0, 1))
        s = (g * y).sum((2, 3), keepdim=True)
        dx = g if least is None else torch.where(x < least, 0, g)
        dx = dx - s * highest / highest.sum((2, 3), keepdim=True)
        if normalize != "max":
            dx = dx + (s - g.sum((2, 3), keepdim=True)) * lowest / lowest.sum((2, 3), keepdim=True)
        g = dx / d
    if present is not None:
        g = torch.where(present[:, :, None, None], g, 0)
    if activation == "fused_relu":
        g = torch.where(x <= 0, 0, g)
    if reduce == "mean":
        g = g / len(cams)

    grads = []
    for cam, flip, view, mine in zip(cams, flips, views, takes, strict=True):
        share = g if mine is None else torch.where(mine, g, 0)
        share = torch.where(view <= 0, 0, share) if activation == "resized_relu" else share
        share = F.pad(share, (0, grid[1] - size[1], 0, grid[0] - size[0]))
        shape = [share.shape[0] * share.shape[1], 1, *cam.shape[2:]]
        dx = torch.ops.aten.upsample_bilinear2d_backward(
            share.flatten(0, 1)[:, None], list(grid), shape, align_corners
        ).reshape(cam.shape)
        dx = dx.flip(-1) if flip else dx
        grads.append((torch.where(cam <= 0, 0, dx) if activation == "relu" else dx).to(cam.dtype))
    return grads


def _resize(
    cams: Sequence[Tensor], flips: Sequence[bool], size: Sequence[int], grid: Sequence[int], activation: str | None,
    align_corners: bool,
) -> list[Tensor]:  # fmt: skip
    views = []
    for cam, flip in zip(cams, flips, strict=True):
        x = cam.to(torch.promote_types(cam.dtype, torch.float32))
        x = x.relu() if activation == "relu" else x
        x = x.flip(-1) if flip else x
        # A channel at a time: interpolate takes no image, but not no channel.
        x = F.interpolate(x.flatten(0, 1)[:, None], tuple(grid), mode="bilinear", align_corners=align_corners)
        x = x.reshape(*cam.shape[:2], *grid)[..., : size[0], : size[1]]
        views.append(x.relu() if activation == "resized_relu" else x)
    return views


def _fuse(views: list[Tensor], activation: str | None, reduce: str) -> tuple[Tensor, list[Tensor] | list[None]]:
    """The fused maps; for maxima also where each view takes the gradient: the first among equals does."""
    takes: list[Tensor] | list[None] = [None] * len(views)
    if reduce == "max":
        x, winner = torch.stack(views).max(0)
        takes = [winner == i for i in range(len(views))]
    elif reduce == "pair_max":
        pairs = [torch.stack(pair).max(0) for pair in zip(views[::2], views[1::2], strict=True)]
        x = sum((pair.values for pair in pairs[1:]), start=pairs[0].values)
        takes = [pair.indices == i for pair in pairs for i in (0, 1)]
    else:
        x = sum(views[1:], start=views[0])
        x = x / len(views) if reduce == "mean" else x
    return (x.relu() if activation == "fused_relu" else x), takes


def _normalize(x: Tensor, stats: Tensor, normalize: str, eps: float) -> tuple[Tensor, Tensor | None, Tensor]:
    """Normalised maps, what counts as 0 below (``"seam"`` only), and the divisors."""
    highest, lowest = stats[..., 0, None, None], stats[..., 1, None, None]
    if normalize == "max":
        d = highest + eps
        return x / d, None, d
    d = highest - lowest + eps
    if normalize == "minmax":
        return (x - lowest) / d, None, d
    least = lowest + eps
    return (torch.where(x < least, 0, x) - least) / d, least, d
