"""Fusion of class activation maps of several views in Triton.

A forward computes every pixel twice, once for the maximum and minimum of its map and once to write it: views are small
and stay in the cache, so that only the result moves. A backward that normalises, or takes the maximum over views, holds
one array of the result's size.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

ACTIVATION = (None, "relu", "resized_relu", "fused_relu")  # as the kernels number them
REDUCE = ("sum", "mean", "max", "pair_max")
NORMALIZE = (None, "max", "minmax", "seam")
MOST_COMPETING = 31  # views that may compete for a pixel's gradient: bits of a positive int32
BLOCK_X = 16  # columns of the result that a gradient adds up at once
RUNTIME = ["H", "W", "grid_h", "grid_w", "S", "L", "h", "w", "offset", "mirrored", "view", "tiles_w"]


@triton.jit
def _neighbours(i, n, grid, ALIGN: tl.constexpr):
    """Positions left and right of output positions ``i`` on an axis of ``n``, and the weight of the right one."""
    if ALIGN:
        source = i.to(tl.float32) * ((n - 1).to(tl.float32) / tl.maximum(grid - 1, 1).to(tl.float32))
    else:
        # An explicit fma here and below: the same bits in every kernel, so that a maximum is found again.
        source = tl.fma(i.to(tl.float32) + 0.5, n.to(tl.float32) / grid.to(tl.float32), -0.5)
        source = tl.maximum(source, 0.0)
    left = tl.minimum(source.to(tl.int32), n - 1)
    weight = tl.where(left < n - 1, source - left.to(tl.float32), 0.0)
    return left, tl.minimum(left + 1, n - 1), weight


@triton.jit
def _load(ptr, ACTIVATION: tl.constexpr):
    x = tl.load(ptr).to(tl.float32)
    if ACTIVATION == 1:
        x = tl.where(x < 0, 0.0, x)  # NaN stays
    return x


@triton.jit
def fuse(
    low_ptr, shapes_ptr, y, x, S, grid_h, grid_w, scale,
    ACTIVATION: tl.constexpr, REDUCE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Fused values of pixels ``y`` (BLOCK_H,) by ``x`` (BLOCK_W,) of one map, and, a bit a view, which views take the
    gradient where they compete."""
    fused = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    takers = tl.zeros([BLOCK_H, BLOCK_W], tl.int32)
    larger = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    taker = tl.zeros([BLOCK_H, BLOCK_W], tl.int32)
    for s in range(S):
        h, w = tl.load(shapes_ptr + 4 * s), tl.load(shapes_ptr + 4 * s + 1)
        mirrored, offset = tl.load(shapes_ptr + 4 * s + 2), tl.load(shapes_ptr + 4 * s + 3)
        top, bottom, weight_y = _neighbours(y, h, grid_h, ALIGN)
        left, right, weight_x = _neighbours(x, w, grid_w, ALIGN)
        left = tl.where(mirrored != 0, w - 1 - left, left)[None, :]
        right = tl.where(mirrored != 0, w - 1 - right, right)[None, :]
        upper_ptr, lower_ptr = low_ptr + offset + top[:, None] * w, low_ptr + offset + bottom[:, None] * w
        a, b = _load(upper_ptr + left, ACTIVATION), _load(lower_ptr + left, ACTIVATION)
        weight_x = tl.broadcast_to(weight_x[None, :], [BLOCK_H, BLOCK_W])
        upper = tl.fma(weight_x, _load(upper_ptr + right, ACTIVATION) - a, a)
        lower = tl.fma(weight_x, _load(lower_ptr + right, ACTIVATION) - b, b)
        value = tl.fma(tl.broadcast_to(weight_y[:, None], [BLOCK_H, BLOCK_W]), lower - upper, upper)
        bit = tl.zeros([BLOCK_H, BLOCK_W], tl.int32) + (1 << tl.minimum(s, 30))
        if ACTIVATION == 2:
            bit = tl.where(value <= 0, 0, bit)
            value = tl.where(value < 0, 0.0, value)
        if REDUCE == 2:
            better = (value > fused) | (value != value) | (s == 0)
            fused = tl.where(better, value, fused)
            takers = tl.where(better, bit, takers)
        elif REDUCE == 3:
            better = (value > larger) | (value != value) | (s % 2 == 0)
            larger = tl.where(better, value, larger)
            taker = tl.where(better, bit, taker)
            fused += tl.where(s % 2 == 1, larger, 0.0)
            takers |= tl.where(s % 2 == 1, taker, 0)
        else:
            fused += value
            takers |= bit
    fused *= scale
    if ACTIVATION == 3:
        fused = tl.where(fused < 0, 0.0, fused)
    return fused, takers


