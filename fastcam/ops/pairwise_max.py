"""Best match of every query feature over all support features: the prior mask of few-shot methods."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcam import backends
from fastcam._checks import check_same
from fastcam._library import op


def _fwd_fake(
    query: Tensor, support: Tensor, mask: Tensor | None, cosine: bool, eps: float, backend: str
) -> tuple[Tensor, Tensor]:
    size = query.shape[0], query.shape[2]
    return query.new_empty(size), query.new_empty(size, dtype=torch.int64)


FWD = op(
    "pairwise_max_fwd(Tensor query, Tensor support, Tensor? mask, bool cosine, float eps, str backend)"
    " -> (Tensor, Tensor)",
    fake=_fwd_fake,
)
BWD = op(
    "pairwise_max_bwd(Tensor grad, Tensor query, Tensor support, Tensor indices, bool cosine, float eps, str backend)"
    " -> (Tensor, Tensor)",
    fake=lambda grad, query, support, indices, cosine, eps, backend: (
        query.new_empty(query.shape),
        support.new_empty(support.shape),
    ),
)
# Best first. triton comes after the reference, hence only by name, until a GPU has run it.
CANDIDATES = {"cpp": backends.needs_cpp, "reference": backends.always, "triton": backends.needs_gpu}


class _PairwiseMax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, support: Tensor, mask: Tensor | None, cosine: bool, eps: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        values, indices = FWD(query, support, mask, cosine, eps, backend)
        ctx.save_for_backward(query, support, indices)
        ctx.mark_non_differentiable(indices)
        ctx.constants = cosine, eps, backend
        return values, indices

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *BWD(grad, *ctx.saved_tensors, *ctx.constants), None, None, None, None


def pairwise_max(
    query: Tensor,
    support: Tensor,
    *,
    mask: Tensor | None = None,
    metric: Literal["cosine", "dot"] = "cosine",
    eps: float = 1e-7,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Largest similarity of every query feature with any support feature, and which one it is.

    .. math:: v_{bi} = \max_{j : \mathrm{mask}_{bj}} \frac{q_{bi} \cdot s_{bj}}{\|q_{bi}\|\,\|s_{bj}\| + \epsilon}

    or the largest product ``q . s`` for ``metric="dot"``. PFENet's prior mask (Tian et al., TPAMI 2020, eq. 3) before
    its min-max normalisation.

    Cost: 2 B N M D operations (masked support is left out by ``cpp``); the N x M similarities are never stored, or
    64 MiB of them at a time by ``reference``. Differentiable in both features: the gradient goes to the best match
    alone. Its sums have a fixed order in ``cpp`` and ``triton``; ``reference`` on a GPU follows
    ``torch.use_deterministic_algorithms``.

    Args:
        query: :math:`(B, D, N)`, any strides, float32, float16, bfloat16 (float64 in ``cpp`` and ``reference``).
        support: :math:`(B, D, M)`, the same dtype and device.
        mask: bool :math:`(B, M)`, which support features take part; ``None``: all.
        metric: ``"cosine"`` or ``"dot"``.
        eps: added to the product of the norms, positive.
        backend: ``"triton"``, ``"cpp"``, ``"reference"``, or ``None`` to choose.

    Returns:
        Values :math:`(B, N)` in the dtype of ``query``; sums are taken in float32. Indices, int64 :math:`(B, N)`; of
        equal similarities the smallest index. An image without support (M = 0, or all of it masked) gives value 0,
        index -1 and no gradient. A zero feature has cosine 0. A NaN counts as larger than any number.

    Raises:
        ValueError: shapes that do not fit, two devices, an unknown metric, ``eps`` not positive.
        TypeError: dtypes that are not floating or differ, a mask that is not bool.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> query = torch.tensor([[[3.0, 0.0], [4.0, 1.0]]])  # (3, 4) and (0, 1)
        >>> pairwise_max(query, torch.tensor([[[1.0, 0.0], [0.0, 2.0]]]))  # with (1, 0) and (0, 2)
        (tensor([[0.8000, 1.0000]]), tensor([[1, 1]]))
    """
    if query.ndim != 3 or support.ndim != 3 or query.shape[:2] != support.shape[:2]:
        raise ValueError(
            "pairwise_max: expected query (B, D, N) and support (B, D, M), "
            f"got {tuple(query.shape)} and {tuple(support.shape)}"
        )
    if metric not in ("cosine", "dot"):
        raise ValueError(f"pairwise_max: expected metric 'cosine' or 'dot', got {metric!r}")
    if not eps > 0:
        raise ValueError(f"pairwise_max: expected eps > 0, got {eps}")
    check_same("pairwise_max", query=query, support=support)
    if mask is not None:
        if mask.shape != (support.shape[0], support.shape[2]):
            raise ValueError(
                f"pairwise_max: expected mask (B, M) = {(support.shape[0], support.shape[2])}, got {tuple(mask.shape)}"
            )
        if mask.dtype != torch.bool:
            raise TypeError(f"pairwise_max: expected mask of dtype bool, got {str(mask.dtype).removeprefix('torch.')}")
        if mask.device != query.device:
            raise ValueError(f"pairwise_max: expected one device, got query on {query.device}, mask on {mask.device}")
    name = backends.resolve("pairwise_max", CANDIDATES, query, backend)
    cosine = metric == "cosine"
    if torch.is_grad_enabled() and (query.requires_grad or support.requires_grad):
        return _PairwiseMax.apply(query, support, mask, cosine, eps, name)
    return FWD(query, support, mask, cosine, eps, name)
