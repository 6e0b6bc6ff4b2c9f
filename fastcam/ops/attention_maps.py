"""Attention that also sums its mean over heads: the class-to-patch and patch-to-patch maps of vision transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcam import backends
from fastcam._checks import check_same
from fastcam._library import op


def _fwd_fake(
    q: Tensor, k: Tensor, v: Tensor, total: Tensor | None, rows: int, skip: int, scale: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    work = torch.promote_types(q.dtype, torch.float32)
    maps = q.new_empty((q.shape[0], rows, k.shape[2] - skip), dtype=work)
    return q.new_empty(q.shape), maps, q.new_empty(q.shape[:3], dtype=work)


FWD = op(
    "attention_maps_fwd(Tensor q, Tensor k, Tensor v, Tensor? total, int rows, int skip, float scale, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    fake=_fwd_fake,
)
BWD = op(
    "attention_maps_bwd(Tensor grad, Tensor? grad_maps, Tensor q, Tensor k, Tensor v, Tensor lse, int skip,"
    " float scale, str backend) -> (Tensor, Tensor, Tensor)",
    fake=lambda grad, grad_maps, q, k, v, lse, skip, scale, backend: tuple(t.new_empty(t.shape) for t in (q, k, v)),
)
# Best first. triton comes after the reference, hence only by name, until a GPU has run it.
CANDIDATES = {"cpp": backends.needs_cpp, "reference": backends.always, "triton": backends.needs_gpu}


class _AttentionMaps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, total: Tensor | None, rows: int, skip: int, scale: float,
        backend: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, maps, lse = FWD(q, k, v, total, rows, skip, scale, backend)
        ctx.save_for_backward(q, k, v, lse)
        ctx.constants = skip, scale, backend
        ctx.set_materialize_grads(False)  # a loss on the attention alone leaves the maps' part out
        return out, maps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, grad_maps: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, lse = ctx.saved_tensors
        if grad is None and grad_maps is None:
            return (None,) * 8
        grad = torch.zeros_like(q) if grad is None else grad
        grad_total = grad_maps if ctx.needs_input_grad[3] else None
        return *BWD(grad, grad_maps, q, k, v, lse, *ctx.constants), grad_total, None, None, None, None


def attention_maps(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    total: Tensor | None = None,
    *,
    rows: int | None = None,
    skip: int = 0,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Attention, and the mean of its weights over the heads, added to that of the blocks before.

    .. math:: A_{bhn\cdot} = \mathrm{softmax}(\sigma\, q_{bhn} k_{bh}^\top), \quad o = A v, \quad
              m_{bnj} = t_{bnj} + \frac{1}{H} \sum_h A_{bhnj}

    Transformers with class tokens read class activation maps and patch affinities off sums of m over their blocks
    (MCTformer, L. Xu et al., CVPR 2022; CTI, S.-H. Yoon et al., CVPR 2024). Keeping every block's A for that takes
    B H N M numbers a block; here only the sum exists, and the backward pass computes A again.

    Cost: 4 B H N M d operations, backward 10; saved for backward are the inputs and B H N numbers. ``cpp`` and
    ``triton`` never store A, ``reference`` stores one block's at a time. Differentiable in ``q``, ``k``, ``v`` and
    ``total`` through both results. ``cpp`` and ``triton`` sum in a fixed order.

    Args:
        q: queries :math:`(B, H, N, d)`, any strides, float32, float16, bfloat16 (float64 in ``cpp`` and ``reference``).
        k: keys :math:`(B, H, M, d)`, same dtype and device; at least one key, head and channel.
        v: values :math:`(B, H, M, d)`.
        total: what is added to the maps, :math:`(B, \mathrm{rows}, M - \mathrm{skip})` in the maps' dtype; ``None``
            adds nothing.
        rows: maps of the first ``rows`` queries only; ``None``: of all.
        skip: the maps leave out the first ``skip`` keys (the class tokens).
        scale: :math:`\sigma`; ``None``: :math:`d^{-1/2}`.
        backend: ``"triton"``, ``"cpp"``, ``"reference"``, or ``None`` to choose.

    Returns:
        Attention :math:`(B, H, N, d)` in the dtype of ``q``, and maps :math:`(B, \mathrm{rows}, M - \mathrm{skip})`
        in float32 (float64 for float64), whose rows over all keys sum to 1 for each block. NaN in a query stays in
        its row; NaN in a key or value reaches every query.

    Raises:
        ValueError: shapes that do not fit, no key, head or channel, ``rows`` or ``skip`` out of range, two devices.
        TypeError: dtypes that are not floating or differ; ``total`` of another dtype than the maps.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> q = k = v = torch.zeros(1, 2, 3, 4)
        >>> out, maps = attention_maps(q, k, v, rows=1, skip=1)
        >>> maps
        tensor([[[0.3333, 0.3333]]])
    """
    if q.ndim != 4 or k.shape != v.shape or (*q.shape[:2], q.shape[3]) != (*k.shape[:2], k.shape[-1]) or k.ndim != 4:
        raise ValueError(
            f"attention_maps: expected q (B, H, N, d) and k, v (B, H, M, d), got {tuple(q.shape)}, {tuple(k.shape)} "
            f"and {tuple(v.shape)}"
        )
    B, H, N, d = q.shape
    M = k.shape[2]
    if min(H, M, d) == 0:
        raise ValueError(f"attention_maps: expected at least one head, key and channel, got {H}, {M} and {d}")
    rows = N if rows is None else rows
    if not 0 <= rows <= N or not 0 <= skip <= M:
        raise ValueError(
            f"attention_maps: expected rows in 0..{N} (queries) and skip in 0..{M} (keys), got {rows} and {skip}"
        )
    if total is not None and total.shape != (B, rows, M - skip):
        raise ValueError(f"attention_maps: expected total {(B, rows, M - skip)}, got {tuple(total.shape)}")
    check_same("attention_maps", q=q, k=k, v=v)
    work = torch.promote_types(q.dtype, torch.float32)
    if total is not None and (total.dtype != work or total.device != q.device):
        raise TypeError(
            f"attention_maps: expected total in {str(work).removeprefix('torch.')} on {q.device}, "
            f"got {str(total.dtype).removeprefix('torch.')} on {total.device}"
        )
    name = backends.resolve("attention_maps", CANDIDATES, q, backend)
    scale = d**-0.5 if scale is None else scale
    inputs = (q, k, v) if total is None else (q, k, v, total)
    if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
        return _AttentionMaps.apply(q, k, v, total, rows, skip, scale, name)
    return FWD(q, k, v, total, rows, skip, scale, name)[:2]
