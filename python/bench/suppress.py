"""DRS's suppression against the plain form and a ReLU: memory traffic alone, and why it is no kernel."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcam.bench._harness import Case, CaseIterator
from fastcam.nn import suppress

DELTA = 0.55


def plain(x: Tensor) -> Tensor:
    """As it is written down: a ReLU, the maximum of every channel, the smaller of both."""
    z = F.relu(x)
    return torch.minimum(z, DELTA * z.flatten(2).max(dim=2)[0][:, :, None, None])


def cases(device: str) -> CaseIterator:
    """Activations of VGG-16 and MobileNetV2, contiguous and channels last."""
    g = torch.Generator().manual_seed(0)
    runners = {"fastcam": lambda x: suppress(x, DELTA), "plain torch": plain, "ReLU": F.relu}
    for shape in ((1, 64, 320, 320), (4, 512, 40, 40), (16, 960, 14, 14)):
        for layout, form in (("contiguous", torch.contiguous_format), ("channels last", torch.channels_last)):
            x = torch.randn(shape, generator=g).to(device, memory_format=form)
            name = f"{' x '.join(map(str, shape))}, {layout}, share {DELTA}, float32"
            yield Case(
                name=f"{name}, forward",
                runners={key: lambda f=f, x=x: f(x) for key, f in runners.items()},
                expected=lambda x=x: plain(x.double()),
                unchecked={"ReLU": "another function, the least that any activation costs"},
                moved=3 * 4 * x.numel(),
                operations=2 * x.numel(),
            )

            def both(f: Callable[[Tensor], Tensor], x: Tensor = x) -> Tensor:
                leaf = x.detach().requires_grad_()
                y = f(leaf)
                return torch.autograd.grad(y, leaf, y.detach() / x[0, 0].numel())[0]  # as of a mean over the pixels

            yield Case(
                name=f"{name}, forward and backward",
                runners={key: lambda f=f, both=both: both(f) for key, f in runners.items()},
                expected=lambda both=both, x=x: both(plain, x.double()),
                unchecked={"ReLU": "another function, the least that any activation costs"},
                moved=8 * 4 * x.numel(),
                operations=4 * x.numel(),
            )
