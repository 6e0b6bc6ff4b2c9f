"""Confusion of maps with true labels at many background thresholds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcam import backends
from fastcam._checks import check_same
from fastcam._library import op
from fastcam.ops.cam_fuse import only_float32
from fastcam.ops.cam_label import label_of_channels


def _fwd_fake(
    scores: Tensor, target: Tensor, thresholds: Tensor, labels: Tensor, present: Any, num_classes: int, *_: Any
) -> Tensor:
    return scores.new_empty((num_classes + 1, num_classes + 1, thresholds.shape[0] + 1), dtype=torch.int64)


FWD = op(
    "cam_sweep_fwd(Tensor scores, Tensor target, Tensor thresholds, Tensor labels, Tensor? present, int num_classes, "
    "int ignore_index, str backend) -> Tensor",
    fake=_fwd_fake,
)
# Best first. triton comes after the reference, hence only by name, until a GPU has run it.
CANDIDATES = {
    "cpp": backends.needs_cpp,
    "reference": backends.always,
    "triton": only_float32(backends.needs_gpu),
}
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def cam_sweep(
    scores: Tensor,
    target: Tensor,
    thresholds: Sequence[float] | Tensor,
    *,
    num_classes: int,
    keys: Tensor | None = None,
    present: Tensor | None = None,
    ignore_index: int = 255,
    backend: str | None = None,
) -> Tensor:
    r"""Confusion matrices of ``argmax([t; scores])`` with the true labels for every background threshold t.

    .. math:: n_{t a b} = \#\{p : \text{target}_p = a,\ \arg\max(t, y_{1p}, \dots, y_{Cp}) = b\}

    A pixel's best class does not depend on t, only whether it beats t does. So one pass counts pixels by true label,
    best class and number of thresholds that its score exceeds, and cumulative sums of these counts are the matrices.
    Exact: the same integers as one arg-max a threshold; ties go to the background, then to the lower channel.

    Cost: one read of ``scores`` and ``target``, whatever the number of thresholds; :math:`8 (C + 1)^2 (T + 1)` bytes
    of counts, once more in the result. Not differentiable.

    Args:
        scores: :math:`(B, n, H, W)`, any strides, float32, float16, bfloat16 (float64 in ``cpp`` and ``reference``).
        target: true labels :math:`(B, H, W)`, integers in [0, C] or ``ignore_index``.
        thresholds: T numbers in any order. They are compared in the dtype of ``scores``.
        num_classes: C.
        keys: int64 :math:`(n,)`, the class that each channel holds; ``None``: channel c holds class c.
        present: bool :math:`(B, n)`; absent classes never win. ``None``: all are present.
        ignore_index: true label that does not count.
        backend: ``"cpp"``, ``"triton"``, ``"reference"``, or ``None`` to choose.

    Returns:
        int64 :math:`(T, C + 1, C + 1)`, rows true, columns predicted, in the order of ``thresholds``. A NaN score
        counts as infinity. Integers are added, so atomics in ``triton`` change nothing.

    Raises:
        ValueError: shapes that do not fit, two devices, a key outside [0, C) (looked at on CPUs only), a true label
            outside [0, C] (``triton`` does not count such pixels, so as to wait for nothing).
        TypeError: ``scores`` not floating, ``target`` not integer, ``keys`` not int64, ``present`` not bool.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> scores = torch.tensor([[[[0.2, 0.6]]]])
        >>> cam_sweep(scores, torch.tensor([[[0, 1]]]), [0.1, 0.5], num_classes=1).tolist()
        [[[0, 1], [0, 1]], [[1, 0], [0, 1]]]
    """
    _check_shapes(scores, target, num_classes, present)
    check_same("cam_sweep", scores=scores)
    if target.dtype not in INTEGERS:
        raise TypeError(f"cam_sweep: expected target of an integer dtype, got {_name(target)}")
    if present is not None and present.dtype != torch.bool:
        raise TypeError(f"cam_sweep: expected present of dtype bool, got {_name(present)}")
    for name, tensor in (("target", target), ("present", present)):
        if tensor is not None and tensor.device != scores.device:
            raise ValueError(
                f"cam_sweep: expected one device, got scores on {scores.device}, {name} on {tensor.device}"
            )
    labels = label_of_channels("cam_sweep", keys, scores, num_classes)
    backend = backends.resolve("cam_sweep", CANDIDATES, scores, backend)

    planes = torch.as_tensor(thresholds, device=scores.device).to(scores.dtype).flatten()
    ascending, order = planes.sort()
    histogram = FWD(scores, target, ascending, labels, present, num_classes, ignore_index, backend)
    # Threshold number j, ascending, loses to the scores that exceed more than j thresholds.
    sums = histogram.cumsum(-1)
    wins = (sums[..., -1:] - sums[..., :-1]).permute(2, 0, 1)
    confusion = wins[order.argsort()]
    confusion[:, :, 0] += sums[..., -1].sum(1) - confusion.sum(2)
    return confusion


def _name(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _check_shapes(scores: Tensor, target: Tensor, num_classes: int, present: Tensor | None) -> None:
    if scores.ndim != 4:
        raise ValueError(f"cam_sweep: expected scores (B, n, H, W), got {tuple(scores.shape)}")
    B, n, H, W = scores.shape
    if target.shape != (B, H, W):
        raise ValueError(f"cam_sweep: expected target (B, H, W) = {(B, H, W)}, got {tuple(target.shape)}")
    if num_classes < 1:
        raise ValueError(f"cam_sweep: expected num_classes of at least 1, got {num_classes}")
    if present is not None and present.shape != (B, n):
        raise ValueError(f"cam_sweep: expected present (B, n) = {(B, n)}, got {tuple(present.shape)}")
