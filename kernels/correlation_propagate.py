"""Triton kernels of ``correlation_propagate``: the affinity exists in registers, tile by tile; no atomics.

The gradient of the features makes that of the affinity in strips of columns, STRIP_ELEMENTS numbers at a time, which
torch's product then multiplies by the features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

STRIP_ELEMENTS = 1 << 24


def blocks(C: int) -> dict[str, int]:
    """Block sizes for ``C`` maps. ``tl.dot`` wants at least 16 of everything."""
    return {"BLOCK_I": 32, "BLOCK_J": 64, "BLOCK_D": 32, "BLOCK_C": min(max(16, triton.next_power_of_2(C)), 32)}


@triton.jit
def _affinity(g_ptr, i, j, N, D, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr):
    """relu(g_i . g_j) for the pixels i and j of the image whose unit features (D, N) begin at g_ptr."""
    R = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for d0 in range(0, D, BLOCK_D):
        d = (d0 + tl.arange(0, BLOCK_D)).to(tl.int64)
        g_i = tl.load(g_ptr + d[None, :] * N + i[:, None], mask=(d[None, :] < D) & (i[:, None] < N), other=0.0)
        g_j = tl.load(g_ptr + d[:, None] * N + j[None, :], mask=(d[:, None] < D) & (j[None, :] < N), other=0.0)
        R += tl.dot(g_i.to(tl.float32), g_j.to(tl.float32), input_precision="ieee")
    return tl.where(R < 0, 0.0, R)  # NaN stays NaN


@triton.jit(do_not_specialize=["N", "D", "C"])
def _correlation_propagate_kernel(
    x_ptr, g_ptr, divisor_ptr, out_ptr, N, D, C, eps, DIVIDE: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_C maps x (B, C, N) times BLOCK_J columns of R, over its column sums plus eps if DIVIDE."""
    j = tl.program_id(0).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b = tl.program_id(2).to(tl.int64)
    total = tl.zeros([BLOCK_C, BLOCK_J], tl.float32)
    divisor = tl.zeros([BLOCK_J], tl.float32)
    for i0 in range(0, N, BLOCK_I):
        i = (i0 + tl.arange(0, BLOCK_I)).to(tl.int64)
        R = _affinity(g_ptr + b * D * N, i, j, N, D, BLOCK_I, BLOCK_J, BLOCK_D)
        x = tl.load(x_ptr + (b * C + c[:, None]) * N + i[None, :], mask=(c[:, None] < C) & (i[None, :] < N), other=0.0)
        total += tl.dot(x, R, input_precision="ieee")
        divisor += tl.sum(R, axis=0)
    if DIVIDE:
        divisor += eps
        total = total / divisor[None, :]
        if tl.program_id(1) == 0:
            tl.store(divisor_ptr + b * N + j, divisor, mask=j < N)
    tl.store(out_ptr + (b * C + c[:, None]) * N + j[None, :], total, mask=(c[:, None] < C) & (j[None, :] < N))


