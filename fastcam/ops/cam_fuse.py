"""Fusion of the class activation maps of several views of an image into one map a class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcam import backends
from fastcam._checks import check_same
from fastcam._library import op


def _fwd_fake(
    cams: Sequence[Tensor], present: Tensor | None, flips: Any, size: Sequence[int], *_: Any
) -> tuple[Tensor, Tensor]:
    x = cams[0]
    work = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((*x.shape[:2], *size)), x.new_empty((*x.shape[:2], 2), dtype=work)


POLICY = (
    "Tensor? present, bool[] flips, SymInt[] size, SymInt[] grid, bool relu, str reduce, str? normalize, "
    "bool align_corners, float eps, str backend"
)
FWD = op(f"cam_fuse_fwd(Tensor[] cams, {POLICY}) -> (Tensor, Tensor)", fake=_fwd_fake)
BWD = op(
    f"cam_fuse_bwd(Tensor grad, Tensor[] cams, Tensor stats, {POLICY}) -> Tensor[]",
    fake=lambda grad, cams, *_: [cam.new_empty(cam.shape) for cam in cams],
)


def _in_float32(predicate: backends.Predicate) -> backends.Predicate:
    return lambda x: "it computes in float32, got float64" if x.dtype == torch.float64 else predicate(x)


# Best first. cuda and triton come after the reference, hence only by name, until a GPU has run them.
CANDIDATES = {
    "cpp": backends.needs_cpp,
    "reference": backends.always,
    "cuda": _in_float32(backends.needs_cuda),
    "triton": _in_float32(backends.needs_gpu),
}


class _CamFuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, present: Tensor | None, policy: tuple[Any, ...], *cams: Tensor) -> Tensor:
        out, stats = FWD(list(cams), present, *policy)
        ctx.save_for_backward(stats, present, *cams)
        ctx.policy = policy
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        stats, present, *cams = ctx.saved_tensors
        return None, None, *BWD(grad, cams, stats, present, *ctx.policy)


def cam_fuse(
    cams: Sequence[Tensor],
    size: tuple[int, int],
    *,
    grid: tuple[int, int] | None = None,
    flips: Sequence[bool] | None = None,
    present: Tensor | None = None,
    activation: Literal["relu"] | None = "relu",
    reduce: Literal["sum", "mean", "max"] = "sum",
    normalize: Literal["max", "minmax"] | None = "max",
    align_corners: bool = False,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    r"""One map a class from the maps of several views: activated, un-mirrored, resized, reduced over views, normalised.

    .. math::
        x_{bc} &= \operatorname{reduce}_s R\big(\operatorname{unmirror}_s(a(m^s_{bc}))\big) \\
        y_{bc} &= \frac{x_{bc}}{\max x_{bc} + \epsilon} \quad\text{or}\quad
        \frac{x_{bc} - \min x_{bc}}{\max x_{bc} - \min x_{bc} + \epsilon}

    :math:`R` is bilinear interpolation as :func:`torch.nn.functional.interpolate` does it, without antialiasing. The
    activation :math:`a` acts on the values of a view, before interpolation. The defaults are those of IRN's
    ``make_cam``; its full-size maps also need ``grid``, ``size`` rounded up to multiples of 16. ``normalize="minmax",
    eps=1e-8`` is MCTformer's. AFA's maximum of the two mirrored views and its ReLU after resizing are two calls: each
    pair at full size with ``activation=None, reduce="max", normalize=None``, then these maps with
    ``normalize="minmax"``.

    Cost: one read of the views and one write of the result, and 3 S H W multiply-adds for each present class and S
    sizes of views; no other array of the result's size in ``cpp``, ``triton`` and ``cuda`` for float32 (``cpp`` rounds
    a float32 result to 16 bits). Differentiable in ``cams``: the gradient of the maximum and of the minimum is shared
    evenly by the pixels that hold it; where views tie under ``reduce="max"``, the first takes it all.

    Args:
        cams: one tensor :math:`(B, C, h_s, w_s)` a view, any strides, float32, float16, bfloat16 (float64 in ``cpp``
            and ``reference``).
        size: :math:`(H, W)` of the result.
        grid: the size that views are resized to before its top left :math:`(H, W)` is cut out; ``size`` if ``None``.
            Maximum and minimum are those of the part cut out.
        flips: for each view, whether its image was mirrored horizontally; ``None``: none was.
        present: bool :math:`(B, C)`; absent classes give exactly 0, whatever their maps hold. ``None``: all are
            present.
        activation: ``"relu"`` clips negative values of the views to 0; ``None`` leaves them.
        reduce: ``"sum"``, ``"mean"`` or ``"max"`` over the views.
        normalize: ``"max"``, ``"minmax"`` or ``None``; a zero map stays 0 under all three. ``"max"`` is meant for maps
            that are somewhere positive.
        align_corners: as in :func:`torch.nn.functional.interpolate`.
        eps: positive, added to the divisor.
        backend: ``"cpp"``, ``"triton"``, ``"cuda"``, ``"reference"``, or ``None`` to choose.

    Returns:
        Fused maps :math:`(B, C, H, W)` in the dtype of ``cams``; sums are taken in float32. A NaN stays in its class,
        and makes all of it NaN if the class is normalised.

    Raises:
        ValueError: no view, shapes that do not fit, two devices, an unknown activation, reduction or normalisation,
            ``eps`` not positive.
        TypeError: dtypes that are not floating or differ, ``present`` not bool.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> view = torch.tensor([[[[0.0, 4.0]]]])
        >>> cam_fuse([view, view], (1, 4), flips=[False, True], normalize=None)
        tensor([[[[4., 4., 4., 4.]]]])
    """
    _check_shapes(cams, size, grid, flips, present)
    for name, value, choices in (
        ("activation", activation, ("relu", None)),
        ("reduce", reduce, ("sum", "mean", "max")),
        ("normalize", normalize, ("max", "minmax", None)),
    ):
        if value not in choices:
            raise ValueError(f"cam_fuse: expected {name} {', '.join(map(repr, choices))}, got {value!r}")
    if not eps > 0:
        raise ValueError(f"cam_fuse: expected eps > 0, got {eps}")
    check_same("cam_fuse", **{f"cams[{i}]": cam for i, cam in enumerate(cams)})
    if present is not None and present.dtype != torch.bool:
        raise TypeError(f"cam_fuse: expected present of dtype bool, got {str(present.dtype).removeprefix('torch.')}")
    if present is not None and present.device != cams[0].device:
        raise ValueError(f"cam_fuse: expected one device, got cams on {cams[0].device}, present on {present.device}")

    name = backends.resolve("cam_fuse", CANDIDATES, cams[0], backend)
    mirrored = [False] * len(cams) if flips is None else list(flips)
    policy = mirrored, list(size), list(grid or size), activation == "relu", reduce, normalize, align_corners, eps, name
    if torch.is_grad_enabled() and any(cam.requires_grad for cam in cams):
        return _CamFuse.apply(present, policy, *cams)
    return FWD(list(cams), present, *policy)[0]


def _check_shapes(
    cams: Sequence[Tensor],
    size: Sequence[int],
    grid: Sequence[int] | None,
    flips: Sequence[bool] | None,
    present: Tensor | None,
) -> None:
    if len(cams) == 0:
        raise ValueError("cam_fuse: expected at least one view in cams, got none")
    for i, cam in enumerate(cams):
        if cam.ndim != 4 or cam.shape[:2] != cams[0].shape[:2] or 0 in cam.shape[2:]:
            raise ValueError(
                f"cam_fuse: expected cams (B, C, h_s, w_s) with the same B and C and at least one pixel, got cams[{i}] "
                f"{tuple(cam.shape)} beside cams[0] {tuple(cams[0].shape)}"
            )
    if len(size) != 2 or size[0] < 1 or size[1] < 1:
        raise ValueError(f"cam_fuse: expected size (H, W) of at least (1, 1), got {tuple(size)}")
    if grid is not None and (len(grid) != 2 or grid[0] < size[0] or grid[1] < size[1]):
        raise ValueError(f"cam_fuse: expected grid (h, w) no smaller than size {tuple(size)}, got {tuple(grid)}")
    if flips is not None and len(flips) != len(cams):
        raise ValueError(f"cam_fuse: expected one flag in flips for each of {len(cams)} views, got {len(flips)}")
    if present is not None and present.shape != cams[0].shape[:2]:
        raise ValueError(f"cam_fuse: expected present (B, C) = {tuple(cams[0].shape[:2])}, got {tuple(present.shape)}")
