"""Launcher of ``csrc/cpu/cam_label.cpp``, which takes 16-bit views as float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcam import _C
from fastcam.native.cam_fuse import address, dense, numbers, table


def cam_label_fwd(
    cams: Sequence[Tensor], labels: Tensor, background: float, present: Tensor | None, flips: Sequence[bool],
    size: Sequence[int], *policy: Any,
) -> Tensor:  # fmt: skip
    """Views ``(B, C, h_s, w_s)``, labels of channels ``(C,)`` -> labels ``(B, H, W)``, both uint8."""
    B, C = cams[0].shape[:2]
    work = torch.promote_types(cams[0].dtype, torch.float32)
    x = dense(cams, work)
    views = table(x, flips, x)
    mask = None if present is None else present.contiguous()
    out = torch.empty((B, *size), dtype=torch.uint8)
    _C.cam_label_fwd(
        views.buffer_info()[0], address(mask), labels.data_ptr(), background, out.data_ptr(), work == torch.float64,
        len(x), B, C, *numbers(size, *policy), torch.get_num_threads(),
    )  # fmt: skip
    return out
