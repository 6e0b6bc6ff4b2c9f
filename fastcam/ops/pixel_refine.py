"""Pixel-adaptive refinement: masks averaged over dilated neighbourhoods of similar colour (PAMR, PAR)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcam import backends
from fastcam._checks import check_same
from fastcam._library import op

POLICY = "str mode, int[] dilations, int iterations, str backend"
FWD = op(
    f"pixel_refine_fwd(Tensor masks, Tensor image, {POLICY}) -> Tensor",
    fake=lambda masks, *_: masks.new_empty(masks.shape),
)
BWD = op(
    f"pixel_refine_bwd(Tensor grad, Tensor image, {POLICY}) -> Tensor",
    fake=lambda grad, *_: grad.new_empty(grad.shape),
)
# Best first. triton comes after the reference, hence only by name, until a GPU has run it.
CANDIDATES = {"cpp": backends.needs_cpp, "reference": backends.always, "triton": backends.needs_gpu}


class _PixelRefine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, masks: Tensor, image: Tensor, *constants: Any) -> Tensor:
        ctx.save_for_backward(image)
        ctx.constants = constants
        return FWD(masks, image, *constants)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return BWD(grad, *ctx.saved_tensors, *ctx.constants), None, *[None] * len(ctx.constants)


def pixel_refine(
    masks: Tensor,
    image: Tensor,
    *,
    mode: Literal["par", "pamr"] = "par",
    dilations: Sequence[int] = (1, 2, 4, 8, 12, 24),
    iterations: int = 10,
    backend: str | None = None,
) -> Tensor:
    r"""Masks averaged again and again over neighbours of similar colour.

    The neighbours of a pixel are the eight of a 3 x 3 window dilated by each of ``dilations``; those outside the image
    are the nearest pixel of the border. An iteration is :math:`m_i \leftarrow \sum_{j \in N_i} w_{ij} m_j`, without the
    pixel itself. With :math:`\sigma_{ki}` the standard deviation of colour channel k in the neighbourhood,

    .. math::
        \text{PAMR:} \quad w_{ij} &= \operatorname{softmax}_j \Big(-\frac{1}{K} \sum_k
            \frac{|I_{ki} - I_{kj}|}{0.1\,\sigma_{ki} + \epsilon}\Big) \\
        \text{PAR:} \quad w_{ij} &= \operatorname{softmax}_j \Big(-\frac{1}{K} \sum_k
            \Big(\frac{|I_{ki} - I_{kj}|}{0.3\,(\sigma_{ki} + \epsilon)}\Big)^2\Big) + 0.01\,
            \operatorname{softmax}_j \Big(-\Big(\frac{|p_i - p_j|}{0.3\,(\sigma_p + \epsilon)}\Big)^2\Big)

    with :math:`\epsilon = 10^{-8}`, unbiased deviations, the centre counted once a dilation in PAMR's and not in PAR's
    (PAMR: Araslanov and Roth, CVPR 2020; PAR: Ru et al., CVPR 2022; the constants are those
    of the published codes). PAMR's weights sum to 1, PAR's to 1.01. Both are blind to the scale of the image, up to
    :math:`\epsilon`.

    Cost: weights are computed once, 8 |D| planes of float32 an image; an iteration is 8 |D| multiply-adds a value.
    Differentiable in ``masks``, not in ``image``.

    Args:
        masks: :math:`(B, C, H, W)`, any strides, float32, float16, bfloat16 (float64 in ``cpp`` and ``reference``).
        image: :math:`(B, K, H, W)`, any number of channels; same dtype and device. Where an image has one colour, all
            neighbours weigh the same. A NaN spreads to the pixels that have it as a neighbour.
        mode: ``"par"`` or ``"pamr"``.
        dilations: at least one, each at least 1; they may exceed the image.
        iterations: at least 0; 0 gives ``masks`` again.
        backend: ``"cpp"``, ``"triton"``, ``"reference"``, or ``None`` to choose.

    Returns:
        Refined masks :math:`(B, C, H, W)` in the dtype of ``masks``; sums are taken in float32.

    Raises:
        ValueError: shapes that do not fit, an image without pixels or channels, two devices, an unknown mode, no or
            wrong dilations, negative ``iterations``.
        TypeError: dtypes that are not floating or differ.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> image = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(1, 3, 4, 4)
        >>> masks = torch.tensor([0.8, 0.6, 0.0, 0.0]).expand(1, 1, 4, 4)
        >>> pixel_refine(masks, image, mode="pamr", dilations=[1], iterations=1)[0, 0, 0, :2]  # no 0 crosses the edge
        tensor([0.7250, 0.7200])
    """
    if (
        masks.ndim != 4
        or image.ndim != 4
        or 0 in image.shape[1:]
        or masks.shape[0] != image.shape[0]
        or masks.shape[2:] != image.shape[2:]
    ):
        raise ValueError(
            "pixel_refine: expected masks (B, C, H, W) and image (B, K, H, W) with K, H, W >= 1, "
            f"got {tuple(masks.shape)} and {tuple(image.shape)}"
        )
    if mode not in ("par", "pamr"):
        raise ValueError(f"pixel_refine: expected mode 'par' or 'pamr', got {mode!r}")
    if len(dilations) == 0 or min(dilations) < 1:
        raise ValueError(f"pixel_refine: expected at least one dilation, each >= 1, got {list(dilations)}")
    if iterations < 0:
        raise ValueError(f"pixel_refine: expected iterations >= 0, got {iterations}")
    check_same("pixel_refine", masks=masks, image=image)
    name = backends.resolve("pixel_refine", CANDIDATES, masks, backend)
    constants = mode, list(dilations), iterations, name
    if torch.is_grad_enabled() and masks.requires_grad:
        return _PixelRefine.apply(masks, image, *constants)
    return FWD(masks, image, *constants)
