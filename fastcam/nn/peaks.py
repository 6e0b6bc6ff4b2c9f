"""Class peaks: a pooling layer that trains them, and the walk back from a peak to the pixels that made it.

Y. Zhou, Y. Zhu, Q. Ye, Q. Qiu, J. Jiao, "Weakly Supervised Instance Segmentation using Class Peak Response", CVPR 2018
(arXiv 1804.00880).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fastcam.ops.peak_find import peak_find

EPS = 1e-10  # of the authors' normaliser: less mass than this is dropped


def peak_stimulation(
    maps: Tensor,
    *,
    window: int = 3,
    threshold: Literal["median", "mean", "max"] | float | None = "median",
    exact_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Class logits as the mean of a map's peaks (sections 3.1 and 3.2 of the paper).

    .. math:: s_{bc} = \frac{1}{N_{bc}} \sum_k M_{bc}(y_k, x_k)

    Args:
        maps: class response maps :math:`(B, C, H, W)`, with at least one pixel. The gradient reaches the peaks alone.
        window: as :func:`fastcam.peak_find`.
        threshold: likewise. A map without peaks, which a number can leave or one of NaN is, gives its maximum.
        exact_grad: whether the gradient of a peak is ``g / N``, the derivative; the authors' program leaves out
            ``1 / N`` and has learning rates to match.

    Returns:
        Logits :math:`(B, C)`, peaks int64 :math:`(n, 4)` (image, class, row, column), their number int64
        :math:`(B, C)`.

    Example:
        >>> peak_stimulation(torch.tensor([[[[0.0, 3.0, 1.0, 2.0]]]]))[0]
        tensor([[2.5000]])
    """
    B, C, H, W = maps.shape
    if H * W == 0:
        raise ValueError(f"peak_stimulation: expected maps with at least one pixel, got {tuple(maps.shape)}")
    peaks = peak_find(maps.detach(), window=window, threshold=threshold)
    image, index, row, column = peaks.unbind(dim=1)
    plane = image * C + index
    values = maps.flatten()[(plane * H + row) * W + column]
    counts = plane.bincount(minlength=B * C)
    total = values.new_zeros(B * C).index_add(0, plane, values)
    mean = total / counts.clamp(min=1)
    logits = mean if exact_grad else mean.detach() + (total - total.detach())
    if (counts == 0).any():
        logits = torch.where(counts == 0, maps.flatten(2).max(dim=2)[0].flatten(), logits)
    return logits.view(B, C), peaks, counts.view(B, C)


def conv_topdown(
    u_hat: Tensor,
    weight_pos: Tensor,
    norm: Tensor,
    p_out: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    r"""Mass at the input of a convolution from the mass at its output (equations 3 and 4).

    .. math:: P(U_{ij}) = \hat U_{ij} \sum_{pq} W^+_{(i-p)(j-q)} P(V_{pq}) / N_{pq}

    Every output hands its mass to its inputs in proportion to :math:`\hat U W^+`; what an output with no such input
    holds (N below 1e-10) is lost.

    Args:
        u_hat: inputs less their minimum, :math:`(B, C, H, W)`.
        weight_pos: the positive part of the weights.
        norm: convolution of the two, :math:`(B, D, h, w)`.
        p_out: mass :math:`(B, D, h, w)`.
        stride: rows and columns, as the next three of the convolution.
        padding: of zeros: padding gets no mass.
        dilation: of the weights.
        groups: of the convolution.

    Returns:
        Mass :math:`(B, C, H, W)`.
    """
    share = torch.where(norm < EPS, 0, p_out / (norm + EPS))
    rest = [
        u_hat.shape[2 + i]
        - ((norm.shape[2 + i] - 1) * stride[i] - 2 * padding[i] + dilation[i] * (weight_pos.shape[2 + i] - 1) + 1)
        for i in range(2)
    ]
    return u_hat * F.conv_transpose2d(share, weight_pos, None, stride, padding, rest, groups, dilation)


class _TopDownConv(torch.autograd.Function):
    """A convolution whose gradient is :func:`conv_topdown`. What depends on the image alone is computed once."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        extra: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        # Around the image lies the smallest value as far as mass goes, but 0 as far as the response goes.
        u_hat, weight_pos = F.pad(x - x.amin(dim=(1, 2, 3), keepdim=True), extra), weight.clamp(min=0)
        norm = F.conv2d(u_hat, weight_pos, None, stride, padding, dilation, groups)
        ctx.save_for_backward(u_hat, weight_pos, norm)
        ctx.geometry = stride, padding, dilation, groups
        ctx.extra = [-e for e in extra]
        return F.conv2d(F.pad(x, extra), weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx: Any, p: Tensor) -> tuple[Tensor | None, ...]:
        u_hat, weight_pos, norm = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        mass = conv_topdown(u_hat, weight_pos, norm, p, stride, padding, dilation, groups)
        return F.pad(mass, ctx.extra), *[None] * 7


class _PassThrough(torch.autograd.Function):
    """``y``, computed from ``x`` element by element: the mass of an output is that of its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx: Any, p: Tensor) -> tuple[Tensor, None]:
        return p, None


