"""LAL's pooling against the two ways to write it in torch: an unfolded copy of every window, and shifted slices."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcam import window_reduce
from fastcam.bench._harness import Case, CaseIterator, compiled
from fastcam.ops.window_reduce import ring_weights

WINDOW = 5


def unfold(x: Tensor, labels: Tensor) -> Tensor:
    """Every window as a column: window^2 copies of the scores."""
    (B, K, H, W), reach = x.shape, WINDOW // 2
    rings = ring_weights(WINDOW)
    distance = [max(abs(i), abs(j)) for i in range(-reach, reach + 1) for j in range(-reach, reach + 1)]
    w = x.new_tensor([rings[d] for d in distance])
    padded = F.pad(labels, (reach,) * 4, value=-1)[:, None].to(x.dtype)
    y = F.unfold(padded, WINDOW)
    same = (y == labels.flatten(1)[:, None]).to(x.dtype)
    windows = F.unfold(F.pad(x, (reach,) * 4), WINDOW).view(B, K, WINDOW**2, H * W)
    return ((windows * (same * w[:, None])[:, None]).sum(2) / same.sum(1)[:, None]).view(B, K, H, W)


def slices(x: Tensor, labels: Tensor) -> Tensor:
    """A product and a sum for each of window^2 shifts."""
    (H, W), reach, rings = x.shape[2:], WINDOW // 2, ring_weights(WINDOW)
    padded = F.pad(x, (reach,) * 4)
    y = F.pad(labels, (reach,) * 4, value=-1)
    out, count = torch.zeros_like(x), torch.zeros_like(x[:, :1])
    for i in range(WINDOW):
        for j in range(WINDOW):
            same = (y[:, i : i + H, j : j + W] == labels)[:, None].to(x.dtype)
            out = out + padded[:, :, i : i + H, j : j + W] * (same * rings[max(abs(i - reach), abs(j - reach))])
            count = count + same
    return out / count


def cases(device: str) -> CaseIterator:
    """The paper's scores, a batch of crops at stride 8, scores at the image's size; labels in patches."""
    g = torch.Generator().manual_seed(0)
    for B, K, size, patches in ((2, 21, 41, 4), (16, 21, 65, 6), (2, 21, 321, 8), (1, 19, 512, 0)):
        x = torch.randn(B, K, size, size, generator=g).to(device)
        if patches:  # as masks are: most windows lie within one label
            coarse = torch.randint(4, (B, 1, patches, patches), generator=g).float()
            labels = F.interpolate(coarse, (size, size), mode="nearest")[:, 0].long().to(device)
        else:
            labels = torch.randint(4, (B, size, size), generator=g).to(device)
        ours: dict[str, Callable[..., Tensor]] = {"fastcam": window_reduce}
        if device == "cuda":
            ours["fastcam triton"] = lambda x, labels: window_reduce(x, labels, backend="triton")
        rivals = {"slices": slices, "slices, torch.compile": compiled(slices), "unfold": unfold}
        runners = {**ours, **rivals}
        kind = f"{patches} x {patches} patches" if patches else "noise"
        yield Case(
            name=f"B {B}, K {K}, {size} x {size}, window {WINDOW}, labels {kind}, float32, forward",
            runners={name: lambda f=f, x=x, labels=labels: f(x, labels) for name, f in runners.items()},
            expected=lambda x=x, labels=labels: slices(x.double(), labels),
            moved=8 * x.numel() + 8 * labels.numel(),
            operations=2 * x.numel() * WINDOW**2,
        )
        if size > 321:
            continue
        weight = torch.randn(x.shape, generator=g).to(device)

        def both(
            form: Callable[..., Tensor], x: Tensor = x, labels: Tensor = labels, weight: Tensor = weight
        ) -> Tensor:
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(form(leaf, labels), leaf, weight)[0]

        yield Case(
            name=f"B {B}, K {K}, {size} x {size}, window {WINDOW}, labels {kind}, float32, forward and backward",
            runners={name: lambda f=f, both=both: both(f) for name, f in runners.items()},
            expected=lambda both=both: both(slices),
            moved=16 * x.numel() + 16 * labels.numel(),
            operations=4 * x.numel() * WINDOW**2,
        )