@triton.jit(do_not_specialize=["N", "D", "C", "first", "width"])
def _correlation_propagate_strip_kernel(
    u_ptr, v_ptr, g_ptr, strip_ptr, N, D, C, first, width,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_I x BLOCK_J numbers of (u_i . v_j + v_i . u_j) [R_ij > 0], j counted from `first`, u and v
    (B, C, N)."""
    i = tl.program_id(0).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    in_strip = tl.program_id(1).to(tl.int64) * BLOCK_J + tl.arange(0, BLOCK_J)
    j = first + in_strip
    b = tl.program_id(2).to(tl.int64)
    inner = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
    for c0 in range(0, C, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        at_i = (b * C + c[None, :]) * N + i[:, None]
        at_j = (b * C + c[:, None]) * N + j[None, :]
        in_i, in_j = (c[None, :] < C) & (i[:, None] < N), (c[:, None] < C) & (j[None, :] < N)
        u_i, v_i = tl.load(u_ptr + at_i, mask=in_i, other=0.0), tl.load(v_ptr + at_i, mask=in_i, other=0.0)
        u_j, v_j = tl.load(u_ptr + at_j, mask=in_j, other=0.0), tl.load(v_ptr + at_j, mask=in_j, other=0.0)
        inner += tl.dot(u_i, v_j, input_precision="ieee") + tl.dot(v_i, u_j, input_precision="ieee")
    R = _affinity(g_ptr + b * D * N, i, j, N, D, BLOCK_I, BLOCK_J, BLOCK_D)
    mask = (i[:, None] < N) & (in_strip[None, :] < width)
    tl.store(strip_ptr + (b * N + i[:, None]) * width + in_strip[None, :], tl.where(R > 0, inner, 0.0), mask=mask)


def correlation_propagate_fwd(x: Tensor, f: Tensor, steps: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Propagated maps ``(B, C, H, W)``; maps after each but the last step ``(steps - 1, B, C, H, W)``; divisors
    ``(B, H, W)``."""
    B, C, H, W = x.shape
    g, _ = _unit(f, eps)
    between = x.new_empty((steps - 1, B, C, H, W), dtype=torch.float32)
    divisor = x.new_empty((B, H, W), dtype=torch.float32)
    maps = x.float().contiguous()
    for t in range(steps):
        out = between[t] if t < steps - 1 else torch.empty_like(maps)
        _multiply(maps, g, divisor, out, eps, divide=True)
        maps = out
    return maps.to(x.dtype), between, divisor


def correlation_propagate_bwd(
    grad: Tensor, x: Tensor, f: Tensor, out: Tensor, between: Tensor, divisor: Tensor, steps: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``f``; the formulas stand at the reference's."""
    B, C, H, W = x.shape
    N, D = H * W, f.shape[1]
    g, norm = _unit(f, eps)
    s = divisor[:, None]
    h = [grad.float() / s]  # of the last step first
    for _ in range(steps - 1):
        y = torch.empty((B, C, H, W), dtype=torch.float32, device=x.device)
        _multiply(h[-1].contiguous(), g, divisor, y, eps, divide=False)
        h.append(y / s)
    h.reverse()
    grad_x = torch.empty((B, C, H, W), dtype=torch.float32, device=x.device)
    _multiply(h[0].contiguous(), g, divisor, grad_x, eps, divide=False)
    maps = [x.float(), *between, out.float()]
    last = torch.stack([(a * b).sum(1, keepdim=True) for a, b in zip(h, maps[1:], strict=True)]).sum(0)
    u = torch.cat([*maps[:-1], torch.ones_like(s)], dim=1).contiguous()
    v = torch.cat([*h, -last], dim=1).contiguous()
    grad_g = torch.zeros_like(g)
    if g.numel():
        size = blocks(u.shape[1])
        step = max(1, STRIP_ELEMENTS // (B * N))
        for first in range(0, N, step):
            width = min(step, N - first)
            strip = g.new_empty((B, N, width))
            grid = (triton.cdiv(N, size["BLOCK_I"]), triton.cdiv(width, size["BLOCK_J"]), B)
            _correlation_propagate_strip_kernel[grid](u, v, g, strip, N, D, u.shape[1], first, width, **size)
            grad_g[:, :, first : first + width] = torch.matmul(g, strip)
    radial = (grad_g * g).sum(1, keepdim=True) * (norm + eps) / norm.clamp_min(torch.finfo(torch.float32).tiny)
    return grad_x.to(x.dtype), ((grad_g - g * radial) / (norm + eps)).reshape(f.shape).to(f.dtype)


def _unit(f: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Features ``(B, D, N)`` divided by norm plus ``eps``, contiguous, and their norms ``(B, 1, N)``, both float32."""
    flat = f.flatten(2)
    norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True, dtype=torch.float32)
    return (flat.float() / (norm + eps)).contiguous(), norm


def _multiply(x: Tensor, g: Tensor, divisor: Tensor, out: Tensor, eps: float, *, divide: bool) -> None:
    """``out`` = ``x (B, C, H, W)`` times the affinity, over its column sums plus ``eps``, put into ``divisor``, if
    ``divide``."""
    B, D, N = g.shape
    C = x.shape[1]
    if B * N == 0:
        return
    size = blocks(C)
    grid = (triton.cdiv(N, size["BLOCK_J"]), max(1, triton.cdiv(C, size["BLOCK_C"])), B)
    _correlation_propagate_kernel[grid](x, g, divisor, out, N, D, C, eps, DIVIDE=divide, **size)
