"""Labels from class activation maps of several views in Triton: maxima as in cam_fuse, then the best class of every
pixel. Only labels are written."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcam.kernels.cam_fuse import NORMALIZE, RUNTIME, extremes, fuse, normalization, normalized, prepare, tile


@triton.jit(do_not_specialize=[*RUNTIME, "C", "background"])
def _cam_label_kernel(
    low_ptr, shapes_ptr, present_ptr, stats_ptr, labels_ptr, out_ptr,
    C, H, W, grid_h, grid_w, S, L, tiles_w, scale, eps, background,
    NORMALIZE: tl.constexpr, ACTIVATION: tl.constexpr, REDUCE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program: labels of one tile of one image, class after class."""
    y, x, b = tile(tiles_w, BLOCK_H, BLOCK_W)
    best = tl.zeros([BLOCK_H, BLOCK_W], tl.float32) + background
    winner = tl.zeros([BLOCK_H, BLOCK_W], tl.int32)
    for c in range(C):
        bc = b * C + c
        if tl.load(present_ptr + bc) != 0:
            v, _ = fuse(
                low_ptr + bc * L, shapes_ptr, y, x, S, grid_h, grid_w, scale,
                ACTIVATION, REDUCE, ALIGN, BLOCK_H, BLOCK_W,
            )  # fmt: skip
            if NORMALIZE != 0:
                _, _, subtracted, divisor = normalization(stats_ptr, bc, eps, NORMALIZE)
                v = normalized(v, subtracted, divisor, NORMALIZE)
            v = tl.where(v != v, float("inf"), v)
            winner = tl.where(v > best, tl.load(labels_ptr + c).to(tl.int32), winner)
            best = tl.where(v > best, v, best)
    to_ptr = out_ptr + b * H * W + y[:, None] * W + x[None, :]
    tl.store(to_ptr, winner.to(tl.uint8), mask=(y[:, None] < H) & (x[None, :] < W))


def cam_label_fwd(
    cams: Sequence[Tensor], labels: Tensor, background: float, present: Tensor | None, flips: Sequence[bool],
    size: Sequence[int], grid: Sequence[int], activation: str | None, reduce: str, normalize: str | None,
    align_corners: bool, eps: float,
) -> Tensor:  # fmt: skip
    """Views ``(B, C, h_s, w_s)``, labels of channels ``(C,)`` -> labels ``(B, H, W)``, both uint8."""
    B, C = cams[0].shape[:2]
    out = torch.zeros((B, *size), dtype=torch.uint8, device=cams[0].device)
    if B * C == 0:
        return out
    views, programs, numbers, flags = prepare(cams, present, flips, size, grid, activation, reduce, align_corners)
    stats = views[0] if normalize is None else extremes(views, programs, numbers, flags)
    _cam_label_kernel[(B, programs[1])](
        *views, stats, labels, out, C, *numbers, eps, background, NORMALIZE.index(normalize), *flags
    )
    return out
