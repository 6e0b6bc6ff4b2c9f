"""Attention with summed maps against attention that keeps every block's weights, and against attention without maps."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcam import attention_maps
from fastcam.bench._harness import Case, CaseIterator

HEADS, CHANNELS, CLASSES = 6, 64, 21  # DeiT-S with the tokens of VOC
Form = Callable[[Tensor, Tensor, Tensor, Tensor | None, int], tuple[Tensor, Tensor]]


def stored(q: Tensor, k: Tensor, v: Tensor, total: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """Softmax in a tensor of its own, as MCTformer and CTI do."""
    weights = (q * CHANNELS**-0.5 @ k.mT).softmax(dim=-1)
    maps = weights.mean(1)[:, :rows, CLASSES:]
    return weights @ v, maps if total is None else total + maps


def stored_and_kept(blocks: Sequence[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """As the authors' forward pass: a list of every block's weights, averaged and summed at its end."""
    kept, outs = [], []
    for q, k, v in blocks:
        kept.append((q * CHANNELS**-0.5 @ k.mT).softmax(dim=-1))
        outs.append(kept[-1] @ v)
    return torch.stack(outs).sum(0), torch.stack(kept).mean(2).sum(0)[:, :, CLASSES:]


def summed(blocks: Sequence[tuple[Tensor, Tensor, Tensor]], backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The same by the op."""
    total, outs = None, []
    for q, k, v in blocks:
        out, total = attention_maps(q, k, v, total, skip=CLASSES, backend=backend)
        outs.append(out)
    assert total is not None
    return torch.stack(outs).sum(0), total


def without_maps(q: Tensor, k: Tensor, v: Tensor, total: Tensor | None, rows: int) -> tuple[Tensor, Tensor]:
    """torch's fused attention: what maps may cost is measured from here."""
    out = F.scaled_dot_product_attention(q, k, v)
    return out, out.new_zeros(len(q), rows, q.shape[2] - CLASSES)


def ours(backend: str | None) -> Form:
    """The op by one backend."""
    return lambda q, k, v, total, rows: attention_maps(q, k, v, total, rows=rows, skip=CLASSES, backend=backend)


def cases(device: str) -> CaseIterator:
    """One block at the sizes of training and inference; then all twelve blocks with what their backward pass keeps."""
    g = torch.Generator().manual_seed(0)
    forms = {"fastcam": ours(None)}
    if device == "cuda":
        forms["fastcam triton"] = ours("triton")
    else:
        forms["reference"] = ours("reference")
    forms |= {"weights stored": stored, "fused attention without maps": without_maps}
    without = {"fused attention without maps": "computes no maps"}
    batch = 64 if device == "cuda" else 8

    def inputs(B: int, T: int) -> tuple[Tensor, ...]:
        qkv = torch.randn(B, T, 3, HEADS, CHANNELS, generator=g).to(device).permute(2, 0, 3, 1, 4)
        return tuple(qkv.unbind())

    for what, B, T in (("training", batch, 217), ("inference", 2, 734)):
        x, total = inputs(B, T), torch.rand(B, T, T - CLASSES, generator=g).to(device)
        pairs = B * HEADS * T * T * CHANNELS
        size = f"{what}, B {B}, {T} tokens"
        for rows in (T, CLASSES):
            t = total[:, :rows].contiguous()
            yield Case(
                name=f"{size}, maps of {'all' if rows == T else 'class'} rows, forward",
                runners={
                    name: lambda f=f, x=x, t=t, rows=rows: f(x[0], x[1], x[2], t, rows) for name, f in forms.items()
                },
                expected=lambda x=x, t=t, rows=rows: stored(x[0], x[1], x[2], t, rows),
                moved=4 * (4 * x[0].numel() + 2 * t.numel()),
                operations=4 * pairs,
                unchecked=without,
            )
        if what == "training":
            weights = [torch.randn(s, generator=g).to(device) for s in (x[0].shape, total.shape)]

            def both(form: Form, x: tuple[Tensor, ...] = x, total: Tensor = total, weights: list[Tensor] = weights):
                q, k, v = (t.detach().requires_grad_() for t in x)
                results = form(q, k, v, total, total.shape[1])
                used = [(t, w) for t, w in zip(results, weights, strict=True) if t.requires_grad]
                return torch.autograd.grad([t for t, _ in used], (q, k, v), [w for _, w in used])

            yield Case(
                name=f"{size}, maps of all rows, forward and backward",
                runners={name: lambda f=f, both=both: both(f) for name, f in forms.items()},
                expected=lambda both=both: both(stored),
                moved=4 * (11 * x[0].numel() + 3 * total.numel()),
                operations=14 * pairs,
                unchecked=without,
            )

    blocks = [inputs(batch // 2, 217) for _ in range(12)]

    def training(form: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        out, total = form([tuple(t.detach().requires_grad_() for t in block) for block in blocks])
        return out.detach(), total.detach()

    yield Case(
        name=f"12 blocks, B {batch // 2}, 217 tokens, forward with what backward needs",
        runners={
            "fastcam": lambda: training(summed),
            "weights stored and kept": lambda: training(stored_and_kept),
        },
        expected=lambda: training(stored_and_kept),
        moved=12 * 4 * 4 * blocks[0][0].numel(),
        operations=12 * 4 * batch // 2 * HEADS * 217 * 217 * CHANNELS,
    )
