"""AffinityNet's affinity against the published gather by index arrays."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastcam import feature_affinity
from fastcam._paths import count, crop, destinations, sources
from fastcam.bench._harness import Case, CaseIterator


def psa(f: Tensor, radius: int) -> Tensor:
    """The published form: gather the features of all inner sources and of their destinations, then average. Scattered
    into planes at the end, for the comparison."""
    B, D, H, W = f.shape
    margin = radius - 1
    every = torch.arange(H * W, device=f.device).reshape(H, W)
    rows, columns = H - margin, W - 2 * margin
    source = every[:rows, margin : margin + columns].flatten()
    there = torch.cat(
        [every[y : y + rows, margin + x : margin + x + columns].flatten() for y, x in destinations(radius)]
    )
    flat = f.flatten(2)
    pairs = flat.index_select(2, there).reshape(B, D, -1, len(source))
    a = torch.exp(-(flat.index_select(2, source).unsqueeze(2) - pairs).abs().mean(1))
    out = f.new_zeros((B, count(radius), H * W))
    out[:, :, source] = a
    return out.reshape(B, -1, H, W)


def slices(f: Tensor, radius: int) -> Tensor:
    """Shifted slices."""
    B, _, H, W = f.shape
    out = f.new_zeros((B, count(radius), H, W))
    for p, offset in enumerate(destinations(radius)):
        window = sources(offset, H, W, radius - 1)
        crop(out[:, p], window).copy_(torch.exp(-(crop(f, window) - crop(f, window, offset)).abs().mean(1)))
    return out


def cases(device: str) -> CaseIterator:
    """AffinityNet's training crops: 448 features at 56 x 56."""
    B, D, H, W = (8 if device == "cuda" else 1), 448, 56, 56
    g = torch.Generator().manual_seed(0)
    f = torch.randn(B, D, H, W, generator=g).to(device)
    weight = torch.randn(B, count(5), H, W, generator=g).to(device)
    forms: dict[str, Callable[[Tensor], Tensor]] = {
        "fastcam": lambda f: feature_affinity(f, sources="inner"),
        "PSA: gather by indices": lambda f: psa(f, 5),
        "shifted slices": lambda f: slices(f, 5),
    }
    if device == "cuda":
        forms["fastcam triton"] = lambda f: feature_affinity(f, sources="inner", backend="triton")
    yield Case(
        name=f"B {B}, D {D}, {H} x {W}, radius 5, forward",
        runners={name: lambda form=form: form(f) for name, form in forms.items()},
        expected=lambda: psa(f, 5),
        moved=4 * B * H * W * (D + count(5)),
        operations=3 * B * H * W * D * count(5),
    )

    def gradient(form: str) -> Tensor:
        leaf = f.detach().requires_grad_()
        return torch.autograd.grad(forms[form](leaf), leaf, weight)[0]

    yield Case(
        name=f"B {B}, D {D}, {H} x {W}, radius 5, forward and backward",
        runners={name: lambda name=name: gradient(name) for name in forms},
        expected=lambda: gradient("PSA: gather by indices"),
        moved=4 * B * H * W * 3 * (D + count(5)),
        operations=9 * B * H * W * D * count(5),
    )