class _SplitSum(torch.autograd.Function):
    """``x + y``: the mass is split by the positive parts, evenly where neither is positive."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, in_place: bool) -> Tensor:
        a, b = x.clamp(min=0), y.clamp(min=0)
        ctx.save_for_backward(torch.where(a + b > 0, a / (a + b), 0.5))
        if in_place:
            ctx.mark_dirty(x)
            return x.add_(y)
        return x + y

    @staticmethod
    def backward(ctx: Any, p: Tensor) -> tuple[Tensor, Tensor, None]:
        first = p * ctx.saved_tensors[0]
        return first, p - first, None


_ADD = {torch.add: False, torch.Tensor.add: False, torch.Tensor.add_: True}  # in place? `+=` is add_
_POINTWISE = {
    F.batch_norm, F.relu, torch.relu, torch.relu_, F.relu6, F.hardtanh, F.leaky_relu, F.elu, F.silu, F.gelu,
    F.hardswish, F.mish, torch.Tensor.relu, torch.Tensor.relu_,
}  # fmt: skip


class TopDown(TorchFunctionMode):
    """Inside this context the gradient of a convolution is :func:`conv_topdown`; see :func:`peak_backprop`.

    Args:
        conserve: whether batch norm, activations and sums of two equal shapes keep the mass too.
    """

    def __init__(self, conserve: bool = False) -> None:
        super().__init__()
        self.conserve = conserve

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Replaces what has a rule of its own."""
        kwargs = kwargs or {}
        if func is F.conv2d:
            return _conv2d(*args, **kwargs)
        if self.conserve and func in _POINTWISE:
            x = args[0] if args else kwargs["input"]
            rest = {key: value for key, value in kwargs.items() if key != "input"}
            return _PassThrough.apply(x, func(x.detach().clone(), *args[1:], **rest))  # some change x
        if self.conserve and func in _ADD and len(args) == 2 and not kwargs:
            x, y = args
            if isinstance(x, Tensor) and isinstance(y, Tensor) and x.shape == y.shape:
                return _SplitSum.apply(x, y, _ADD[func])
        return func(*args, **kwargs)


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor:
    """Arguments as of ``torch.conv2d``."""
    stride, dilation = _pair(stride), _pair(dilation)
    extra = [0, 0, 0, 0]
    if padding == "same":  # an even window has its odd pixel below and to the right
        y, x = (d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True))
        extra = [x // 2, x - x // 2, y // 2, y - y // 2]
    around = (0, 0) if isinstance(padding, str) else _pair(padding)
    return _TopDownConv.apply(input, weight, bias, stride, around, extra, dilation, groups)


def _pair(value: Any) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    return pair if len(pair) == 2 else pair * 2


def peak_backprop(
    network: Callable[[Tensor], Tensor],
    image: Tensor,
    peaks: Tensor,
    *,
    conserve: bool = False,
    chunk: int = 16,
) -> Tensor:
    """Where in an image the response of each peak comes from: a top-down walk through any network (section 3.3).

    Each peak starts with mass 1. A 2-d convolution hands it to its inputs by :func:`conv_topdown`; every other layer by
    its ordinary gradient, as in the authors' program, or with ``conserve`` by rules that keep it:

    ==================================  =====================================  =====================================
    layer                               ``conserve=False``                     ``conserve=True``
    ==================================  =====================================  =====================================
    convolution                         positive weights, shares that add to 1  the same
    batch norm (running statistics)     times ``gamma / sigma``                unchanged
    ReLU and other activations          their derivative                       unchanged
    sum of two branches (``+``, ``+=``)  all of it to both                      split by the branches' positive parts
    max pooling                         to the largest value                   the same
    resizing, average pooling, linear   their derivative                       the same
    ==================================  =====================================  =====================================

    Cost: two forward passes (responses and normalisers, once for all peaks), and one backward pass in which ``chunk``
    peaks are the batch.

    Args:
        network: from images ``(1, K, H, W)`` to maps ``(1, C, h, w)``. In evaluation mode: batch statistics would join
            pixels.
        image: ``(K, H, W)``, normalised.
        peaks: int64 ``(n, 3)``: class, row, column of the maps.
        conserve: see above.
        chunk: peaks at a time; memory grows with it.

    Returns:
        Mass ``(n, K, H, W)``, without a graph; negative too where a batch norm has a negative weight.

    Raises:
        ValueError: shapes that do not fit, ``chunk`` below 1, or maps that are not those of one image.
    """
    if image.ndim != 3 or peaks.ndim != 2 or peaks.shape[1] != 3:
        raise ValueError(
            "peak_backprop: expected image (K, H, W) and peaks (n, 3), "
            f"got {tuple(image.shape)} and {tuple(peaks.shape)}"
        )
    if chunk < 1:
        raise ValueError(f"peak_backprop: expected chunk >= 1, got {chunk}")
    if len(peaks) == 0:
        return image.new_zeros(0, *image.shape)
    with torch.inference_mode(False), torch.enable_grad():
        x = image.detach().clone()[None].requires_grad_()
        with TopDown(conserve):
            maps = network(x)
        if maps.ndim != 4 or len(maps) != 1:
            raise ValueError(f"peak_backprop: expected maps (1, C, h, w) of the network, got {tuple(maps.shape)}")
        mass = []
        for part in peaks.clone().split(chunk):
            start = maps.new_zeros(len(part), *maps.shape)
            start[torch.arange(len(part), device=part.device), 0, part[:, 0], part[:, 1], part[:, 2]] = 1
            mass.append(torch.autograd.grad(maps, x, start, retain_graph=True, is_grads_batched=True)[0][:, 0])
    return torch.cat(mass)


def peak_response_maps(mass: Tensor) -> Tensor:
    """Peak response maps ``(n, H, W)`` of mass ``(n, K, H, W)``: summed over channels, ReLU'd, divided by their sum.

    A map without positive mass is 0.
    """
    maps = mass.sum(dim=1).clamp(min=0)
    total = maps.sum(dim=(1, 2), keepdim=True)
    return maps / torch.where(total > 0, total, 1)
