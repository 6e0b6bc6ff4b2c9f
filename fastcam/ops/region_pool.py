"""Weighted means of features over regions: prototypes, object-region features, masked average pooling."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcam import backends
from fastcam._checks import check_same
from fastcam._library import op


def _fwd_fake(x: Tensor, w: Tensor, normalize: str, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    B, K = w.shape[:2]
    return x.new_empty((B, K, x.shape[1])), x.new_empty((B, K), dtype=torch.promote_types(x.dtype, torch.float32))


FWD = op(
    "region_pool_fwd(Tensor x, Tensor w, str normalize, float eps, str backend) -> (Tensor, Tensor)", fake=_fwd_fake
)
BWD = op(
    "region_pool_bwd(Tensor grad, Tensor x, Tensor w, Tensor out, Tensor r, str normalize, str backend)"
    " -> (Tensor, Tensor)",
    fake=lambda grad, x, w, out, r, normalize, backend: (x.new_empty(x.shape), w.new_empty(w.shape)),
)
# Best first. triton comes after the reference, hence only by name, until a GPU has run it.
CANDIDATES = {"cpp": backends.needs_cpp, "reference": backends.always, "triton": backends.needs_gpu}


class _RegionPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, normalize: str, eps: float, backend: str) -> Tensor:
        out, r = FWD(x, w, normalize, eps, backend)
        ctx.save_for_backward(x, w, out, r)
        ctx.constants = normalize, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *BWD(grad, *ctx.saved_tensors, *ctx.constants), None, None, None


def region_pool(
    features: Tensor,
    weights: Tensor,
    *,
    normalize: Literal["sum", "softmax", "area"] | None = "sum",
    eps: float = 1e-8,
    backend: str | None = None,
) -> Tensor:
    r"""Weighted sum of the features of every region.

    .. math:: f_{bk} = \sum_n m_{bkn} x_{bn}, \quad m = \frac{w}{\sum_n w + \epsilon}, \; \mathrm{softmax}_n(w), \;
              \frac{w}{H W}, \text{ or } w

    ``"sum"`` is the masked average pooling of few-shot methods (PFENet: ``eps`` 0.0005 on its grid), ``"softmax"`` the
    gather of OCR (Yuan et al., ECCV 2020, eq. 2), ``"area"`` the prototypes of SFC.

    Cost: one read of ``features``, 2 B K H W D operations. Differentiable in both tensors.

    Args:
        features: :math:`(B, D, H, W)`, any strides, float32, float16, bfloat16 (float64 in ``cpp`` and ``reference``).
        weights: :math:`(B, K, H, W)`, the same dtype and device; logits for ``"softmax"``, which is over the pixels.
        normalize: what the weights of a region are divided by.
        eps: added to the sum under ``"sum"``, not negative.
        backend: ``"triton"``, ``"cpp"``, ``"reference"``, or ``None`` to choose.

    Returns:
        Region features :math:`(B, K, D)` in the dtype of ``features``; sums are taken in float32. A region without
        weight gives 0 for ``eps > 0``. A NaN in a region's weights makes all its features NaN, a NaN in a feature
        that feature of every region of its image, also of those that give its pixel no weight.

    Raises:
        ValueError: shapes that do not fit, two devices, an unknown ``normalize``, ``eps`` negative.
        TypeError: dtypes that are not floating or differ.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> features = torch.tensor([1.0, 2.0, 6.0]).reshape(1, 1, 1, 3)
        >>> region_pool(features, torch.tensor([1.0, 0.0, 1.0]).reshape(1, 1, 1, 3))
        tensor([[[3.5000]]])
    """
    if (
        features.ndim != 4
        or weights.ndim != 4
        or features.shape[0] != weights.shape[0]
        or features.shape[2:] != weights.shape[2:]
    ):
        raise ValueError(
            "region_pool: expected features (B, D, H, W) and weights (B, K, H, W), "
            f"got {tuple(features.shape)} and {tuple(weights.shape)}"
        )
    if normalize not in ("sum", "softmax", "area", None):
        raise ValueError(f"region_pool: expected normalize 'sum', 'softmax', 'area' or None, got {normalize!r}")
    if not eps >= 0:
        raise ValueError(f"region_pool: expected eps >= 0, got {eps}")
    check_same("region_pool", features=features, weights=weights)
    name = backends.resolve("region_pool", CANDIDATES, features, backend)
    mode = normalize or "none"
    if torch.is_grad_enabled() and (features.requires_grad or weights.requires_grad):
        return _RegionPool.apply(features, weights, mode, eps, name)
    return FWD(features, weights, mode, eps, name)[0]
