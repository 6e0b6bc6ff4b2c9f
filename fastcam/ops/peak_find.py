"""Local maxima of maps: the class peaks of PRM."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fastcam import backends
from fastcam._checks import check_same
from fastcam._library import op


def _fwd_fake(maps: Tensor, window: int, rule: str, constant: float, backend: str) -> Tensor:
    return maps.new_empty(torch.library.get_ctx().new_dynamic_size(), 4, dtype=torch.int64)


FWD = op(
    "peak_find_fwd(Tensor maps, int window, str rule, float constant, str backend) -> Tensor",
    fake=_fwd_fake,
)
RULES = ("median", "mean", "max")
# Best first. triton comes after the reference, hence only by name, until a GPU has run it.
CANDIDATES = {"cpp": backends.needs_cpp, "reference": backends.always, "triton": backends.needs_gpu}


def peak_find(
    maps: Tensor,
    *,
    window: int = 3,
    threshold: Literal["median", "mean", "max"] | float | None = "median",
    backend: str | None = None,
) -> Tensor:
    """Pixels that are the largest of the window around them, and not below a threshold of their map.

    A pixel is a peak where it is larger than every pixel of its window before it in row-major order and at least as
    large as every one after it: of a plateau that fits into a window the first pixel alone, of a flat map the top left
    one. PRM's rule (Zhou et al., CVPR 2018), to the tie.

    Cost: one read of the maps and the median of each, about ``2 window`` comparisons a value. Not differentiable: index
    the maps with the peaks instead. On a GPU it waits for the number of peaks. To compile it without a graph break set
    ``torch._dynamo.config.capture_dynamic_output_shape_ops``.

    Args:
        maps: :math:`(B, C, H, W)`, any strides, float32, float16, bfloat16 (float64 in ``cpp`` and ``reference``).
        window: side of the window, odd, at least 3. What lies beyond the map is not compared with.
        threshold: a peak is at least the ``"median"`` of its map (of an even number of values the lower one), their
            ``"mean"`` (or their maximum, where rounding puts the mean above it), their ``"max"``, or this number;
            ``None``: any.
        backend: ``"triton"``, ``"cpp"``, ``"reference"``, or ``None`` to choose.

    Returns:
        Peaks, int64 :math:`(n, 4)`: image, class, row, column, in that order. With the median, the mean or the maximum
        every map of finite numbers has at least one peak. A NaN counts as -inf, which is never a peak.

    Raises:
        ValueError: shapes that do not fit, a window that is even or below 3, an unknown threshold.
        TypeError: a dtype that is not floating.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> peak_find(torch.tensor([[[[0.0, 3.0, 1.0, 2.0]]]]))
        tensor([[0, 0, 0, 1],
                [0, 0, 0, 3]])
    """
    if maps.ndim != 4:
        raise ValueError(f"peak_find: expected maps (B, C, H, W), got {tuple(maps.shape)}")
    if window < 3 or window % 2 == 0:
        raise ValueError(f"peak_find: expected an odd window of at least 3, got {window}")
    if isinstance(threshold, str):
        if threshold not in RULES:
            raise ValueError(
                f"peak_find: expected threshold 'median', 'mean', 'max', a number or None, got {threshold!r}"
            )
        rule: str = threshold
        constant = 0.0
    else:
        rule, constant = "constant", -math.inf if threshold is None else float(threshold)
        if math.isnan(constant):
            raise ValueError("peak_find: expected threshold 'median', 'mean', 'max', a number or None, got nan")
    check_same("peak_find", maps=maps)
    return FWD(maps, window, rule, constant, backends.resolve("peak_find", CANDIDATES, maps, backend))
