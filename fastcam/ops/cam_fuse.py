"""Fusion of the class activation maps of several views of an image into one map a class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcam import backends
from fastcam._checks import FLOATS, check_same
from fastcam._library import op


def _fwd_fake(
    cams: Sequence[Tensor], present: Tensor | None, flips: Any, size: Sequence[int], *_: Any
) -> tuple[Tensor, Tensor]:
    x = cams[0]
    work = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty((*x.shape[:2], *size)), x.new_empty((*x.shape[:2], 2), dtype=work)


Activation = Literal["relu", "resized_relu", "fused_relu"]
Reduce = Literal["sum", "mean", "max", "pair_max"]
Normalize = Literal["max", "minmax", "seam"]
# A call takes some 30 us, most of it Python: what can be looked up once is.
ACTIVATIONS, REDUCTIONS, NORMALIZATIONS = (*get_args(Activation), None), get_args(Reduce), (*get_args(Normalize), None)
POLICY = (
    "Tensor? present, bool[] flips, SymInt[] size, SymInt[] grid, str? activation, str reduce, str? normalize, "
    "bool align_corners, float eps, str backend"
)
FWD = op(f"cam_fuse_fwd(Tensor[] cams, {POLICY}) -> (Tensor, Tensor)", fake=_fwd_fake)
BWD = op(
    f"cam_fuse_bwd(Tensor grad, Tensor[] cams, Tensor stats, {POLICY}) -> Tensor[]",
    fake=lambda grad, cams, *_: [cam.new_empty(cam.shape) for cam in cams],
)


def only_float32(predicate: backends.Predicate) -> backends.Predicate:
    """``predicate`` for backends that compute in float32."""
    return lambda x: "it computes in float32, got float64" if x.dtype == torch.float64 else predicate(x)


# Best first. cuda and triton come after the reference, hence only by name, until a GPU has run them.
CANDIDATES = {
    "cpp": backends.needs_cpp,
    "reference": backends.always,
    "cuda": only_float32(backends.needs_cuda),
    "triton": only_float32(backends.needs_gpu),
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
    activation: Activation | None = "relu",
    reduce: Reduce = "sum",
    normalize: Normalize | None = "max",
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
    activation :math:`a` acts on the values of a view before interpolation, after it, or on the reduced map. The
    defaults are those of IRN's ``make_cam``; its full-size maps also need ``grid``, ``size`` rounded up to multiples of
    16. :class:`fastcam.nn.CamFusion` knows the policies of published systems by name.

    Cost: one read of the views and one write of the result, and at most 3 S H W multiply-adds for each present class
    and S sizes of views; no other array of the result's size in ``cpp``, ``triton`` and ``cuda`` for float32 (``cpp``
    rounds a float32 result to 16 bits). Differentiable in ``cams``: the gradient of the maximum and of the minimum is
    shared evenly by the pixels that hold it; where views tie under ``reduce="max"`` or ``"pair_max"``, the first takes
    it all.

    Args:
        cams: one tensor :math:`(B, C, h_s, w_s)` a view, any strides, float32, float16, bfloat16 (float64 in ``cpp``
            and ``reference``).
        size: :math:`(H, W)` of the result.
        grid: the size that views are resized to before its top left :math:`(H, W)` is cut out; ``size`` if ``None``.
            Maximum and minimum are those of the part cut out.
        flips: for each view, whether its image was mirrored horizontally; ``None``: none was.
        present: bool :math:`(B, C)`; absent classes give exactly 0, whatever their maps hold. ``None``: all are
            present.
        activation: where negative values are clipped to 0: ``"relu"`` in the views (IRN, PSA), ``"resized_relu"`` in
            the views after interpolation (AFA, ToCo), ``"fused_relu"`` in the reduced map (SEAM); ``None`` leaves them.
        reduce: ``"sum"``, ``"mean"`` or ``"max"`` over the views, or ``"pair_max"``: the larger of an image's map and
            that of its mirror image, which follow each other, summed over these pairs (AFA, ToCo).
        normalize: ``"max"``, ``"minmax"``, ``"seam"`` or ``None``. ``"seam"`` is ``"minmax"`` of what is left when
            values below :math:`\min x + \epsilon` are put to 0, less :math:`\epsilon` in the numerator. A zero map
            stays 0, under ``"seam"`` it becomes -1, as published. ``"max"`` is meant for maps that are somewhere
            positive.
        align_corners: as in :func:`torch.nn.functional.interpolate`.
        eps: positive, added to the divisor.
        backend: ``"cpp"``, ``"triton"``, ``"cuda"``, ``"reference"``, or ``None`` to choose.

    Returns:
        Fused maps :math:`(B, C, H, W)` in the dtype of ``cams``; sums are taken in float32. A NaN stays in its class,
        and makes all of it NaN if the class is normalised.

    Raises:
        ValueError: no view, shapes that do not fit, two devices, an unknown activation, reduction or normalisation,
            an odd number of views under ``"pair_max"``, ``eps`` not positive.
        TypeError: dtypes that are not floating or differ, ``present`` not bool.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> view = torch.tensor([[[[0.0, 4.0]]]])
        >>> cam_fuse([view, view], (1, 4), flips=[False, True], normalize=None)
        tensor([[[[4., 4., 4., 4.]]]])
    """
    name, policy = fusion_policy(
        "cam_fuse", CANDIDATES, cams, size, grid, flips, present, activation, reduce, normalize, align_corners, eps,
        backend,
    )  # fmt: skip
    if torch.is_grad_enabled() and any(cam.requires_grad for cam in cams):
        return _CamFuse.apply(present, (*policy, name), *cams)
    return FWD(list(cams), present, *policy, name)[0]


