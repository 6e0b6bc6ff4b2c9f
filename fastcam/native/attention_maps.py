"""Launchers of ``csrc/cpu/attention_maps.cpp``. 16-bit inputs are converted to float32 first."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import _C
from fastcam.native._memory import empty


def attention_maps_fwd(
    q: Tensor, k: Tensor, v: Tensor, total: Tensor | None, rows: int, skip: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Attention ``(B, H, N, d)``, ``total`` plus the maps ``(B, rows, M - skip)``, log-sum-exp ``(B, H, N)``."""
    work = torch.promote_types(q.dtype, torch.float32)
    B, H, N, d = q.shape
    M = k.shape[2]
    inputs = [_rows(t, work) for t in (q, k, v)]
    total = None if total is None else total.contiguous()
    out, maps, lse = empty(q.shape, work), empty((B, rows, M - skip), work), empty((B, H, N), work)
    strides = _strides(inputs)
    _C.attention_maps_fwd(
        *(t.data_ptr() for t in inputs), strides.data_ptr(), 0 if total is None else total.data_ptr(),
        out.data_ptr(), maps.data_ptr(), lse.data_ptr(), work == torch.float64,
        B, H, N, M, d, rows, skip, scale, torch.get_num_threads(),
    )  # fmt: skip
    return out.to(q.dtype), maps, lse


def attention_maps_bwd(
    grad: Tensor, grad_maps: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, skip: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k`` and ``v``; ``lse`` is what the forward returned."""
    work = lse.dtype
    B, H, N, d = q.shape
    inputs = [_rows(t, work) for t in (q, k, v, grad)]
    grad_maps = None if grad_maps is None else grad_maps.contiguous()
    grads = [empty(t.shape, work) for t in (q, k, v)]
    strides = _strides(inputs)
    _C.attention_maps_bwd(
        inputs[3].data_ptr(), 0 if grad_maps is None else grad_maps.data_ptr(), *(t.data_ptr() for t in inputs[:3]),
        strides.data_ptr(), lse.data_ptr(), *(t.data_ptr() for t in grads), work == torch.float64,
        B, H, N, k.shape[2], d, 0 if grad_maps is None else grad_maps.shape[1], skip, scale, torch.get_num_threads(),
    )  # fmt: skip
    return grads[0].to(q.dtype), grads[1].to(q.dtype), grads[2].to(q.dtype)


def _rows(x: Tensor, work: torch.dtype) -> Tensor:
    """In ``work``, each row's channels side by side: the only strides that matter."""
    x = x.to(work)
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(inputs: list[Tensor]) -> Tensor:
    return torch.tensor([x.stride()[:3] for x in inputs], dtype=torch.int64)
