"""Discriminative region suppression: an activation that clips every channel at a share of its own maximum.

B. Kim, S. Han, J. Kim, "Discriminative Region Suppression for Weakly-Supervised Semantic Segmentation", AAAI 2021. A
plug-in for any network with ReLUs: :func:`suppress_activations`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from fastcam.errors import FastcamError

ACTIVATIONS = (nn.ReLU, nn.ReLU6)


class _Suppress(torch.autograd.Function):
    """Keeps for backward the output, which the next layer keeps anyway; where there is a cap, the input in its place.

    Every pass over the pixels is one of torch's vectorised loops, for channels last too, which plain indexing and masks
    are not: the maximum's place is found in its row alone, and masks are applied by the gradients of ``threshold`` and
    ``hardtanh``.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, delta: float, cap: float) -> Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        pixels = x.permute(0, 2, 3, 1)
        m, row = pixels.amax(dim=2).max(dim=1)  # of equal maxima the first, on the CPU
        column = pixels.gather(1, row[:, None, None, :].expand(-1, 1, x.shape[3], -1)).squeeze(1).argmax(dim=1)
        m = m.clamp(0, cap)
        y = x.clamp(0, cap)
        if weight is None:
            g, s = None, m.new_full((1, 1), delta, dtype=exact)
        else:
            g = y.mean(dim=(2, 3), dtype=exact)
            s = torch.sigmoid(g @ weight.to(exact).T).to(exact)
        y.clamp_(max=(m * s).to(x.dtype)[:, :, None, None])
        ctx.save_for_backward(y if math.isinf(cap) else x, weight, m, row, column, g, s)
        ctx.cap = cap
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, m, row, column, g, s = ctx.saved_tensors
        limit = (m * s).to(kept.dtype)
        limit = limit.masked_fill(limit >= m, math.inf)[:, :, None, None]  # where nothing is above it
        through = torch.ops.aten.threshold_backward(grad, limit - kept, 0)  # of pixels below the limit
        spread = grad.sum(dim=(2, 3), dtype=s.dtype) - through.sum(dim=(2, 3), dtype=s.dtype)
        grad_weight = None
        if weight is not None and g is not None:
            dlogit = spread * m * s * (1 - s)
            grad_weight = (dlogit.T @ g).to(weight.dtype)
            dg = dlogit @ weight.to(s.dtype) / kept[0, 0].numel()
            through += dg[:, :, None, None].to(grad.dtype)
        through = torch.ops.aten.hardtanh_backward(through, kept, 0, ctx.cap)
        at_max = (s * spread * ((m > 0) & (m < ctx.cap))).to(grad.dtype)
        image, channel = (torch.arange(n, device=m.device) for n in m.shape)
        through[image[:, None], channel, row, column] += at_max
        return through, grad_weight, None, None


def suppress(x: Tensor, controller: float | Tensor, cap: float = math.inf) -> Tensor:
    r"""ReLU, clipped from above at a share of every channel's maximum.

    .. math:: y_p = \min(z_p,\; s \max_q z_q), \quad z = \min(\max(x, 0), \text{cap})

    The share :math:`s` is a number (the fixed controller), or one a channel of each image (the learnable one):
    :math:`s = \sigma(W g)`, :math:`g` the mean of :math:`z` over the pixels. Clipped pixels hand their gradient to the
    controller and to the channel's maximum, which is not detached; of several maxima the first gets it. With
    :math:`s = 1` nothing is clipped: values and gradient are the ReLU's.

    Cost: memory traffic only, 5 reads or writes of ``x`` forward (6 with a learnable controller), 10 backward, which
    keeps the result, or ``x`` where there is a cap.

    Args:
        x: ``(B, C, H, W)``, floating point, before the activation.
        controller: the share in (0, 1], or the weight W, ``(C, C)``.
        cap: where the activation itself ends: 6 for ReLU6.

    Returns:
        Like ``x``. A channel without positive values gives 0 and no gradient.

    Raises:
        ValueError: shapes that do not fit, no pixel, a share outside (0, 1].

    Example:
        >>> suppress(torch.tensor([[[[-1.0, 1.0, 4.0, 3.0]]]]), 0.5)
        tensor([[[[0., 1., 2., 2.]]]])
    """
    if x.ndim != 4 or x.shape[2] * x.shape[3] == 0 or not x.is_floating_point():
        raise ValueError(
            f"suppress: expected x (B, C, H, W) floating point with at least one pixel, got {x.dtype} {tuple(x.shape)}"
        )
    if isinstance(controller, Tensor):
        if controller.shape != (x.shape[1], x.shape[1]):
            raise ValueError(
                f"suppress: expected a controller ({x.shape[1]}, {x.shape[1]}), got {tuple(controller.shape)}"
            )
        return _Suppress.apply(x, controller, 1.0, cap)
    if not 0 < controller <= 1:
        raise ValueError(f"suppress: expected a controller above 0 and at most 1, got {controller}")
    return _Suppress.apply(x, None, float(controller), cap)


