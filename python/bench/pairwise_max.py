"""Best matches against the N x M matrix that people form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastcam import pairwise_max
from fastcam.bench._harness import Case, CaseIterator, compiled


def whole_matrix(q: Tensor, s: Tensor, mask: Tensor) -> Tensor:
    """PFENet's prior: product, divided by the norms, the largest of every row."""
    norm = torch.linalg.vector_norm(q, dim=1)[:, :, None] * torch.linalg.vector_norm(s, dim=1)[:, None]
    similarity = torch.bmm(q.permute(0, 2, 1), s) / (norm + 1e-7)
    return similarity.masked_fill(~mask[:, None], -torch.inf).max(dim=2)[0]


def ours(q: Tensor, s: Tensor, mask: Tensor) -> Tensor:
    """The op."""
    return pairwise_max(q, s, mask=mask)[0]


def cases(device: str) -> CaseIterator:
    """The prior of 256 x 256 and of 473 x 473 images at stride 8, a quarter of the support and all of it."""
    g = torch.Generator().manual_seed(0)
    batch = 16 if device == "cuda" else 1
    shapes = (
        ((256, 60, 1.0), (2048, 32, 1.0), (2048, 32, 0.25)) if device == "cpu" else ((256, 60, 1.0), (256, 60, 0.25))
    )
    for D, size, share in shapes:
        N = size * size
        q, s = (torch.randn(batch, D, N, generator=g).to(device) for _ in range(2))
        mask = (torch.rand(batch, N, generator=g) < share).to(device)
        forms = {"bmm, max": whole_matrix, "bmm, max, torch.compile": compiled(whole_matrix)}
        runners: dict[str, Callable[..., Tensor]] = {"fastcam": ours, **forms}
        if device == "cuda":
            runners["fastcam triton"] = lambda q, s, mask: pairwise_max(q, s, mask=mask, backend="triton")[0]
        yield Case(
            name=f"B {batch}, D {D}, {size} x {size} against as many, {share:.0%} of them used, float32, forward",
            runners={name: lambda f=f, q=q, s=s, mask=mask: f(q, s, mask) for name, f in runners.items()},
            expected=lambda q=q, s=s, mask=mask: whole_matrix(q.double(), s.double(), mask),
            moved=4 * (q.numel() + s.numel()),
            operations=2 * D * N * int(mask.sum()),
        )
        if share < 1:
            continue
        weight = torch.randn(batch, N, generator=g).to(device)

        def both(
            form: Callable[..., Tensor], q: Tensor = q, s: Tensor = s, mask: Tensor = mask, weight: Tensor = weight
        ) -> tuple[Tensor, ...]:
            q, s = q.detach().requires_grad_(), s.detach().requires_grad_()
            return torch.autograd.grad(form(q, s, mask), (q, s), weight)

        yield Case(
            name=f"B {batch}, D {D}, {size} x {size} against as many, float32, forward and backward",
            runners={name: lambda f=f, both=both: both(f) for name, f in runners.items()},
            expected=lambda both=both: both(whole_matrix),
            moved=8 * (q.numel() + s.numel()),
            operations=2 * D * N * int(mask.sum()),
        )
