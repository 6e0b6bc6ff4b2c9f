"""Launchers of ``csrc/cpu/pixel_refine.cpp``. 16-bit inputs are converted to float32 first."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastcam import _C
from fastcam._dilated import neighbours, position_weights
from fastcam.native._memory import empty


def pixel_refine_fwd(masks: Tensor, image: Tensor, mode: str, dilations: Sequence[int], iterations: int) -> Tensor:
    """``masks (B, C, H, W)`` averaged ``iterations`` times with the weights of ``image (B, K, H, W)``."""
    return _launch(_C.pixel_refine_fwd, masks, image, mode, dilations, iterations)


def pixel_refine_bwd(grad: Tensor, image: Tensor, mode: str, dilations: Sequence[int], iterations: int) -> Tensor:
    """Gradient of the masks."""
    return _launch(_C.pixel_refine_bwd, grad, image, mode, dilations, iterations)


def _launch(
    run: Callable[..., None], x: Tensor, image: Tensor, mode: str, dilations: Sequence[int], iterations: int
) -> Tensor:
    work = torch.promote_types(x.dtype, torch.float32)
    (B, C, H, W), K = x.shape, image.shape[1]
    m, colours = x.to(work).contiguous(), image.to(work).contiguous()
    offsets = torch.tensor(neighbours(dilations), dtype=torch.int64)
    position = torch.tensor(position_weights(dilations), dtype=torch.float64) * (mode == "par")
    out = empty(m.shape, m.dtype)
    if out.numel() > 0:
        run(
            m.data_ptr(), colours.data_ptr(), offsets.data_ptr(), position.data_ptr(), out.data_ptr(),
            work == torch.float64, B, C, K, len(offsets), max(dilations), H, W, mode == "pamr", iterations,
            torch.get_num_threads(),
        )  # fmt: skip
    return out.to(x.dtype)
