"""Means over the pixels of a window that have the centre's label: the pooling of the locally adaptive loss (LAL)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcam import backends
from fastcam._checks import FLOATS, check_same
from fastcam._library import op


def _fwd_fake(x: Tensor, labels: Tensor, rings: list[float], by_count: bool, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(labels.shape, dtype=torch.promote_types(x.dtype, torch.float32))


FWD = op(
    "window_reduce_fwd(Tensor x, Tensor labels, float[] rings, bool by_count, str backend) -> (Tensor, Tensor)",
    fake=_fwd_fake,
)
BWD = op(
    "window_reduce_bwd(Tensor grad, Tensor labels, Tensor r, float[] rings, str backend) -> Tensor",
    fake=lambda grad, labels, r, rings, backend: grad.new_empty(grad.shape),
)
# Best first. triton comes after the reference, hence only by name, until a GPU has run it.
CANDIDATES = {"cpp": backends.needs_cpp, "reference": backends.always, "triton": backends.needs_gpu}


class _WindowReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, rings: list[float], by_count: bool, backend: str) -> Tensor:
        out, r = FWD(x, labels, rings, by_count, backend)
        ctx.save_for_backward(labels, r)
        ctx.constants = rings, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return BWD(grad, *ctx.saved_tensors, *ctx.constants), None, None, None, None


def window_reduce(
    x: Tensor,
    labels: Tensor,
    *,
    window: int = 5,
    sigma: float | None = None,
    normalize: Literal["count", "weight"] = "count",
    ignore_index: int = 255,
    backend: str | None = None,
) -> Tensor:
    r"""Weighted mean, around every pixel, of the pixels of its window that have its label.

    .. math:: f_p = \frac{1}{z_p} \sum_{q \in N(p)} [y_q = y_p]\, w_{pq} x_q, \quad
              w_{pq} = e^{-\|p - q\|_\infty^2 / (2 \sigma^2)}, \quad
              z_p = \sum_{q \in N(p)} [y_q = y_p] \;\text{ or }\; \sum_{q \in N(p)} [y_q = y_p]\, w_{pq}

    With scores and true labels it is the selective pooling of the locally adaptive learning loss (Guo et al., arXiv
    1802.08290, eq. 3), with superpixels as labels a smoothing that keeps their borders. At the image's border the
    window is cut off. Differentiable in ``x``: the gradient is the same sum, over what has been divided by ``z``.

    Cost: one read of ``x`` and ``labels``, one write of the result; B K H W window^2 additions.

    Args:
        x: :math:`(B, K, H, W)`, any strides, float32, float16, bfloat16 (float64 in ``cpp`` and ``reference``).
        labels: :math:`(B, H, W)`, any integers below 2**31; ``ignore_index`` and negative ones belong to no label.
        window: side of the window, odd; it may exceed the image.
        sigma: of the Gaussian of the chessboard distance, in pixels; infinity weighs all alike. By default a quarter
            of ``window - 1``, at least 0.5, so that the edge of a window of 3 or more weighs :math:`e^{-2}`.
        normalize: ``"count"`` divides by the number of pixels with the label, as published, so that pixels inside a
            label are scaled down; ``"weight"`` by their weights, which is a true mean.
        ignore_index: label of pixels that take no part.
        backend: ``"triton"``, ``"cpp"``, ``"reference"``, or ``None`` to choose.

    Returns:
        Means :math:`(B, K, H, W)` in the dtype of ``x``; sums are taken in float32. 0 where there is no label. A NaN
        spreads to the pixels of its label whose window holds it, and no further.

    Raises:
        ValueError: shapes that do not fit, two devices, an even ``window``, ``sigma`` not positive, an unknown
            ``normalize``.
        TypeError: ``x`` not floating, ``labels`` not integers.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> x = torch.tensor([[[[1.0, 3.0, 8.0]]]])
        >>> window_reduce(x, torch.tensor([[[0, 0, 1]]]), window=3, sigma=float("inf"))
        tensor([[[[2., 2., 8.]]]])
    """
    if x.ndim != 4 or labels.ndim != 3 or x.shape[0] != labels.shape[0] or x.shape[2:] != labels.shape[1:]:
        raise ValueError(
            "window_reduce: expected x (B, K, H, W) and labels (B, H, W), "
            f"got {tuple(x.shape)} and {tuple(labels.shape)}"
        )
    if window < 1 or window % 2 == 0:
        raise ValueError(f"window_reduce: expected an odd window >= 1, got {window}")
    if sigma is not None and not sigma > 0:
        raise ValueError(f"window_reduce: expected sigma > 0, got {sigma}")
    if normalize not in ("count", "weight"):
        raise ValueError(f"window_reduce: expected normalize 'count' or 'weight', got {normalize!r}")
    check_same("window_reduce", x=x)
    if labels.dtype in (*FLOATS, torch.bool) or labels.is_complex():
        raise TypeError(f"window_reduce: expected integer labels, got {str(labels.dtype).removeprefix('torch.')}")
    if labels.device != x.device:
        raise ValueError(f"window_reduce: expected one device, got x on {x.device}, labels on {labels.device}")
    name = backends.resolve("window_reduce", CANDIDATES, x, backend)
    constants = ring_weights(window, sigma), normalize == "count", name
    known = labels.to(torch.int32).masked_fill(labels == ignore_index, -1)
    if torch.is_grad_enabled() and x.requires_grad:
        return _WindowReduce.apply(x, known, *constants)
    return FWD(x, known, *constants)[0]


def ring_weights(window: int, sigma: float | None = None) -> list[float]:
    """The weight at each chessboard distance from the centre, 0 to ``window // 2``."""
    sigma = max(0.5, window // 2 / 2) if sigma is None else sigma
    return [math.exp(-((d / sigma) ** 2) / 2) for d in range(window // 2 + 1)]
