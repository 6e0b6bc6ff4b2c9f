"""Fusion of class activation maps of several views, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cam_fuse_fwd(
    cams: Sequence[Tensor], present: Tensor | None, flips: Sequence[bool], size: Sequence[int], grid: Sequence[int],
    relu: bool, reduce: str, normalize: str | None, align_corners: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Views ``(B, C, h_s, w_s)`` -> fused ``(B, C, H, W)``; maxima and minima before normalisation ``(B, C, 2)``."""
    x, _ = _fuse(_resize(cams, flips, size, grid, relu, align_corners), reduce)
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
    size: Sequence[int], grid: Sequence[int], relu: bool, reduce: str, normalize: str | None, align_corners: bool,
    eps: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the views. The fused maps are computed again; ``stats`` is what the forward returned.

    With y = (x - low) / d, d = max - low + eps (low = 0 for ``"max"``) and s = sum(g y): dx = g / d, minus s / d shared
    by the pixels that hold the maximum, plus (s - sum(g)) / d shared by those that hold the minimum for ``"minmax"``.
    """
    views = _resize(cams, flips, size, grid, relu, align_corners)
    x, winner = _fuse(views, reduce)
    g = grad.to(x.dtype)
    if normalize is not None:
        y, highest, d = _normalize(x, stats, normalize, eps)
        s = (g * y).sum((2, 3), keepdim=True)
        is_highest = (x == highest).to(x.dtype)
        dx = g - s * is_highest / is_highest.sum((2, 3), keepdim=True)
        if normalize == "minmax":
            is_lowest = (x == stats[..., 1, None, None]).to(x.dtype)
            dx = dx + (s - g.sum((2, 3), keepdim=True)) * is_lowest / is_lowest.sum((2, 3), keepdim=True)
        g = dx / d
    if present is not None:
        g = torch.where(present[:, :, None, None], g, 0)
    if reduce == "mean":
        g = g / len(cams)

    grads = []
    for i, (cam, flip) in enumerate(zip(cams, flips, strict=True)):
        share = g if winner is None else torch.where(winner == i, g, 0)
        share = F.pad(share, (0, grid[1] - size[1], 0, grid[0] - size[0]))
        dx = torch.ops.aten.upsample_bilinear2d_backward(share, list(grid), list(cam.shape), align_corners)
        dx = dx.flip(-1) if flip else dx
        grads.append((torch.where(cam <= 0, 0, dx) if relu else dx).to(cam.dtype))
    return grads


def _resize(
    cams: Sequence[Tensor], flips: Sequence[bool], size: Sequence[int], grid: Sequence[int], relu: bool,
    align_corners: bool,
) -> list[Tensor]:  # fmt: skip
    views = []
    for cam, flip in zip(cams, flips, strict=True):
        x = cam.to(torch.promote_types(cam.dtype, torch.float32))
        x = x.relu() if relu else x
        x = x.flip(-1) if flip else x
        x = F.interpolate(x, tuple(grid), mode="bilinear", align_corners=align_corners)
        views.append(x[..., : size[0], : size[1]])
    return views


def _fuse(views: list[Tensor], reduce: str) -> tuple[Tensor, Tensor | None]:
    """The fused maps; for ``"max"`` also the view that won at every pixel, the first among equals."""
    if reduce == "max":
        x, winner = torch.stack(views).max(0)
        return x, winner
    x = sum(views[1:], start=views[0])
    return (x / len(views) if reduce == "mean" else x), None


def _normalize(x: Tensor, stats: Tensor, normalize: str, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Normalised maps, their maxima before, and the divisors."""
    highest, lowest = stats[..., 0, None, None], stats[..., 1, None, None]
    if normalize == "max":
        d = highest + eps
        return x / d, highest, d
    d = highest - lowest + eps
    return (x - lowest) / d, highest, d
