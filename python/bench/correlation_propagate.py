"""Pixel correlation against the N x N affinity that people form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcam import correlation_propagate
from fastcam.bench._harness import Case, CaseIterator, compiled


def whole_affinity(x: Tensor, f: Tensor, steps: int) -> Tensor:
    """The authors' way: the affinity, normalised, multiplied from the right."""
    g = f.flatten(2)
    g = g / (torch.linalg.vector_norm(g, dim=1, keepdim=True) + 1e-5)
    affinity = F.relu(torch.matmul(g.transpose(1, 2), g))
    affinity = affinity / (affinity.sum(dim=1, keepdim=True) + 1e-5)
    y = x.flatten(2)
    for _ in range(steps):
        y = torch.matmul(y, affinity)
    return y.view(x.shape)


def ours(x: Tensor, f: Tensor, steps: int) -> Tensor:
    """The op."""
    return correlation_propagate(x, f, steps=steps)


def cases(device: str) -> CaseIterator:
    """SEAM's and SFC's sizes: 21 maps, one step and two."""
    g = torch.Generator().manual_seed(0)
    batch = 16 if device == "cuda" else 1
    for D, size, steps in ((2048, 32, 2), (192, 56, 1), (256, 60, 1)):
        x = torch.rand(batch, 21, size, size, generator=g).to(device)
        f = torch.randn(batch, D, size, size, generator=g).to(device)
        forms = {"whole affinity": whole_affinity, "whole affinity, torch.compile": compiled(whole_affinity)}
        runners: dict[str, Callable[..., Tensor]] = {"fastcam": ours, **forms}
        if device == "cuda":
            runners["fastcam triton"] = lambda x, f, steps: correlation_propagate(x, f, steps=steps, backend="triton")
        N = size * size
        yield Case(
            name=f"B {batch}, D {D}, {size} x {size}, 21 maps, {steps} steps, float32, forward",
            runners={name: lambda r=r, x=x, f=f, steps=steps: r(x, f, steps) for name, r in runners.items()},
            expected=lambda x=x, f=f, steps=steps: whole_affinity(x.double(), f.double(), steps),
            moved=4 * (f.numel() + 2 * x.numel()),
            operations=2 * batch * N * N * (D + 21 * steps),
        )
        weight = torch.randn(x.shape, generator=g).to(device)

        def both(
            form: Callable[..., Tensor], x: Tensor = x, f: Tensor = f, weight: Tensor = weight, steps: int = steps
        ) -> tuple[Tensor, ...]:
            x, f = x.detach().requires_grad_(), f.detach().requires_grad_()
            return torch.autograd.grad(form(x, f, steps), (x, f), weight)

        yield Case(
            name=f"B {batch}, D {D}, {size} x {size}, 21 maps, {steps} steps, float32, forward and backward",
            runners={name: lambda r=r, both=both: both(r) for name, r in runners.items()},
            expected=lambda both=both: both(whole_affinity),
            tolerance=1e-3,  # sums over all pixels
            moved=8 * (f.numel() + 2 * x.numel()),
            operations=2 * batch * N * N * (3 * D + 21 * 4 * steps),
        )
