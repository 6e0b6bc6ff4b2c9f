"""Triton kernels of ``pixel_refine``: weights in one launch, then one launch an iteration, no atomics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcam._dilated import neighbours, position_weights


def blocks(P: int, C: int) -> dict[str, dict[str, int]]:
    """Block sizes for ``P`` neighbours and ``C`` masks: of the weights, and of the averages."""
    return {
        "weights": {"BLOCK_N": 32, "BLOCK_P": triton.next_power_of_2(P)},
        "average": {"BLOCK_N": 128, "BLOCK_C": min(8, triton.next_power_of_2(C))},
    }


@triton.jit(do_not_specialize=["H", "W", "K", "P"])
def _pixel_refine_weights_kernel(
    image_ptr, offsets_ptr, position_ptr, weight_ptr, H, W, K, P,
    PAMR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """One program: the weights of all P neighbours of BLOCK_N pixels."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    b = tl.program_id(1).to(tl.int64)
    p = tl.arange(0, BLOCK_P)
    real = (p[:, None] < P) & (n[None, :] < H * W)
    dy = tl.load(offsets_ptr + 2 * p, mask=p < P, other=0)
    dx = tl.load(offsets_ptr + 2 * p + 1, mask=p < P, other=0)
    y = tl.minimum(tl.maximum((n // W)[None, :] + dy[:, None], 0), H - 1)
    x = tl.minimum(tl.maximum((n % W)[None, :] + dx[:, None], 0), W - 1)
    centres = P // 8 if PAMR else 0
    score = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for k in range(K):
        plane = image_ptr + (b * K + k) * H * W
        here = tl.load(plane + n, mask=n < H * W, other=0.0).to(tl.float32)
        there = tl.load(plane + y * W + x, mask=real, other=0.0).to(tl.float32)
        mean = (tl.sum(there, axis=0) + centres * here) / (P + centres)
        spread = tl.where(real, there - mean[None, :], 0.0)
        square = tl.sum(spread * spread, axis=0) + centres * (here - mean) * (here - mean)
        std = tl.sqrt(square / (P + centres - 1))
        if PAMR:
            score -= tl.abs(there - here[None, :]) / (1e-8 + 0.1 * std)[None, :]
        else:
            d = (there - here[None, :]) / (0.3 * (std + 1e-8))[None, :]
            score -= d * d
    score = tl.where(real, score / K, float("-inf"))
    score = tl.exp(score - tl.max(tl.where(p[:, None] < P, score, float("-inf")), axis=0)[None, :])
    weight = score / tl.sum(tl.where(real, score, 0.0), axis=0)[None, :]
    weight += tl.load(position_ptr + p, mask=p < P, other=0.0)[:, None]
    tl.store(weight_ptr + (b * P + p[:, None]) * H * W + n[None, :], weight, mask=real)


@triton.jit(do_not_specialize=["H", "W", "C", "P"])
def _pixel_refine_average_kernel(
    now_ptr, weight_ptr, offsets_ptr, next_ptr, H, W, C, P, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One program: one average of BLOCK_C masks at BLOCK_N pixels."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    mask = (c[:, None] < C) & (n[None, :] < H * W)
    row = (b * C + c[:, None]) * H * W
    total = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for p in range(P):
        dy, dx = tl.load(offsets_ptr + 2 * p), tl.load(offsets_ptr + 2 * p + 1)
        y = tl.minimum(tl.maximum(n // W + dy, 0), H - 1)
        x = tl.minimum(tl.maximum(n % W + dx, 0), W - 1)
        w = tl.load(weight_ptr + (b * P + p) * H * W + n, mask=n < H * W, other=0.0)
        total += w[None, :] * tl.load(now_ptr + row + (y * W + x)[None, :], mask=mask, other=0.0)
    tl.store(next_ptr + row + n[None, :], total, mask=mask)


@triton.jit(do_not_specialize=["H", "W", "C", "P", "reach"])
def _pixel_refine_spread_kernel(
    grad_ptr, weight_ptr, offsets_ptr, padded_ptr, H, W, C, P, reach, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):
    """One program: what BLOCK_N pixels of the padded image get from those that have them as neighbours."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    wide = W + 2 * reach
    size = (H + 2 * reach) * wide
    channel = c[:, None] < C
    total = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    for p in range(P):
        y = n // wide - reach - tl.load(offsets_ptr + 2 * p)
        x = n % wide - reach - tl.load(offsets_ptr + 2 * p + 1)
        source = (y >= 0) & (y < H) & (x >= 0) & (x < W)
        w = tl.load(weight_ptr + (b * P + p) * H * W + y * W + x, mask=source, other=0.0)
        at = (b * C + c[:, None]) * H * W + (y * W + x)[None, :]
        total += w[None, :] * tl.load(grad_ptr + at, mask=channel & source[None, :], other=0.0)
    tl.store(padded_ptr + (b * C + c[:, None]) * size + n[None, :], total, mask=channel & (n[None, :] < size))


def pixel_refine_fwd(masks: Tensor, image: Tensor, mode: str, dilations: Sequence[int], iterations: int) -> Tensor:
    """``masks (B, C, H, W)`` averaged ``iterations`` times with the weights of ``image (B, K, H, W)``."""
    (B, C, H, W), P = masks.shape, 8 * len(dilations)
    now = masks.float().clone(memory_format=torch.contiguous_format)
    if now.numel() == 0 or iterations == 0:
        return now.to(masks.dtype)
    offsets, weight = _weights(image, mode, dilations)
    size, following = blocks(P, C)["average"], torch.empty_like(now)
    grid = (triton.cdiv(H * W, size["BLOCK_N"]), triton.cdiv(C, size["BLOCK_C"]), B)
    for _ in range(iterations):
        _pixel_refine_average_kernel[grid](now, weight, offsets, following, H, W, C, P, **size)
        now, following = following, now
    return now.to(masks.dtype)


def pixel_refine_bwd(grad: Tensor, image: Tensor, mode: str, dilations: Sequence[int], iterations: int) -> Tensor:
    """Gradient of the masks."""
    (B, C, H, W), P, reach = grad.shape, 8 * len(dilations), max(dilations)
    g = grad.float().clone(memory_format=torch.contiguous_format)
    if g.numel() == 0 or iterations == 0:
        return g.to(grad.dtype)
    offsets, weight = _weights(image, mode, dilations)
    size, padded = blocks(P, C)["average"], g.new_empty((B, C, H + 2 * reach, W + 2 * reach))
    grid = (triton.cdiv(padded.shape[2] * padded.shape[3], size["BLOCK_N"]), triton.cdiv(C, size["BLOCK_C"]), B)
    for _ in range(iterations):
        _pixel_refine_spread_kernel[grid](g, weight, offsets, padded, H, W, C, P, reach, **size)
        padded[:, :, reach] += padded[:, :, :reach].sum(2)
        padded[:, :, reach + H - 1] += padded[:, :, reach + H :].sum(2)
        padded[:, :, :, reach] += padded[:, :, :, :reach].sum(3)
        padded[:, :, :, reach + W - 1] += padded[:, :, :, reach + W :].sum(3)
        g = padded[:, :, reach : reach + H, reach : reach + W].contiguous()
    return g.to(grad.dtype)


def _weights(image: Tensor, mode: str, dilations: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Offsets (P, 2) and weights (B, P, H, W) of the neighbours."""
    (B, K, H, W), P = image.shape, 8 * len(dilations)
    offsets, position = _tables(tuple(dilations), image.device)
    weight = image.new_empty((B, P, H, W), dtype=torch.float32)
    size = blocks(P, 1)["weights"]
    _pixel_refine_weights_kernel[(triton.cdiv(H * W, size["BLOCK_N"]), B)](
        image.contiguous(), offsets, position * (mode == "par"), weight, H, W, K, P, PAMR=mode == "pamr", **size
    )
    return offsets, weight


@cache
def _tables(dilations: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    offsets = torch.tensor(neighbours(dilations), dtype=torch.int32, device=device)
    return offsets, torch.tensor(position_weights(dilations), dtype=torch.float32, device=device)
