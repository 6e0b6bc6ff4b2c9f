"""Pixel-adaptive refinement of masks (PAMR, PAR), in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcam._dilated import neighbours, position_weights


def pixel_refine_fwd(masks: Tensor, image: Tensor, mode: str, dilations: Sequence[int], iterations: int) -> Tensor:
    """``masks (B, C, H, W)`` averaged ``iterations`` times with the weights of ``image (B, K, H, W)``."""
    if masks.numel() == 0:
        return masks.new_empty(masks.shape)
    offsets, reach = neighbours(dilations), max(dilations)
    weights = pixel_weights(image, mode, dilations)
    m = masks.to(weights.dtype).clone(memory_format=torch.contiguous_format)
    for _ in range(iterations):
        padded = F.pad(m, (reach,) * 4, mode="replicate")
        m = torch.zeros_like(m)
        for p, offset in enumerate(offsets):
            m.addcmul_(_shifted(padded, offset, reach), weights[:, p, None])
    return m.to(masks.dtype)


def pixel_refine_bwd(grad: Tensor, image: Tensor, mode: str, dilations: Sequence[int], iterations: int) -> Tensor:
    """Gradient of the masks: the transposed average. What fell on the padding belongs to the border pixel it copied."""
    if grad.numel() == 0:
        return grad.new_empty(grad.shape)
    offsets, reach = neighbours(dilations), max(dilations)
    weights = pixel_weights(image, mode, dilations)
    g = grad.to(weights.dtype).clone(memory_format=torch.contiguous_format)
    H, W = g.shape[2:]
    for _ in range(iterations):
        padded = g.new_zeros((*g.shape[:2], H + 2 * reach, W + 2 * reach))
        for p, offset in enumerate(offsets):
            _shifted(padded, offset, reach).addcmul_(g, weights[:, p, None])
        padded[:, :, reach] += padded[:, :, :reach].sum(2)
        padded[:, :, reach + H - 1] += padded[:, :, reach + H :].sum(2)
        padded[:, :, :, reach] += padded[:, :, :, :reach].sum(3)
        padded[:, :, :, reach + W - 1] += padded[:, :, :, reach + W :].sum(3)
        g = padded[:, :, reach : reach + H, reach : reach + W].clone()
    return g.to(grad.dtype)


def pixel_weights(image: Tensor, mode: str, dilations: Sequence[int]) -> Tensor:
    """Weights ``(B, 8 |dilations|, H, W)`` of the neighbours, of ``image (B, K, H, W)``; float32 or float64."""
    offsets, reach = neighbours(dilations), max(dilations)
    x = image.to(torch.promote_types(image.dtype, torch.float32))
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    centres = len(dilations) if mode == "pamr" else 0  # PAMR counts the centre once a dilation
    samples = [*offsets, *[(0, 0)] * centres]
    mean = sum(_shifted(padded, o, reach) for o in samples) / len(samples)
    variance = sum((_shifted(padded, o, reach) - mean) ** 2 for o in samples) / (len(samples) - 1)
    std = torch.as_tensor(variance).sqrt()
    differences = [(_shifted(padded, o, reach) - x).abs() for o in offsets]
    if mode == "pamr":
        return torch.stack([-(d / (1e-8 + 0.1 * std)).mean(1) for d in differences], 1).softmax(1)
    colour = torch.stack([-((d / (std + 1e-8) / 0.3) ** 2).mean(1) for d in differences], 1).softmax(1)
    position = torch.tensor(position_weights(dilations), dtype=x.dtype, device=x.device)
    return colour + position[:, None, None]


def _shifted(padded: Tensor, offset: tuple[int, int], reach: int) -> Tensor:
    """The view of a padded tensor whose pixels are the neighbours at ``offset``."""
    H, W = padded.shape[2] - 2 * reach, padded.shape[3] - 2 * reach
    y, x = reach + offset[0], reach + offset[1]
    return padded[:, :, y : y + H, x : x + W]
