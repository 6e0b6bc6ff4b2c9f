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
    """Keeps the output, which the next layer keeps anyway, and one bit a value more where there is a cap.

    A pixel was clipped where the output is the limit and the limit is below the maximum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, delta: float, cap: float) -> Tensor:
        z = x.clamp(0, cap)
        m, at = z.flatten(2).max(dim=2)  # of equal maxima the first, on the CPU
        exact = torch.promote_types(x.dtype, torch.float32)
        if weight is None:
            g, s = None, m.new_full((1, 1), delta, dtype=exact)
        else:
            g = z.mean(dim=(2, 3), dtype=exact)
            s = torch.sigmoid(g @ weight.to(exact).T).to(exact)
        limit = (m * s).to(x.dtype)
        y = torch.minimum(z, limit[:, :, None, None])
        ctx.save_for_backward(y, weight, m, at, g, s, None if math.isinf(cap) else x < cap)
        ctx.cap, ctx.exact = cap, exact
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, weight, m, at, g, s, below_cap = ctx.saved_tensors
        limit = (m * s).to(y.dtype)
        clipped = (y >= limit[:, :, None, None]) & (limit < m)[:, :, None, None]
        spread = (grad * clipped).sum(dim=(2, 3), dtype=ctx.exact)
        through = grad.masked_fill(clipped, 0)
        grad_weight = None
        if weight is not None and g is not None:
            dlogit = spread * m * s * (1 - s)
            grad_weight = (dlogit.T @ g).to(weight.dtype)
            dg = dlogit @ weight.to(ctx.exact) / y[0, 0].numel()
            through = through + dg[:, :, None, None].to(grad.dtype)
        through = through * (y > 0)
        if below_cap is not None:
            through = through * below_cap
            spread = spread * (m < ctx.cap)
        at_max = (s * spread * (m > 0)).to(grad.dtype)
        through.flatten(2).scatter_add_(2, at[:, :, None], at_max[:, :, None])  # a view, channels last too
        return through, grad_weight, None, None


def suppress(x: Tensor, controller: float | Tensor, cap: float = math.inf) -> Tensor:
    r"""ReLU, clipped from above at a share of every channel's maximum.

    .. math:: y_p = \min(z_p,\; s \max_q z_q), \quad z = \min(\max(x, 0), \text{cap})

    The share :math:`s` is a number (the fixed controller), or one a channel of each image (the learnable one):
    :math:`s = \sigma(W g)`, :math:`g` the mean of :math:`z` over the pixels. Clipped pixels hand their gradient to the
    controller and to the channel's maximum, which is not detached; of several maxima the first gets it. With
    :math:`s = 1` nothing is clipped: values and gradient are the ReLU's.

    Cost: memory traffic only, 7 reads or writes of ``x`` forward (9 with a learnable controller). Backward keeps the
    result, the maxima and, with a cap, a mask.

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


def suppress_activations(net: nn.Module, delta: float | None = None, *, image_size: int = 64) -> list[SuppressedReLU]:
    """Replaces the ReLUs and ReLU6s of a network, in place, wherever it learns.

    The network is run once to see which activations come behind a parameter that learns, and with how many channels.
    Activations of its frozen first layers stay: what they compute is fixed.

    Args:
        net: takes images ``(B, 3, H, W)``.
        delta: the fixed share; ``None`` for learnable controllers, one an activation.
        image_size: side of the image of that run.

    Returns:
        The new activations in the order in which they run.

    Raises:
        FastcamError: the network has no ReLU that learns, or one that serves layers of several widths.
    """
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
    for name, channels in width.items():
        cap = 6.0 if isinstance(old[name], nn.ReLU6) else math.inf
        module = SuppressedReLU(delta, channels=channels, cap=cap).to(like.device)
        parent, _, child = name.rpartition(".")
        setattr(net.get_submodule(parent), child, module)
        new.append(module)
    return new
