"""AffinityNet's affinity of features within a radius, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._paths import crop, destinations, sources


def feature_affinity_fwd(features: Tensor, radius: int, margin: int) -> Tensor:
    """``features (B, D, H, W)`` -> ``(B, P, H, W)``: exp(-mean |f_i - f_j|), 0 where there is no such pair."""
    B, _, H, W = features.shape
    f = features.to(torch.promote_types(features.dtype, torch.float32))
    out = f.new_zeros((B, len(destinations(radius)), H, W))
    for p, offset in enumerate(destinations(radius)):
        window = sources(offset, H, W, margin)
        distance = (crop(f, window) - crop(f, window, offset)).abs().mean(1)
        crop(out[:, p], window).copy_(torch.exp(-distance))
    return out.to(features.dtype)


def feature_affinity_bwd(grad: Tensor, features: Tensor, out: Tensor, radius: int, margin: int) -> Tensor:
    """``d a_ij / d f_i = -a_ij sign(f_i - f_j) / D``, and the opposite for ``f_j``; ``out`` is the forward's."""
    _, D, H, W = features.shape
    f = features.to(torch.promote_types(features.dtype, torch.float32))
    weight = -(grad.to(f.dtype) * out.to(f.dtype)) / D
    grad_f = torch.zeros_like(f)
    for p, offset in enumerate(destinations(radius)):
        window = sources(offset, H, W, margin)
        share = crop(weight[:, p, None], window) * torch.sign(crop(f, window) - crop(f, window, offset))
        crop(grad_f, window).add_(share)
        crop(grad_f, window, offset).sub_(share)
    return grad_f.to(features.dtype)
