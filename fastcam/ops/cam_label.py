"""Labels straight from the class activation maps of several views."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastcam import backends
from fastcam._library import op
from fastcam.ops.cam_fuse import POLICY, Activation, Normalize, Reduce, fusion_policy, only_float32

FWD = op(
    f"cam_label_fwd(Tensor[] cams, Tensor labels, float background, {POLICY}) -> Tensor",
    fake=lambda cams, labels, background, present, flips, size, *_: cams[0].new_empty(
        (cams[0].shape[0], *size), dtype=torch.uint8
    ),
)
# Best first. triton comes after the reference, hence only by name, until a GPU has run it.
CANDIDATES = {
    "cpp": backends.needs_cpp,
    "reference": backends.always,
    "triton": only_float32(backends.needs_gpu),
}
MOST_CLASSES = 254  # labels 1 .. 254 in 8 bits; 255 is ignored by convention


def cam_label(
    cams: Sequence[Tensor],
    size: tuple[int, int],
    *,
    background: float | tuple[str, float],
    keys: Tensor | None = None,
    grid: tuple[int, int] | None = None,
    flips: Sequence[bool] | None = None,
    present: Tensor | None = None,
    activation: Activation | None = "relu",
    reduce: Reduce = "sum",
    normalize: Normalize | None = "max",
    align_corners: bool = False,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    r"""The best class of every pixel of the fused maps, or background where no class beats it.

    With :math:`y` the maps that :func:`cam_fuse` gives for the same arguments, in float32 whatever the views' dtype:
    ``argmax([background; y]) + ...``, ties going to the background, then to the lower class, as in
    :func:`numpy.argmax`. The maps are never written: one pass finds maximum and minimum of each, a second one the best
    class.

    ``("power", alpha)`` is PSA's background :math:`(1 - \max_k y_k)^\alpha`. It falls where the maximum grows, so it
    beats the maximum exactly up to the one :math:`t` with :math:`(1 - t)^\alpha = t`: a constant.

    Cost: that of :func:`cam_fuse`, with one byte a pixel written instead of four a pixel and class. Not differentiable.

    Args:
        cams, size, grid, flips, activation, reduce, normalize, align_corners, eps: as in :func:`cam_fuse`.
        background: a number, or ``("power", alpha)`` with ``alpha > 0``.
        keys: int64 :math:`(C,)`, the class that each channel holds; ``None``: channel c holds class c.
        present: bool :math:`(B, C)`; absent classes never win, whatever their maps hold. ``None``: all are present.
        backend: ``"cpp"``, ``"triton"``, ``"reference"``, or ``None`` to choose.

    Returns:
        uint8 :math:`(B, H, W)`: 0 for background, class + 1 elsewhere. A NaN counts as infinity: its class wins.
        Without a present class all is background.

    Raises:
        ValueError: as :func:`cam_fuse`; more than 254 classes, a key outside [0, 254) (looked at on CPUs only),
            ``alpha`` not positive, a background that is NaN.
        TypeError: as :func:`cam_fuse`; ``keys`` not int64.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> view = torch.tensor([[[[0.2, 0.6, 0.0]], [[0.1, 0.0, 0.9]]]])
        >>> cam_label([view], (1, 3), background=0.3, normalize=None)
        tensor([[[0, 1, 2]]], dtype=torch.uint8)
    """
    name, policy = fusion_policy(
        "cam_label", CANDIDATES, cams, size, grid, flips, present, activation, reduce, normalize, align_corners, eps,
        backend,
    )  # fmt: skip
    threshold = _threshold(background)
    labels = label_of_channels("cam_label", keys, cams[0], MOST_CLASSES)
    return FWD(list(cams), labels.to(torch.uint8), threshold, present, *policy, name)


def label_of_channels(op: str, keys: Tensor | None, maps: Tensor, num_classes: int) -> Tensor:
    """int64 ``(C,)``: the label ``keys + 1`` that each channel of ``maps`` ``(B, C, ...)`` stands for."""
    C = maps.shape[1]
    if keys is None:
        if num_classes < C:
            raise ValueError(f"{op}: expected at most {num_classes} classes, got {C}")
        return torch.arange(1, C + 1, device=maps.device)
    if keys.dtype != torch.int64:
        raise TypeError(f"{op}: expected keys of dtype int64, got {str(keys.dtype).removeprefix('torch.')}")
    if keys.shape != (C,) or keys.device != maps.device:
        raise ValueError(
            f"{op}: expected keys ({C},) on {maps.device}, one for each channel, got {tuple(keys.shape)} on "
            f"{keys.device}"
        )
    if keys.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = keys[(keys < 0) | (keys >= num_classes)]
        if len(outside):
            raise ValueError(f"{op}: expected keys from 0 to {num_classes - 1}, got {int(outside[0])}")
    return keys + 1


def _threshold(background: float | tuple[str, float]) -> float:
    """The largest score that loses against the background."""
    if isinstance(background, (int, float)):
        if background != background:
            raise ValueError("cam_label: expected background to be a number, got nan")
        return float(background)
    if len(background) != 2 or background[0] != "power" or not background[1] > 0:
        raise ValueError(
            f"cam_label: expected background a number or ('power', alpha) with alpha > 0, got {background!r}"
        )
    low, high = 0.0, 1.0
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if (1 - middle) ** background[1] >= middle else (low, middle)
    return low
