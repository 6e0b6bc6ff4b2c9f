"""Launchers of ``csrc/cpu/cam_fuse.cpp``. 16-bit views are converted to float32 first."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcam import _C

REDUCE = ("sum", "mean", "max")  # as csrc/cam_fuse.h numbers them
NORMALIZE = (None, "max", "minmax")


def cam_fuse_fwd(
    cams: Sequence[Tensor], present: Tensor | None, flips: Sequence[bool], size: Sequence[int], grid: Sequence[int],
    relu: bool, reduce: str, normalize: str | None, align_corners: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Views ``(B, C, h_s, w_s)`` -> fused ``(B, C, H, W)``; maxima and minima before normalisation ``(B, C, 2)``."""
    work = torch.promote_types(cams[0].dtype, torch.float32)
    B, C = cams[0].shape[:2]
    x = [cam.to(work).contiguous() for cam in cams]
    views = _table(x, flips, x)
    mask = None if present is None else present.contiguous()
    out, stats = torch.empty((B, C, *size), dtype=work), torch.empty((B, C, 2), dtype=work)
    _C.cam_fuse_fwd(
        views.data_ptr(), 0 if mask is None else mask.data_ptr(), out.data_ptr(), stats.data_ptr(),
        work == torch.float64, len(cams), B * C, *size, *grid, relu, REDUCE.index(reduce), NORMALIZE.index(normalize), align_corners, eps,
        torch.get_num_threads(),
    )  # fmt: skip
    return out.to(cams[0].dtype), stats


def cam_fuse_bwd(
    grad: Tensor, cams: Sequence[Tensor], stats: Tensor, present: Tensor | None, flips: Sequence[bool],
    size: Sequence[int], grid: Sequence[int], relu: bool, reduce: str, normalize: str | None, align_corners: bool,
    eps: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the views. The fused maps are computed again; ``stats`` is what the forward returned."""
    B, C = cams[0].shape[:2]
    x = [cam.to(stats.dtype).contiguous() for cam in cams]
    grads = [torch.empty_like(cam) for cam in x]
    views = _table(x, flips, grads)
    mask = None if present is None else present.contiguous()
    g = grad.to(stats.dtype).contiguous()
    _C.cam_fuse_bwd(
        g.data_ptr(), views.data_ptr(), stats.data_ptr(), 0 if mask is None else mask.data_ptr(),
        g.dtype == torch.float64, len(cams), B * C, *size, *grid, relu, REDUCE.index(reduce), NORMALIZE.index(normalize), align_corners, eps,
        torch.get_num_threads(),
    )  # fmt: skip
    return [dx.to(cam.dtype) for dx, cam in zip(grads, cams, strict=True)]


def _table(cams: Sequence[Tensor], flips: Sequence[bool], grads: Sequence[Tensor]) -> Tensor:
    """A row a view: address, height, width, mirrored, address of the gradient."""
    rows = [
        (cam.data_ptr(), *cam.shape[2:], flip, grad.data_ptr())
        for cam, flip, grad in zip(cams, flips, grads, strict=True)
    ]
    return torch.tensor(rows, dtype=torch.int64)
