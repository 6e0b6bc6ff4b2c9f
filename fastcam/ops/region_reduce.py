"""Values of the pixels of every region, reduced to one."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcam import backends
from fastcam._checks import check_labels, check_same
from fastcam._library import op


def _fwd_fake(x: Tensor, labels: Tensor, num_regions: int, reduce: str, backend: str) -> tuple[Tensor, Tensor]:
    B, C = x.shape[:2]
    per_channel = (C,) if reduce == "max" else ()
    return (
        x.new_empty((B, num_regions, C)),
        labels.new_empty((B, num_regions, *per_channel), dtype=torch.int64),
    )


FWD = op(
    "region_reduce_fwd(Tensor x, Tensor labels, int num_regions, str reduce, str backend) -> (Tensor, Tensor)",
    fake=_fwd_fake,
)
BWD = op(
    "region_reduce_bwd(Tensor grad, Tensor labels, Tensor stat, str reduce, str backend) -> Tensor",
    fake=lambda grad, labels, *_: grad.new_empty((grad.shape[0], grad.shape[2], *labels.shape[1:])),
)
HIST = op(
    "region_reduce_hist(Tensor x, Tensor labels, int num_regions, int bins, float low, float high, str backend)"
    " -> Tensor",
    fake=lambda x, labels, num_regions, bins, *_: x.new_empty(
        (x.shape[0], num_regions, x.shape[1], bins), dtype=torch.int64
    ),
)
CANDIDATES = {"cpp": backends.needs_cpp, "reference": backends.always}
REDUCTIONS = ("mean", "sum", "max", "hist", "vote")


class _RegionReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, labels: Tensor, num_regions: int, reduce: str, backend: str) -> Tensor:
        out, stat = FWD(x, labels, num_regions, reduce, backend)
        ctx.save_for_backward(labels, stat)
        ctx.constants = reduce, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return BWD(grad, *ctx.saved_tensors, *ctx.constants), None, None, None, None


def region_reduce(
    values: Tensor,
    labels: Tensor,
    *,
    reduce: Literal["mean", "sum", "max", "hist", "vote"] = "mean",
    num_regions: int | None = None,
    bins: int = 16,
    range: tuple[float, float] = (0.0, 1.0),
    backend: str | None = None,
) -> Tensor:
    r"""One value a region and channel, from the pixels that carry the region's label.

    ``"mean"``, ``"sum"`` and ``"max"`` of floating values; ``"hist"``: how many values lie in each of ``bins`` equal
    parts of ``range``, what is outside counting in the first and last; ``"vote"``: the most frequent of integer values
    in [0, bins), the lower one where two are. Other integers (255, say) do not vote.

    Cost: one read of ``values``. ``mean``, ``sum`` and ``max`` are differentiable in ``values``; the gradient of a
    maximum goes to the first pixel, in scan order, that has it.

    Args:
        values: :math:`(B, C, H, W)`, any strides, float32, float16, bfloat16 (float64 in ``cpp`` and ``reference``);
            for ``"vote"`` of an integer dtype.
        labels: :math:`(B, H, W)`, integers. A negative label belongs to no region.
        num_regions: S; ``None`` takes the largest label plus one, for which a GPU has to be waited for.
        bins: for ``"hist"`` and ``"vote"``.
        range: lower and upper end for ``"hist"``.
        backend: ``"cpp"``, ``"reference"``, or ``None`` to choose.

    Returns:
        :math:`(B, S, C)` in the dtype of ``values``, sums taken in float32 or wider; of a region without pixels 0, and
        -inf as ``"max"``. A NaN makes its region's sum, mean and maximum NaN. ``"hist"``: int64
        :math:`(B, S, C, bins)`, NaN not counted. ``"vote"``: int64 :math:`(B, S, C)`, -1 where nobody votes.

    Raises:
        ValueError: shapes that do not fit, two devices, an unknown ``reduce``, ``bins`` not positive, an empty
            ``range``, labels of ``num_regions`` and above (on GPUs such pixels are left out instead).
        TypeError: values of a dtype that ``reduce`` does not take, labels that are no integers.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> values = torch.tensor([1.0, 2.0, 6.0, 4.0]).reshape(1, 1, 2, 2)
        >>> region_reduce(values, torch.tensor([[[0, 1], [1, 0]]]))
        tensor([[[2.5000],
                 [4.0000]]])
    """
    if values.ndim != 4 or labels.ndim != 3 or labels.shape != (values.shape[0], *values.shape[2:]):
        raise ValueError(
            "region_reduce: expected values (B, C, H, W) and labels (B, H, W), "
            f"got {tuple(values.shape)} and {tuple(labels.shape)}"
        )
    if reduce not in REDUCTIONS:
        raise ValueError(f"region_reduce: expected reduce in {REDUCTIONS}, got {reduce!r}")
    if bins < 1:
        raise ValueError(f"region_reduce: expected bins of at least 1, got {bins}")
    low, high = (float(end) for end in range)
    if not low < high:
        raise ValueError(f"region_reduce: expected a range that rises, got {tuple(range)}")
    if num_regions is not None and num_regions < 0:
        raise ValueError(f"region_reduce: expected num_regions >= 0, got {num_regions}")
    check_labels("region_reduce", labels=labels)
    if reduce == "vote":
        check_labels("region_reduce", values=values)
    else:
        check_same("region_reduce", values=values)
    if values.device != labels.device:
        raise ValueError(
            f"region_reduce: expected one device, got values on {values.device}, labels on {labels.device}"
        )
    name = backends.resolve("region_reduce", CANDIDATES, values, backend)
    if num_regions is None:
        num_regions = max(int(labels.max()) + 1, 0) if labels.numel() else 0
    if reduce in ("hist", "vote"):
        counts = HIST(values.detach(), labels, num_regions, bins, low, high, name)
        if reduce == "hist":
            return counts
        most, winner = counts.max(-1)
        return winner.masked_fill(most == 0, -1)
    if torch.is_grad_enabled() and values.requires_grad:
        return _RegionReduce.apply(values, labels, num_regions, reduce, name)
    return FWD(values, labels, num_regions, reduce, name)[0]
