"""Launchers of ``csrc/cpu/feature_affinity.cpp``. 16-bit inputs are converted to float32 first."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import _C
from fastcam._paths import destinations
from fastcam.native._memory import empty


def feature_affinity_fwd(features: Tensor, radius: int, margin: int) -> Tensor:
    """``features (B, D, H, W)`` -> ``(B, P, H, W)``."""
    work = torch.promote_types(features.dtype, torch.float32)
    B, D, H, W = features.shape
    f = features.to(work).contiguous()
    offsets = torch.tensor(destinations(radius), dtype=torch.int64)
    out = empty((B, len(offsets), H, W), work)
    _C.feature_affinity_fwd(
        f.data_ptr(), offsets.data_ptr(), out.data_ptr(), work == torch.float64,
        B, D, len(offsets), H, W, radius, margin, torch.get_num_threads(),
    )  # fmt: skip
    return out.to(features.dtype)


def feature_affinity_bwd(grad: Tensor, features: Tensor, out: Tensor, radius: int, margin: int) -> Tensor:
    """Gradient of ``features``; ``out`` is what the forward returned."""
    work = torch.promote_types(features.dtype, torch.float32)
    B, D, H, W = features.shape
    g, f, a = (t.to(work).contiguous() for t in (grad, features, out))
    offsets = torch.tensor(destinations(radius), dtype=torch.int64)
    grad_f = empty(f.shape, f.dtype)
    _C.feature_affinity_bwd(
        g.data_ptr(), f.data_ptr(), a.data_ptr(), offsets.data_ptr(), grad_f.data_ptr(), work == torch.float64,
        B, D, len(offsets), H, W, radius, margin, torch.get_num_threads(),
    )  # fmt: skip
    return grad_f.to(features.dtype)
