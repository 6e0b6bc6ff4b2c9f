"""Cosine similarity of every pixel's feature with every prototype."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcam import backends
from fastcam._checks import check_same
from fastcam._library import op


def _fwd_fake(x: Tensor, p: Tensor, relu: bool, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    B, _, H, W = x.shape
    work = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((B, p.shape[-2], H, W)), x.new_empty((B, H, W), dtype=work)


FWD = op(
    "prototype_similarity_fwd(Tensor x, Tensor p, bool relu, float eps, str backend) -> (Tensor, Tensor)",
    fake=_fwd_fake,
)
BWD = op(
    "prototype_similarity_bwd(Tensor grad, Tensor x, Tensor p, Tensor out, Tensor r, bool relu, float eps, str backend)"
    " -> (Tensor, Tensor)",
    fake=lambda grad, x, p, out, r, relu, eps, backend: (x.new_empty(x.shape), p.new_empty(p.shape)),
)
# Best first. triton comes after the reference, hence only by name, until a GPU has run it.
CANDIDATES = {"cpp": backends.needs_cpp, "reference": backends.always, "triton": backends.needs_gpu}


class _PrototypeSimilarity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: Tensor, relu: bool, eps: float, backend: str) -> Tensor:
        out, r = FWD(x, p, relu, eps, backend)
        ctx.save_for_backward(x, p, out, r)
        ctx.constants = relu, eps, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *BWD(grad, *ctx.saved_tensors, *ctx.constants), None, None, None


def prototype_similarity(
    features: Tensor,
    prototypes: Tensor,
    *,
    activation: Literal["relu"] | None = None,
    eps: float = 1e-12,
    backend: str | None = None,
) -> Tensor:
    r"""Cosine similarity of every pixel's feature with every prototype.

    .. math:: s_{bkn} = \frac{x_{bn} \cdot p_{bk}}{\max(\|x_{bn}\|, \epsilon)\,\max(\|p_{bk}\|, \epsilon)}

    Cost: one read of ``features``, one write of the result, B H W (K + 1) D multiply-adds; no copy of the features.
        Differentiable in
    both tensors.

    Args:
        features: :math:`(B, D, H, W)`, any strides, float32, float16, bfloat16 (float64 in ``cpp`` and ``reference``).
        prototypes: :math:`(K, D)`, shared by all images, or :math:`(B, K, D)`; same dtype and device.
        activation: ``"relu"`` clips negative similarities to 0.
        eps: lower bound of the norms, positive.
        backend: ``"triton"``, ``"cpp"``, ``"reference"``, or ``None`` to choose.

    Returns:
        Similarities :math:`(B, K, H, W)` in the dtype of ``features``; sums are taken in float32. Zero features and
        zero prototypes give 0.

    Raises:
        ValueError: shapes that do not fit, two devices, an unknown activation, ``eps`` not positive.
        TypeError: dtypes that are not floating or differ.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> features = torch.tensor([[3.0, 0.0], [4.0, 0.0]]).reshape(1, 2, 1, 2)
        >>> prototype_similarity(features, torch.tensor([[2.0, 0.0]]))
        tensor([[[[0.6000, 0.0000]]]])
    """
    if features.ndim != 4 or prototypes.ndim not in (2, 3) or features.shape[1] != prototypes.shape[-1]:
        raise ValueError(
            "prototype_similarity: expected features (B, D, H, W) and prototypes (K, D) or (B, K, D), "
            f"got {tuple(features.shape)} and {tuple(prototypes.shape)}"
        )
    if prototypes.ndim == 3 and features.shape[0] != prototypes.shape[0]:
        raise ValueError(
            f"prototype_similarity: expected as many sets of prototypes as images, got {prototypes.shape[0]} sets "
            f"for {features.shape[0]} images"
        )
    if activation not in (None, "relu"):
        raise ValueError(f"prototype_similarity: expected activation None or 'relu', got {activation!r}")
    if not eps > 0:
        raise ValueError(f"prototype_similarity: expected eps > 0, got {eps}")
    check_same("prototype_similarity", features=features, prototypes=prototypes)
    name = backends.resolve("prototype_similarity", CANDIDATES, features, backend)
    relu = activation == "relu"
    if torch.is_grad_enabled() and (features.requires_grad or prototypes.requires_grad):
        return _PrototypeSimilarity.apply(features, prototypes, relu, eps, name)
    return FWD(features, prototypes, relu, eps, name)[0]
