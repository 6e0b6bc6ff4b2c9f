"""Launchers of ``csrc/cpu/path_affinity.cpp``. 16-bit inputs are converted to float32 first."""

from __future__ import annotations

from itertools import accumulate, chain

import torch
from torch import Tensor

from fastcam import _C
from fastcam._paths import paths
from fastcam.native._memory import empty


def path_affinity_fwd(edge: Tensor, radius: int) -> Tensor:
    """``edge (B, H, W)`` -> ``(B, P, H, W)``."""
    work = torch.promote_types(edge.dtype, torch.float32)
    B, H, W = edge.shape
    e = edge.to(work).contiguous()
    offsets, ends = _tables(radius)
    out = empty((B, len(ends), H, W), work)
    _C.path_affinity_fwd(
        e.data_ptr(), offsets.data_ptr(), ends.data_ptr(), out.data_ptr(), work == torch.float64,
        B, len(ends), H, W, torch.get_num_threads(),
    )  # fmt: skip
    return out.to(edge.dtype)


def path_affinity_bwd(grad: Tensor, edge: Tensor, radius: int) -> Tensor:
    """Gradient of ``edge``."""
    work = torch.promote_types(edge.dtype, torch.float32)
    B, H, W = edge.shape
    g, e = grad.to(work).contiguous(), edge.to(work).contiguous()
    offsets, ends = _tables(radius)
    grad_edge = torch.empty_like(e)
    _C.path_affinity_bwd(
        g.data_ptr(), e.data_ptr(), offsets.data_ptr(), ends.data_ptr(), grad_edge.data_ptr(), work == torch.float64,
        B, len(ends), H, W, radius, torch.get_num_threads(),
    )  # fmt: skip
    return grad_edge.to(edge.dtype)


def _tables(radius: int) -> tuple[Tensor, Tensor]:
    """The offsets of all paths one after the other, and where each path ends."""
    every = paths(radius)
    offsets = torch.tensor(list(chain.from_iterable(every)), dtype=torch.int64).reshape(-1, 2)
    return offsets, torch.tensor(list(accumulate(map(len, every))), dtype=torch.int64)