@triton.jit
def tile(tiles_w, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr):
    """Rows, columns and first index (a map or an image) of this program."""
    pid = tl.program_id(1)
    y = pid // tiles_w * BLOCK_H + tl.arange(0, BLOCK_H)
    x = pid % tiles_w * BLOCK_W + tl.arange(0, BLOCK_W)
    return y, x, tl.program_id(0).to(tl.int64)


@triton.jit
def normalization(stats_ptr, bc, eps, NORMALIZE: tl.constexpr):
    """Maximum and minimum of a map, what is subtracted, and the divisor."""
    highest, lowest = tl.load(stats_ptr + 2 * bc), tl.load(stats_ptr + 2 * bc + 1)
    subtracted = lowest if NORMALIZE >= 2 else 0.0
    divisor = highest - subtracted + eps
    return highest, lowest, subtracted + eps if NORMALIZE == 3 else subtracted, divisor


@triton.jit
def normalized(v, subtracted, divisor, NORMALIZE: tl.constexpr):
    """Fused values, normalised."""
    if NORMALIZE == 3:
        v = tl.where(v < subtracted, 0.0, v)
    return (v - subtracted) / divisor


@triton.jit(do_not_specialize=RUNTIME)
def _cam_fuse_extremes_kernel(
    low_ptr, shapes_ptr, present_ptr, extremes_ptr, H, W, grid_h, grid_w, S, L, tiles_w, scale,
    ACTIVATION: tl.constexpr, REDUCE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program: maximum and minimum of one tile of one map; NaN if it holds one."""
    y, x, bc = tile(tiles_w, BLOCK_H, BLOCK_W)
    to_ptr = extremes_ptr + 2 * (bc * tl.num_programs(1) + tl.program_id(1))
    if tl.load(present_ptr + bc) != 0:
        # Beyond the edge the last pixel is repeated.
        y, x = tl.minimum(y, H - 1), tl.minimum(x, W - 1)
        v, _ = fuse(
            low_ptr + bc * L, shapes_ptr, y, x, S, grid_h, grid_w, scale, ACTIVATION, REDUCE, ALIGN, BLOCK_H, BLOCK_W
        )
        has_nan = tl.sum(tl.sum((v != v).to(tl.int32), 1), 0) > 0
        tl.store(to_ptr, tl.where(has_nan, float("nan"), tl.max(tl.max(v, 1), 0)))
        tl.store(to_ptr + 1, tl.where(has_nan, float("nan"), tl.min(tl.min(v, 1), 0)))
    else:
        tl.store(to_ptr, 0.0)
        tl.store(to_ptr + 1, 0.0)


@triton.jit(do_not_specialize=RUNTIME)
def _cam_fuse_fwd_kernel(
    low_ptr, shapes_ptr, present_ptr, stats_ptr, out_ptr, H, W, grid_h, grid_w, S, L, tiles_w, scale, eps,
    NORMALIZE: tl.constexpr, ACTIVATION: tl.constexpr, REDUCE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program: one tile of one map, fused and normalised."""
    y, x, bc = tile(tiles_w, BLOCK_H, BLOCK_W)
    v = tl.zeros([BLOCK_H, BLOCK_W], tl.float32)
    if tl.load(present_ptr + bc) != 0:
        v, _ = fuse(
            low_ptr + bc * L, shapes_ptr, y, x, S, grid_h, grid_w, scale, ACTIVATION, REDUCE, ALIGN, BLOCK_H, BLOCK_W
        )
        if NORMALIZE != 0:
            _, _, subtracted, divisor = normalization(stats_ptr, bc, eps, NORMALIZE)
            v = normalized(v, subtracted, divisor, NORMALIZE)
    to_ptr = out_ptr + bc * H * W + y[:, None] * W + x[None, :]
    tl.store(to_ptr, v.to(out_ptr.dtype.element_ty), mask=(y[:, None] < H) & (x[None, :] < W))


@triton.jit(do_not_specialize=RUNTIME)
def _cam_fuse_sums_kernel(
    grad_ptr, low_ptr, shapes_ptr, present_ptr, stats_ptr, sums_ptr, H, W, grid_h, grid_w, S, L, tiles_w, scale, eps,
    NORMALIZE: tl.constexpr, ACTIVATION: tl.constexpr, REDUCE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program: of one tile of one map, the sums of g and of g y, and how many pixels hold maximum and minimum."""
    y, x, bc = tile(tiles_w, BLOCK_H, BLOCK_W)
    if tl.load(present_ptr + bc) != 0:
        inside = (y[:, None] < H) & (x[None, :] < W)
        v, _ = fuse(
            low_ptr + bc * L, shapes_ptr, y, x, S, grid_h, grid_w, scale, ACTIVATION, REDUCE, ALIGN, BLOCK_H, BLOCK_W
        )
        g = tl.load(grad_ptr + bc * H * W + y[:, None] * W + x[None, :], mask=inside, other=0.0).to(tl.float32)
        highest, lowest, subtracted, divisor = normalization(stats_ptr, bc, eps, NORMALIZE)
        gy = tl.where(inside, g * normalized(v, subtracted, divisor, NORMALIZE), 0.0)
        to_ptr = sums_ptr + 4 * (bc * tl.num_programs(1) + tl.program_id(1))
        tl.store(to_ptr, tl.sum(tl.sum(g, 1), 0))
        tl.store(to_ptr + 1, tl.sum(tl.sum(gy, 1), 0))
        tl.store(to_ptr + 2, tl.sum(tl.sum((inside & (v == highest)).to(tl.float32), 1), 0))
        tl.store(to_ptr + 3, tl.sum(tl.sum((inside & (v == lowest)).to(tl.float32), 1), 0))


@triton.jit(do_not_specialize=RUNTIME)
def _cam_fuse_bwd_kernel(
    grad_ptr, low_ptr, shapes_ptr, present_ptr, stats_ptr, sums_ptr, dx_ptr, takers_ptr,
    H, W, grid_h, grid_w, S, L, tiles_w, scale, eps,
    NORMALIZE: tl.constexpr, ACTIVATION: tl.constexpr, REDUCE: tl.constexpr, ALIGN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One program: gradient of one tile of one fused map before normalisation, and the views that take it where they
    compete."""
    y, x, bc = tile(tiles_w, BLOCK_H, BLOCK_W)
    if tl.load(present_ptr + bc) != 0:
        inside = (y[:, None] < H) & (x[None, :] < W)
        at = bc * H * W + y[:, None] * W + x[None, :]
        v, takers = fuse(
            low_ptr + bc * L, shapes_ptr, y, x, S, grid_h, grid_w, scale, ACTIVATION, REDUCE, ALIGN, BLOCK_H, BLOCK_W
        )
        g = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if NORMALIZE != 0:
            highest, lowest, subtracted, divisor = normalization(stats_ptr, bc, eps, NORMALIZE)
            if NORMALIZE == 3:
                g = tl.where(v < subtracted, 0.0, g)
            sum_g, sum_gy = tl.load(sums_ptr + 4 * bc), tl.load(sums_ptr + 4 * bc + 1)
            g += tl.where(v == highest, -sum_gy / tl.load(sums_ptr + 4 * bc + 2), 0.0)
            if NORMALIZE >= 2:
                g += tl.where(v == lowest, (sum_gy - sum_g) / tl.load(sums_ptr + 4 * bc + 3), 0.0)
            g /= divisor
        if ACTIVATION == 3:
            g = tl.where(v <= 0, 0.0, g)
        tl.store(dx_ptr + at, g, mask=inside)
        if REDUCE >= 2 or ACTIVATION == 2:
            tl.store(takers_ptr + at, takers, mask=inside)


@triton.jit
def _support(i, n, grid, ALIGN: tl.constexpr):
    """First output position that source position ``i`` may contribute to, and how many after it."""
    if ALIGN:
        stride = (grid - 1).to(tl.float32) / tl.maximum(n - 1, 1).to(tl.float32)
        first = (i - 1).to(tl.float32) * stride
    else:
        stride = grid.to(tl.float32) / n.to(tl.float32)
        first = (i.to(tl.float32) - 0.5) * stride - 0.5
    return tl.floor(first).to(tl.int32) - 1, (2 * stride).to(tl.int32) + 5


@triton.jit
def _share(i, position, n, grid, ALIGN: tl.constexpr):
    """Weight of source position ``i`` in output position ``position``."""
    left, right, weight = _neighbours(position, n, grid, ALIGN)
    return tl.where(left == i, 1.0 - weight, 0.0) + tl.where(right == i, weight, 0.0)


@triton.jit(do_not_specialize=RUNTIME)
def _cam_fuse_gather_kernel(
    dx_ptr, takers_ptr, low_ptr, present_ptr, grad_low_ptr,
    H, W, grid_h, grid_w, L, h, w, offset, mirrored, view, scale,
    ACTIVATION: tl.constexpr, REDUCE: tl.constexpr, ALIGN: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_X: tl.constexpr,
):  # fmt: skip
    """One program: gradients of BLOCK_W values in one row of one map of one view: sums in a fixed order, no atomics."""
    i, bc = tl.program_id(1), tl.program_id(0).to(tl.int64)
    j = tl.program_id(2) * BLOCK_W + tl.arange(0, BLOCK_W)
    parts = tl.zeros([BLOCK_W, BLOCK_X], tl.float32)
    if tl.load(present_ptr + bc) != 0:
        first_y, count_y = _support(i, h, grid_h, ALIGN)
        first_x, count_x = _support(j, w, grid_w, ALIGN)
        for step_y in range(count_y):
            y = first_y + step_y
            share_y = tl.where((y >= 0) & (y < H), _share(i, y, h, grid_h, ALIGN), 0.0)
            for step_x in range(0, count_x, BLOCK_X):
                x = first_x[:, None] + step_x + tl.arange(0, BLOCK_X)[None, :]
                share = share_y * _share(j[:, None], x, w, grid_w, ALIGN)
                share = tl.where(step_x + tl.arange(0, BLOCK_X)[None, :] < count_x, share, 0.0)
                used = (x >= 0) & (x < W) & (share > 0)
                at = bc * H * W + y * W + x
                if REDUCE >= 2 or ACTIVATION == 2:
                    used &= ((tl.load(takers_ptr + at, mask=used, other=0) >> view) & 1) != 0
                parts += share * tl.load(dx_ptr + at, mask=used, other=0.0).to(tl.float32)
    total = tl.sum(parts, 1)
    at = bc * L + offset + i * w + tl.where(mirrored != 0, w - 1 - j, j)
    if ACTIVATION == 1:
        total = tl.where(tl.load(low_ptr + at, mask=j < w, other=0.0).to(tl.float32) <= 0, 0.0, total)
    tl.store(grad_low_ptr + at, total * scale, mask=j < w)


def blocks(W: int) -> tuple[int, int]:
    """Height and width of the tile of a program, powers of two of 1024 pixels."""
    width = min(128, max(16, triton.next_power_of_2(W)))
    return 1024 // width, width


def cam_fuse_fwd(
    cams: Sequence[Tensor], present: Tensor | None, flips: Sequence[bool], size: Sequence[int], grid: Sequence[int],
    activation: str | None, reduce: str, normalize: str | None, align_corners: bool, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Views ``(B, C, h_s, w_s)`` -> fused ``(B, C, H, W)``; maxima and minima before normalisation ``(B, C, 2)``."""
    B, C = cams[0].shape[:2]
    out = cams[0].new_empty((B, C, *size))
    stats = torch.zeros((B, C, 2), dtype=torch.float32, device=out.device)
    if B * C == 0:
        return out, stats
    views, programs, numbers, flags = prepare(cams, present, flips, size, grid, activation, reduce, align_corners)
    if normalize is not None:
        stats = extremes(views, programs, numbers, flags).reshape(B, C, 2)
    _cam_fuse_fwd_kernel[programs](*views, stats, out, *numbers, eps, NORMALIZE.index(normalize), *flags)
    return out, stats


def prepare(
    cams: Sequence[Tensor], present: Tensor | None, flips: Sequence[bool], size: Sequence[int], grid: Sequence[int],
    activation: str | None, reduce: str, align_corners: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int], tuple[int | float, ...], tuple[int, ...]]:  # fmt: skip
    """What the kernels that walk over tiles take: packed views, programs, sizes, constants."""
    (H, W), (BLOCK_H, BLOCK_W) = size, blocks(size[1])
    tiles_w = triton.cdiv(W, BLOCK_W)
    views = _pack(cams, flips, present)
    programs = views[0].shape[0], triton.cdiv(H, BLOCK_H) * tiles_w
    scale = 1 / len(cams) if reduce == "mean" else 1.0
    numbers = H, W, *grid, len(cams), views[0].shape[1], tiles_w, scale
    return views, programs, numbers, (*_choices(activation, reduce), align_corners, BLOCK_H, BLOCK_W)


def extremes(
    views: tuple[Tensor, Tensor, Tensor], programs: tuple[int, int], numbers: tuple[int | float, ...],
    flags: tuple[int, ...],
) -> Tensor:  # fmt: skip
    """Maxima and minima ``(B C, 2)`` before normalisation, from what :func:`prepare` returned."""
    tiles = torch.empty((*programs, 2), dtype=torch.float32, device=views[0].device)
    _cam_fuse_extremes_kernel[programs](*views, tiles, *numbers, *flags)
    return torch.stack([tiles[..., 0].amax(1), tiles[..., 1].amin(1)], dim=-1)


def _choices(activation: str | None, reduce: str) -> tuple[int, int]:
    return ACTIVATION.index(activation), REDUCE.index(reduce)


def cam_fuse_bwd(
    grad: Tensor, cams: Sequence[Tensor], stats: Tensor, present: Tensor | None, flips: Sequence[bool],
    size: Sequence[int], grid: Sequence[int], activation: str | None, reduce: str, normalize: str | None,
    align_corners: bool, eps: float,
) -> list[Tensor]:  # fmt: skip
    """Gradients of the views. The fused maps are computed again; ``stats`` is what the forward returned."""
    B, C = cams[0].shape[:2]
    if B * C == 0:
        return [torch.zeros_like(cam, memory_format=torch.contiguous_format) for cam in cams]
    compete = reduce in ("max", "pair_max") or activation == "resized_relu"
    if compete and len(cams) > MOST_COMPETING:
        raise ValueError(f"cam_fuse: expected at most {MOST_COMPETING} competing views, got {len(cams)}")
    views, programs, numbers, flags = prepare(cams, present, flips, size, grid, activation, reduce, align_corners)
    low, _, there = views
    dx = takers = grad.contiguous()
    sums = stats
    if normalize is not None:
        parts = stats.new_zeros((*programs, 4))
        _cam_fuse_sums_kernel[programs](dx, *views, stats, parts, *numbers, eps, NORMALIZE.index(normalize), *flags)
        sums = parts.sum(1)
    if normalize is not None or compete or activation == "fused_relu":
        g, dx = dx, torch.empty_like(dx, dtype=torch.float32)
        takers = torch.empty_like(dx, dtype=torch.int32) if compete else dx
        _cam_fuse_bwd_kernel[programs](
            g, *views, stats, sums, dx, takers, *numbers, eps, NORMALIZE.index(normalize), *flags
        )  # fmt: skip

    grad_low = torch.empty_like(low)
    parts_low, offset = [], 0
    for view, (cam, flip) in enumerate(zip(cams, flips, strict=True)):
        h, w = cam.shape[2:]
        width = min(32, triton.next_power_of_2(w))
        _cam_fuse_gather_kernel[(B * C, h, triton.cdiv(w, width))](
            dx, takers, low, there, grad_low, *size, *grid, low.shape[1], h, w, offset, int(flip), view,
            1 / len(cams) if reduce == "mean" else 1.0, *_choices(activation, reduce), align_corners, width, BLOCK_X,
        )  # fmt: skip
        parts_low.append(grad_low[:, offset : offset + h * w].reshape(cam.shape).contiguous())
        offset += h * w
    return parts_low


def _pack(cams: Sequence[Tensor], flips: Sequence[bool], present: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Views ``(B C, L)``; height, width, mirrored, offset of each ``(S, 4)``; presence ``(B C,)``, uint8."""
    low = torch.cat([cam.flatten(0, 1).flatten(1) for cam in cams], dim=1)
    shapes = _shapes(tuple((*cam.shape[2:], bool(flip)) for cam, flip in zip(cams, flips, strict=True)), low.device)
    there = low.new_ones(low.shape[0], dtype=torch.uint8) if present is None else present.flatten().to(torch.uint8)
    return low, shapes, there


@lru_cache(maxsize=256)
def _shapes(views: tuple[tuple[int, int, bool], ...], device: torch.device) -> Tensor:
    rows, offset = [], 0
    for h, w, flip in views:
        rows.append((h, w, int(flip), offset))
        offset += h * w
    return torch.tensor(rows, dtype=torch.int32, device=device)
