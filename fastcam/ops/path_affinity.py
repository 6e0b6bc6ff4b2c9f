"""Affinity of the pixels within a radius by the strongest boundary on the way from one to the other (IRN)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcam import backends
from fastcam._checks import check_same
from fastcam._library import op
from fastcam._paths import count


def _fwd_fake(edge: Tensor, radius: int, backend: str) -> Tensor:
    B, H, W = edge.shape
    return edge.new_empty((B, count(radius), H, W))


FWD = op("path_affinity_fwd(Tensor edge, int radius, str backend) -> Tensor", fake=_fwd_fake)
BWD = op(
    "path_affinity_bwd(Tensor grad, Tensor edge, int radius, str backend) -> Tensor",
    fake=lambda grad, edge, radius, backend: edge.new_empty(edge.shape),
)
# Best first. triton comes after the reference, hence only by name, until a GPU has run it.
CANDIDATES = {"cpp": backends.needs_cpp, "reference": backends.always, "triton": backends.needs_gpu}


class _PathAffinity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, edge: Tensor, radius: int, backend: str) -> Tensor:
        ctx.save_for_backward(edge)
        ctx.constants = radius, backend
        return FWD(edge, radius, backend)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return BWD(grad, *ctx.saved_tensors, *ctx.constants), None, None


def path_affinity(edge: Tensor, *, radius: int = 5, backend: str | None = None) -> Tensor:
    r"""How little boundary lies between each pixel and its neighbours within a radius.

    .. math:: a_{ij} = 1 - \max_{k \in \Pi_{ij}} e_k

    with :math:`\Pi_{ij}` the pixels on the straight way from i to j, both included: those of the bounding box that are
    nearer than 1 to the line (IRN, Ahn, Cho and Kwak, CVPR 2019). Pairs are in IRN's order, which
    :func:`fastcam._paths.destinations` lists: plane p, pixel (y, x) is the pair of (y, x) and (y, x) plus the p-th
    destination, to the right or below; the other half is the same by symmetry. P is 12, 34, 152 for radius 3, 5, 10.

    A pair whose destination lies outside the image has affinity 0, which is what IRN's padding with boundaries comes
    to. IRN trains on the pairs of an inner window: ``path_affinity(edge)[:, :, : H - 4, 4 : W - 4]`` for radius 5.

    Cost: one read of ``edge``, one write of P planes, 242 comparisons a pixel for radius 5. Differentiable in ``edge``:
    the gradient of a pair goes to the pixel that holds the maximum; of several, to the first counted from the
    destination (by decreasing :math:`|dy| + |dx|` from the source).

    Args:
        edge: boundary probability :math:`(B, H, W)`, any strides, float32, float16, bfloat16 (float64 in ``cpp`` and
            ``reference``). Values outside [0, 1] count as 0 or 1 and get no gradient. A NaN makes the pairs whose path
            touches it NaN; those pass no gradient.
        radius: at least 1; destinations are nearer than that. It may exceed the image; radius 1 gives no pairs.
        backend: ``"cpp"``, ``"triton"``, ``"reference"``, or ``None`` to choose.

    Returns:
        Affinities :math:`(B, P, H, W)` in [0, 1], in the dtype of ``edge``.

    Raises:
        ValueError: a shape other than (B, H, W), an image without pixels, a radius below 1.
        TypeError: a dtype that is not floating.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> path_affinity(torch.tensor([[[0.0, 0.75, 0.0]]]), radius=3)[:, [0, 2]]  # destinations (0, 1) and (0, 2)
        tensor([[[[0.2500, 0.2500, 0.0000]],
        <BLANKLINE>
                 [[0.2500, 0.0000, 0.0000]]]])
    """
    if edge.ndim != 3 or 0 in edge.shape[1:]:
        raise ValueError(f"path_affinity: expected edge (B, H, W) with H, W >= 1, got {tuple(edge.shape)}")
    if radius < 1:
        raise ValueError(f"path_affinity: expected radius >= 1, got {radius}")
    check_same("path_affinity", edge=edge)
    name = backends.resolve("path_affinity", CANDIDATES, edge, backend)
    if torch.is_grad_enabled() and edge.requires_grad:
        return _PathAffinity.apply(edge, radius, name)
    return FWD(edge, radius, name)
