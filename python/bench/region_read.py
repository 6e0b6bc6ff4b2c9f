"""OCR's pixel-region attention in plain products: the linear layer applied to the regions against the usual order."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcam.bench._harness import Case, CaseIterator
from fastcam.methods.ocr import pixel_region_relation, region_read


def table(query: Tensor, keys: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """Ours: the layer applied to the regions, then read by every pixel."""
    return region_read(pixel_region_relation(query, keys), values, weight)


def usual(query: Tensor, keys: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """The published program: transposed queries, attention, then the layer on every pixel."""
    relation = torch.matmul(query.permute(0, 2, 1), keys) * query.shape[1] ** -0.5
    context = torch.matmul(F.softmax(relation, dim=-1), values.permute(0, 2, 1))
    return torch.matmul(weight, context.permute(0, 2, 1).contiguous())


def fused(query: Tensor, keys: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    """torch's fused attention on the table: what an op of its own would do."""
    q, k, v = (t.mT[:, None] for t in (query, keys, torch.matmul(weight, values)))
    return F.scaled_dot_product_attention(q, k, v)[:, 0].mT.contiguous()


def cases(device: str) -> CaseIterator:
    """Cityscapes at stride 8, ADE20K's classes, small maps; 512 channels, keys of 256."""
    g = torch.Generator().manual_seed(0)
    for K, size, D, C in ((19, 128, 256, 512), (150, 65, 256, 512), (21, 64, 256, 512), (7, 28, 64, 128)):
        B, N = 16 if device == "cuda" else 1, size * size
        shapes = (B, D, N), (B, D, K), (B, D, K), (C, D)
        inputs = [torch.randn(shape, generator=g).to(device) for shape in shapes]
        runners = {"fastcam": table, "usual order": usual, "fused attention on the table": fused}
        yield Case(
            name=f"B {B}, K {K}, {size} x {size}, keys {D}, channels {C}, float32, forward",
            runners={name: lambda f=f, inputs=inputs: f(*inputs) for name, f in runners.items()},
            expected=lambda inputs=inputs: usual(*(t.double() for t in inputs)),
            moved=4 * B * N * (D + C),
            operations=2 * B * N * K * (D + C),
            tolerance=1e-3,
        )

        def both(form: Callable[..., Tensor], inputs: list[Tensor] = inputs) -> tuple[Tensor, ...]:
            leaves = [t.detach().requires_grad_() for t in inputs]
            out = form(*leaves)
            return torch.autograd.grad(out, leaves, torch.ones_like(out))

        yield Case(
            name=f"B {B}, K {K}, {size} x {size}, keys {D}, channels {C}, float32, forward and backward",
            runners={name: lambda f=f, both=both: both(f) for name, f in runners.items()},
            expected=None,
            moved=8 * B * N * (D + C),
            operations=6 * B * N * K * (D + C),
        )
