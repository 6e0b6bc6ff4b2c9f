"""Maps spread along the similarity of features: the pixel correlation module (PCM) of SEAM and SFC."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcam import backends
from fastcam._checks import check_same
from fastcam._library import op


def _fwd_fake(x: Tensor, f: Tensor, steps: int, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    work = torch.promote_types(x.dtype, torch.float32)
    between = x.new_empty((steps - 1, *x.shape), dtype=work)
    return x.new_empty(x.shape), between, x.new_empty((x.shape[0], *x.shape[2:]), dtype=work)


FWD = op(
    "correlation_propagate_fwd(Tensor x, Tensor f, int steps, float eps, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fwd_fake,
)
BWD = op(
    "correlation_propagate_bwd(Tensor grad, Tensor x, Tensor f, Tensor out, Tensor between, Tensor divisor, int steps,"
    " float eps, str backend) -> (Tensor, Tensor)",
    fake=lambda grad, x, f, out, between, divisor, steps, eps, backend: (x.new_empty(x.shape), f.new_empty(f.shape)),
)
# Best first. triton comes after the reference, hence only by name, until a GPU has run it.
CANDIDATES = {"cpp": backends.needs_cpp, "reference": backends.always, "triton": backends.needs_gpu}


class _CorrelationPropagate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, f: Tensor, steps: int, eps: float, backend: str) -> Tensor:
        out, between, divisor = FWD(x, f, steps, eps, backend)
        ctx.save_for_backward(x, f, out, between, divisor)
        ctx.constants = steps, eps, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *BWD(grad, *ctx.saved_tensors, *ctx.constants), None, None, None


def correlation_propagate(
    maps: Tensor, features: Tensor, *, steps: int = 1, eps: float = 1e-5, backend: str | None = None
) -> Tensor:
    r"""Propagates maps by the affinity of features, which is never formed.

    .. math:: g = \frac{f}{\|f\|_2 + \epsilon},\quad R = \mathrm{ReLU}(g^\top g),\quad
              A_{ij} = \frac{R_{ij}}{\sum_i R_{ij} + \epsilon},\quad M' = M A \cdots A

    (SEAM, Wang et al., CVPR 2020, eq. 5, with one step; SFC uses two.) Every result is a weighted mean of the input, so
    constants stay.

    Cost, N = H W: ``2 B N^2 (D + C)`` operations a step, and as many as ``steps + 1`` steps for the gradient. Memory:
    copies of the features, never the N x N affinity; ``reference`` and the gradient of ``triton`` make 64 MiB of it at
    a time. Differentiable in both tensors.

    Args:
        maps: :math:`(B, C, H, W)`, any strides, float32, float16, bfloat16 (float64 in ``cpp`` and ``reference``).
        features: :math:`(B, D, H, W)`, unnormalised, the same dtype and device.
        steps: number of multiplications, at least 1.
        eps: added to norms and sums, positive.
        backend: ``"triton"``, ``"cpp"``, ``"reference"``, or ``None`` to choose.

    Returns:
        :math:`(B, C, H, W)` in the dtype of ``maps``; sums are taken in float32. A pixel whose feature is zero gives 0
        and adds nothing to others. A NaN feature makes its whole image NaN, a NaN in a
        map that map.

    Raises:
        ValueError: shapes that do not fit, two devices, ``steps`` below 1, ``eps`` not positive.
        TypeError: dtypes that are not floating or differ.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> features = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).reshape(1, 2, 1, 3)
        >>> correlation_propagate(torch.tensor([1.0, 0.0, 3.0]).reshape(1, 1, 1, 3), features).round(decimals=3)
        tensor([[[[0.5000, 0.5000, 3.0000]]]])
    """
    if (
        maps.ndim != 4
        or features.ndim != 4
        or maps.shape[0] != features.shape[0]
        or maps.shape[2:] != features.shape[2:]
    ):
        raise ValueError(
            "correlation_propagate: expected maps (B, C, H, W) and features (B, D, H, W), "
            f"got {tuple(maps.shape)} and {tuple(features.shape)}"
        )
    if steps < 1:
        raise ValueError(f"correlation_propagate: expected steps >= 1, got {steps}")
    if not eps > 0:
        raise ValueError(f"correlation_propagate: expected eps > 0, got {eps}")
    check_same("correlation_propagate", maps=maps, features=features)
    name = backends.resolve("correlation_propagate", CANDIDATES, maps, backend)
    if torch.is_grad_enabled() and (maps.requires_grad or features.requires_grad):
        return _CorrelationPropagate.apply(maps, features, steps, eps, name)
    return FWD(maps, features, steps, eps, name)[0]