def fusion_policy(
    op: str, candidates: Mapping[str, backends.Predicate], cams: Sequence[Tensor], size: Sequence[int],
    grid: Sequence[int] | None, flips: Sequence[bool] | None, present: Tensor | None, activation: str | None,
    reduce: str, normalize: str | None, align_corners: bool, eps: float, backend: str | None,
) -> tuple[str, tuple[Any, ...]]:  # fmt: skip
    """Checks of the arguments that ``op`` shares with :func:`cam_fuse`; the backend, and what schemas take."""
    _check_shapes(op, cams, size, grid, flips, present)
    for name, value, choices in (
        ("activation", activation, ACTIVATIONS),
        ("reduce", reduce, REDUCTIONS),
        ("normalize", normalize, NORMALIZATIONS),
    ):
        if value not in choices:
            raise ValueError(f"{op}: expected {name} {', '.join(map(repr, choices))}, got {value!r}")
    if reduce == "pair_max" and len(cams) % 2:
        raise ValueError(f"{op}: expected an even number of views under reduce 'pair_max', got {len(cams)}")
    if not eps > 0:
        raise ValueError(f"{op}: expected eps > 0, got {eps}")
    first = cams[0]
    same = all(cam.dtype is first.dtype and cam.device == first.device for cam in cams)
    if not same or first.dtype not in FLOATS:  # the names, which take time, only for the message
        check_same(op, **{f"cams[{i}]": cam for i, cam in enumerate(cams)})
    if present is not None and present.dtype != torch.bool:
        raise TypeError(f"{op}: expected present of dtype bool, got {str(present.dtype).removeprefix('torch.')}")
    if present is not None and present.device != cams[0].device:
        raise ValueError(f"{op}: expected one device, got cams on {cams[0].device}, present on {present.device}")

    mirrored = [False] * len(cams) if flips is None else list(flips)
    policy = mirrored, list(size), list(grid or size), activation, reduce, normalize, align_corners, eps
    return backends.resolve(op, candidates, cams[0], backend), policy


def _check_shapes(
    op: str,
    cams: Sequence[Tensor],
    size: Sequence[int],
    grid: Sequence[int] | None,
    flips: Sequence[bool] | None,
    present: Tensor | None,
) -> None:
    if len(cams) == 0:
        raise ValueError(f"{op}: expected at least one view in cams, got none")
    shapes = [cam.shape for cam in cams]
    for i, shape in enumerate(shapes):
        if len(shape) != 4 or shape[0] != shapes[0][0] or shape[1] != shapes[0][1] or not shape[2] or not shape[3]:
            raise ValueError(
                f"{op}: expected cams (B, C, h_s, w_s) with the same B and C and at least one pixel, got cams[{i}] "
                f"{tuple(shape)} beside cams[0] {tuple(shapes[0])}"
            )
    if len(size) != 2 or size[0] < 1 or size[1] < 1:
        raise ValueError(f"{op}: expected size (H, W) of at least (1, 1), got {tuple(size)}")
    if grid is not None and (len(grid) != 2 or grid[0] < size[0] or grid[1] < size[1]):
        raise ValueError(f"{op}: expected grid (h, w) no smaller than size {tuple(size)}, got {tuple(grid)}")
    if flips is not None and len(flips) != len(cams):
        raise ValueError(f"{op}: expected one flag in flips for each of {len(cams)} views, got {len(flips)}")
    if present is not None and present.shape != cams[0].shape[:2]:
        raise ValueError(f"{op}: expected present (B, C) = {tuple(cams[0].shape[:2])}, got {tuple(present.shape)}")
