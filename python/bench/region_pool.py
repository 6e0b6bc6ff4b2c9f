"""Region features against the product that people write in torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastcam import region_pool
from fastcam.bench._harness import Case, CaseIterator, compiled


def softmax_matmul(x: Tensor, w: Tensor) -> Tensor:
    """OCR's gather: softmax over the pixels, then a product of flattened, permuted tensors."""
    return torch.matmul(w.flatten(2).softmax(dim=2), x.flatten(2).permute(0, 2, 1))


def einsum(x: Tensor, w: Tensor) -> Tensor:
    """Weighted mean with an einsum."""
    return torch.einsum("bkhw,bdhw->bkd", w, x) / (w.sum(dim=(2, 3)) + 1e-8)[:, :, None]


def broadcast(x: Tensor, w: Tensor) -> Tensor:
    """Weighted mean of a broadcast product, as masked average pooling is often written."""
    return (x[:, None] * w[:, :, None]).sum(dim=(3, 4)) / (w.sum(dim=(2, 3)) + 1e-8)[:, :, None]


def cases(device: str) -> CaseIterator:
    """OCR's gather on stride 8 and SFC's prototypes, forward, and forward with backward."""
    g = torch.Generator().manual_seed(0)
    batch = 16 if device == "cuda" else 1
    for D, size, K, normalize in ((512, 64, 19, "softmax"), (768, 32, 21, "sum"), (256, 128, 21, "sum")):
        x = torch.randn(batch, D, size, size, generator=g).to(device)
        w = torch.rand(batch, K, size, size, generator=g).to(device)
        usual = softmax_matmul if normalize == "softmax" else einsum
        forms = {usual.__name__: usual, f"{usual.__name__}, torch.compile": compiled(usual)}
        if normalize == "sum" and D * size * size < 2**20:
            forms["broadcast product"] = broadcast
        ours = {"fastcam": lambda x, w, n=normalize: region_pool(x, w, normalize=n)}
        if device == "cuda":
            ours["fastcam triton"] = lambda x, w, n=normalize: region_pool(x, w, normalize=n, backend="triton")
        runners = {**ours, **forms}
        yield Case(
            name=f"B {batch}, D {D}, {size} x {size}, K {K}, {normalize}, float32, forward",
            runners={name: lambda f=f, x=x, w=w: f(x, w) for name, f in runners.items()},
            expected=lambda usual=usual, x=x, w=w: usual(x.double(), w.double()),
            moved=4 * (x.numel() + w.numel() + batch * K * D),
            operations=2 * batch * K * D * size * size,
        )
        weight = torch.randn(batch, K, D, generator=g).to(device)

        def both(
            form: Callable[..., Tensor], x: Tensor = x, w: Tensor = w, weight: Tensor = weight
        ) -> tuple[Tensor, ...]:
            x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
            return torch.autograd.grad(form(x, w), (x, w), weight)

        yield Case(
            name=f"B {batch}, D {D}, {size} x {size}, K {K}, {normalize}, float32, forward and backward",
            runners={name: lambda f=f, both=both: both(f) for name, f in runners.items()},
            expected=lambda usual=usual, both=both: both(usual),
            moved=4 * (3 * x.numel() + 3 * w.numel() + 2 * batch * K * D),
            operations=6 * batch * K * D * size * size,
        )
