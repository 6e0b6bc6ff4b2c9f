"""Cosine similarity against the ways people write it in torch today."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcam import prototype_similarity
from fastcam.bench._harness import Case, CaseIterator, compiled


def normalized_einsum(x: Tensor, p: Tensor) -> Tensor:
    """Normalise both, then multiply: the usual form."""
    return F.relu(torch.einsum("bdhw,kd->bkhw", F.normalize(x, dim=1), F.normalize(p, dim=1)))


def convolution(x: Tensor, p: Tensor) -> Tensor:
    """1x1 convolution with unit prototypes, divided by the features' norms: the fastest form in plain torch."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min(1e-12)
    return F.relu(F.conv2d(x, F.normalize(p, dim=1)[:, :, None, None]) / norm)


def broadcast(x: Tensor, p: Tensor) -> Tensor:
    """``F.cosine_similarity`` on broadcast tensors, as seen in users' code."""
    return F.relu(F.cosine_similarity(x[:, None], p[None, :, :, None, None], dim=2))


def ours_relu(x: Tensor, p: Tensor) -> Tensor:
    """The op."""
    return prototype_similarity(x, p, activation="relu")


def cases(device: str) -> CaseIterator:
    """Features of common backbones, 21 and 150 prototypes, forward, and forward with backward."""
    g = torch.Generator().manual_seed(0)
    batch = 16 if device == "cuda" else 1
    for D, size, K in ((2048, 32, 21), (256, 128, 21), (768, 64, 21), (2048, 32, 150), (256, 128, 150)):
        x = torch.randn(batch, D, size, size, generator=g).to(device)
        p = torch.randn(K, D, generator=g).to(device)
        forms = {
            "normalize + einsum + relu": normalized_einsum,
            "the same, torch.compile": compiled(normalized_einsum),
            "1x1 convolution / norm": convolution,
            "the same, torch.compile ": compiled(convolution),
        }
        if K == 21 and D * size * size < 2**22:
            forms["cosine_similarity, broadcast"] = broadcast
        ours = {"fastcam": lambda x=x, p=p: ours_relu(x, p)}
        if device == "cuda":
            ours["fastcam triton"] = lambda x=x, p=p: prototype_similarity(x, p, activation="relu", backend="triton")
        yield Case(
            name=f"B {batch}, D {D}, {size} x {size}, K {K}, float32, forward",
            runners={**ours, **{name: lambda f=f, x=x, p=p: f(x, p) for name, f in forms.items()}},
            expected=lambda x=x, p=p: normalized_einsum(x.double(), p.double()),
            moved=4 * (x.numel() + p.numel() + batch * K * size * size),
            operations=2 * batch * (K + 1) * D * size * size,
        )
        if K == 21:
            weight = torch.randn(batch, K, size, size, generator=g).to(device)

            def both(
                form: Callable[..., Tensor], x: Tensor = x, p: Tensor = p, weight: Tensor = weight
            ) -> tuple[Tensor, ...]:
                x, p = x.detach().requires_grad_(), p.detach().requires_grad_()
                return torch.autograd.grad(form(x, p), (x, p), weight)

            yield Case(
                name=f"B {batch}, D {D}, {size} x {size}, K {K}, float32, forward and backward",
                runners={
                    "fastcam": lambda both=both: both(ours_relu),
                    **{name: lambda f=f, both=both: both(f) for name, f in forms.items()},
                },
                expected=lambda both=both: both(normalized_einsum),
                tolerance=1e-3,  # sums over all pixels
                moved=4 * (3 * x.numel() + 2 * p.numel() + 3 * batch * K * size * size),
                operations=2 * batch * (3 * K + 1) * D * size * size,
            )
