"""Affinity of the pixels within a radius by the distance of their features (AffinityNet, also called PSA)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcam import backends
from fastcam._checks import check_same
from fastcam._library import op
from fastcam._paths import count


def _fwd_fake(features: Tensor, radius: int, margin: int, backend: str) -> Tensor:
    B, _, H, W = features.shape
    return features.new_empty((B, count(radius), H, W))


FWD = op("feature_affinity_fwd(Tensor features, int radius, int margin, str backend) -> Tensor", fake=_fwd_fake)
BWD = op(
    "feature_affinity_bwd(Tensor grad, Tensor features, Tensor out, int radius, int margin, str backend) -> Tensor",
    fake=lambda grad, features, out, radius, margin, backend: features.new_empty(features.shape),
)
# Best first. triton comes after the reference, hence only by name, until a GPU has run it.
CANDIDATES = {"cpp": backends.needs_cpp, "reference": backends.always, "triton": backends.needs_gpu}


class _FeatureAffinity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, radius: int, margin: int, backend: str) -> Tensor:
        out = FWD(features, radius, margin, backend)
        ctx.save_for_backward(features, out)
        ctx.constants = radius, margin, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return BWD(grad, *ctx.saved_tensors, *ctx.constants), None, None, None


def feature_affinity(
    features: Tensor, *, radius: int = 5, sources: Literal["all", "inner"] = "all", backend: str | None = None
) -> Tensor:
    r"""How alike the features of each pixel and its neighbours within a radius are.

    .. math:: a_{ij} = \exp\Big(-\frac{1}{D} \sum_d |f_{di} - f_{dj}|\Big)

    (AffinityNet, Ahn and Kwak, CVPR 2018; the mean over features is the published code's.) Pairs are numbered as
    in :func:`fastcam.path_affinity`.

    Cost: features are read once from memory and 2 P times from the cache; 3 P D H W operations. Differentiable in
    ``features``; features that are equal pass no gradient.

    Args:
        features: :math:`(B, D, H, W)`, any strides, float32, float16, bfloat16 (float64 in ``cpp`` and ``reference``).
            A NaN makes the pairs of its pixel NaN.
        radius: at least 1; destinations are nearer than that. It may exceed the image; radius 1 gives no pairs.
        sources: which pairs exist; all others have affinity 0. ``"all"``: those inside the image. ``"inner"``: those
            whose source is at least ``radius - 1`` away from the left, right and lower border, as in the published
            code, whose border pixels are reached as destinations only (ten pixels near the corners have no neighbours).
        backend: ``"cpp"``, ``"triton"``, ``"reference"``, or ``None`` to choose.

    Returns:
        Affinities :math:`(B, P, H, W)` in [0, 1], in the dtype of ``features``; sums are taken in float32.

    Raises:
        ValueError: a shape other than (B, D, H, W), no features, an image without pixels, a radius below 1, other
            ``sources``.
        TypeError: a dtype that is not floating.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> features = torch.tensor([0.0, 0.0, 1.0]).reshape(1, 1, 1, 3)
        >>> feature_affinity(features, radius=2)[:, 0]  # destination (0, 1)
        tensor([[[1.0000, 0.3679, 0.0000]]])
    """
    if features.ndim != 4 or 0 in features.shape[1:]:
        raise ValueError(
            f"feature_affinity: expected features (B, D, H, W) with D, H, W >= 1, got {tuple(features.shape)}"
        )
    if radius < 1:
        raise ValueError(f"feature_affinity: expected radius >= 1, got {radius}")
    if sources not in ("all", "inner"):
        raise ValueError(f"feature_affinity: expected sources 'all' or 'inner', got {sources!r}")
    check_same("feature_affinity", features=features)
    name = backends.resolve("feature_affinity", CANDIDATES, features, backend)
    margin = radius - 1 if sources == "inner" else 0
    if torch.is_grad_enabled() and features.requires_grad:
        return _FeatureAffinity.apply(features, radius, margin, name)
    return FWD(features, radius, margin, name)
