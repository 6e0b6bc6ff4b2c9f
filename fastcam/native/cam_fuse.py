"""Launchers of ``csrc/cpu/cam_fuse.cpp``, which takes 16-bit views as float32, and of ``csrc/cuda/cam_fuse.cu``."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
from torch import Tensor

from fastcam import _C
from fastcam.native._memory import empty

ACTIVATION = (None, "relu", "resized_relu", "fused_relu")  # as csrc/cam_fuse.h numbers them
REDUCE = ("sum", "mean", "max", "pair_max")
NORMALIZE = (None, "max", "minmax", "seam")
CUDA_DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # as csrc/cuda/ops.h numbers them


def cam_fuse_fwd(
    cams: Sequence[Tensor], present: Tensor | None, flips: Sequence[bool], size: Sequence[int], grid: Sequence[int],
    activation: str | None, reduce: str, normalize: str | None, align_corners: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Views ``(B, C, h_s, w_s)`` -> fused ``(B, C, H, W)``; maxima and minima before normalisation ``(B, C, 2)``."""
    B, C = cams[0].shape[:2]
    dtype = cams[0].dtype
    work = torch.promote_types(dtype, torch.float32)
    policy = numbers(size, grid, activation, reduce, normalize, align_corners, eps)
    mask = None if present is None else present.contiguous()
    stats = cams[0].new_zeros((B, C, 2), dtype=work)
    if cams[0].is_cuda:
        from fastcam import _C_cuda

        x = [cam.contiguous() for cam in cams]
        views = table(x, flips, x)
        out = x[0].new_empty((B, C, *size))
        extremes = stats.new_empty((B * C, _C_cuda.cam_fuse_tiles(*size), 2))
        with torch.cuda.device(out.device):
            _C_cuda.cam_fuse_fwd(
                views.buffer_info()[0], address(mask), out.data_ptr(), extremes.data_ptr(), stats.data_ptr(),
                CUDA_DTYPES.index(dtype), len(x), B * C, *policy, torch.cuda.current_stream().cuda_stream,
            )  # fmt: skip
        return out, stats
    x = dense(cams, work)
    views = table(x, flips, x)
    out = empty((B, C, *size), work)
    _C.cam_fuse_fwd(
        views.buffer_info()[0], address(mask), out.data_ptr(), stats.data_ptr(), work == torch.float64, len(x), B * C,
        *policy, torch.get_num_threads(),
    )  # fmt: skip
    return out if dtype == work else out.to(dtype), stats


def cam_fuse_bwd(
    grad: Tensor, cams: Sequence[Tensor], stats: Tensor, present: Tensor | None, flips: Sequence[bool],
    size: Sequence[int], grid: Sequence[int], activation: str | None, reduce: str, normalize: str | None,
    align_corners: bool, eps: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the views. The fused maps are computed again; ``stats`` is what the forward returned."""
    B, C = cams[0].shape[:2]
    dtype = cams[0].dtype
    policy = numbers(size, grid, activation, reduce, normalize, align_corners, eps)
    mask = None if present is None else present.contiguous()
    if grad.is_cuda:
        from fastcam import _C_cuda

        x = [cam.contiguous() for cam in cams]
        grads = [torch.empty_like(cam) for cam in x]
        views = table(x, flips, grads)
        g = grad.contiguous()
        sums = stats.new_empty((B * C, _C_cuda.cam_fuse_tiles(*size), 4))
        totals = stats.new_empty((B * C, 4))
        compete = reduce in ("max", "pair_max") or activation == "resized_relu"
        prepare = compete or normalize is not None or activation == "fused_relu"
        dx = torch.empty_like(g, dtype=torch.float32) if prepare else None
        takers = torch.empty_like(g, dtype=torch.int32) if compete else None
        with torch.cuda.device(g.device):
            _C_cuda.cam_fuse_bwd(
                g.data_ptr(), views.buffer_info()[0], stats.data_ptr(), address(mask), sums.data_ptr(),
                totals.data_ptr(), address(dx), address(takers), CUDA_DTYPES.index(dtype), len(x), B * C, *policy,
                torch.cuda.current_stream().cuda_stream,
            )  # fmt: skip
        return grads
    x = [cam.to(stats.dtype).contiguous() for cam in cams]
    grads = [torch.empty_like(cam) for cam in x]
    views = table(x, flips, grads)
    g = grad.to(stats.dtype).contiguous()
    _C.cam_fuse_bwd(
        g.data_ptr(), views.buffer_info()[0], stats.data_ptr(), address(mask), g.dtype == torch.float64, len(x), B * C,
        *policy, torch.get_num_threads(),
    )  # fmt: skip
    return [dx.to(dtype) for dx in grads]


def dense(cams: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The views, contiguous and of a dtype. To ask is cheaper than to convert what needs no conversion."""
    return [cam if cam.dtype == dtype and cam.is_contiguous() else cam.to(dtype).contiguous() for cam in cams]


def numbers(
    size: Sequence[int], grid: Sequence[int], activation: str | None, reduce: str, normalize: str | None,
    align_corners: bool, eps: float,
) -> tuple[int | float, ...]:  # fmt: skip
    """The policy as the compiled modules take it."""
    choices = ACTIVATION.index(activation), REDUCE.index(reduce), NORMALIZE.index(normalize)
    return (*size, *grid, *choices, align_corners, eps)


def table(cams: Sequence[Tensor], flips: Sequence[bool], grads: Sequence[Tensor]) -> array[int]:
    """A row a view: address, height, width, mirrored, address of the gradient. A quarter of a tensor's time."""
    rows = array("q")
    for cam, flip, grad in zip(cams, flips, grads, strict=True):
        shape = cam.shape
        rows.extend((cam.data_ptr(), shape[2], shape[3], flip, grad.data_ptr()))
    return rows


def address(x: Tensor | None) -> int:
    """Address of the data, 0 for no tensor."""
    return 0 if x is None else x.data_ptr()