class SuppressedReLU(nn.Module):
    """The activation as a module, in the place of a ReLU.

    Args:
        delta: the fixed share, in (0, 1]; ``None`` for a learnable controller.
        channels: C, for the learnable one, which starts at shares of 0.5.
        cap: where the activation itself ends: 6 for ReLU6.

    Raises:
        ValueError: a share outside (0, 1], or neither a share nor channels.
    """

    def __init__(self, delta: float | None = None, *, channels: int | None = None, cap: float = math.inf) -> None:
        super().__init__()
        if delta is None and channels is None:
            raise ValueError("SuppressedReLU: expected delta, or channels for a learnable controller, got neither")
        if delta is not None and not 0 < delta <= 1:
            raise ValueError(f"SuppressedReLU: expected delta above 0 and at most 1, got {delta}")
        self.delta = delta
        self.cap = cap
        self.controller: nn.Parameter | None = None
        if delta is None and channels is not None:
            self.controller = nn.Parameter(torch.empty(channels, channels))
            nn.init.normal_(self.controller, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to the same shape and dtype."""
        controller = self.delta if self.controller is None else self.controller
        assert controller is not None
        return suppress(x, controller, self.cap)

    def extra_repr(self) -> str:
        """What ``print`` shows."""
        return "learnable" if self.delta is None else f"delta={self.delta}"


def suppress_activations(
    net: nn.Module, delta: float | None = None, *, last: int | None = None, image_size: int = 64
) -> list[SuppressedReLU]:
    """Replaces the ReLUs and ReLU6s of a network, in place, wherever it learns.

    The network is run once to see which activations come behind a parameter that learns, and with how many channels.
    Activations of its frozen first layers stay: what they compute is fixed.

    Args:
        net: takes images ``(B, 3, H, W)``.
        delta: the fixed share; ``None`` for learnable controllers, one an activation.
        last: how many, counted from the end; ``None`` for all. Deep networks with frozen batch norm stand few: it was
            not made for clipped features.
        image_size: side of the image of that run.

    Returns:
        The new activations in the order in which they run.

    Raises:
        ValueError: ``last`` is below 1.
        FastcamError: the network has no ReLU that learns, or one that serves layers of several widths.
    """
    if last is not None and last < 1:
        raise ValueError(f"suppress_activations: expected last of 1 or more, or None, got {last}")
    width: dict[str, int] = {}
    old = {name: module for name, module in net.named_modules() if isinstance(module, ACTIVATIONS)}

    def see(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if not output.requires_grad:
                return
            if output.ndim != 4 or width.setdefault(name, output.shape[1]) != output.shape[1]:
                raise FastcamError(
                    f"activation '{name}' serves layers of several shapes ({width.get(name)} channels and "
                    f"{tuple(output.shape)}), expected a module of its own behind each layer; choose another network"
                )

        return hook

    hooks = [module.register_forward_hook(see(name)) for name, module in old.items()]
    training, like = net.training, next(net.parameters())
    try:
        with torch.enable_grad():
            net.eval()(like.new_zeros(1, 3, image_size, image_size))
    finally:
        net.train(training)
        for hook in hooks:
            hook.remove()
    if not width:
        raise FastcamError(
            f"network {type(net).__name__}: has no ReLU behind a layer that learns, expected one such as resnet50; "
            "choose another, or freeze less of it"
        )
    new = []
    for name, channels in list(width.items())[-last if last else None :]:
        cap = 6.0 if isinstance(old[name], nn.ReLU6) else math.inf
        module = SuppressedReLU(delta, channels=channels, cap=cap).to(like.device)
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, module)
        new.append(module)
    return new
