"""Path affinity against IRN's gather by index arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcam import path_affinity
from fastcam._paths import crop, paths, sources
from fastcam.bench._harness import Case, CaseIterator


def irn_indices(height: int, width: int, radius: int) -> list[Tensor]:
    """For each destination the flat indices (path, sources) into an image padded as IRN pads it."""
    tall, wide = height + radius, width + 2 * radius
    every = torch.arange(tall * wide).reshape(tall, wide)
    margin = radius - 1
    rows, columns = tall - margin, wide - 2 * margin
    return [
        torch.stack([every[y : y + rows, margin + x : margin + x + columns].flatten() for y, x in path])
        for path in paths(radius)
    ]


def irn(edge: Tensor, radius: int, indices: list[Tensor] | None = None) -> Tensor:
    """IRN's form: pad with boundaries, gather every path of every source, take the maximum. Without ``indices`` it
    makes them, as IRN does for every image."""
    H, W = edge.shape[1:]
    padded = F.pad(edge, (radius, radius, 0, radius), value=1.0)
    if indices is None:
        indices = irn_indices(H, W, radius)
    planes = [1 - padded.flatten(1)[:, index].amax(1) for index in indices]
    return torch.stack(planes, 1).reshape(len(edge), -1, H + 1, W + 2)[:, :, :H, 1 : W + 1].contiguous()


def slices(edge: Tensor, radius: int) -> Tensor:
    """Maxima of shifted slices, the fastest form in plain torch."""
    B, H, W = edge.shape
    out = edge.new_zeros((B, len(paths(radius)), H, W))
    for p, path in enumerate(paths(radius)):
        window = sources(path[0], H, W)
        largest = crop(edge, window, path[0])
        for offset in path[1:]:
            largest = torch.maximum(largest, crop(edge, window, offset))
        crop(out[:, p], window).copy_(1 - largest)
    return out


def cases(device: str) -> CaseIterator:
    """IRN's inference (VOC at a quarter of the size, radius 5), and training (crops of 512, radius 10)."""
    g = torch.Generator().manual_seed(0)
    for B, H, W, radius in ((1, 94, 125, 5), (1, 128, 128, 10)):
        edge = torch.rand(B, H, W, generator=g).pow(3).to(device)
        indices = [index.to(device) for index in irn_indices(H, W, radius)]
        steps = sum(len(path) for path in paths(radius))
        ours: dict[str, Callable[[], Any]] = {"fastcam": lambda edge=edge, r=radius: path_affinity(edge, radius=r)}
        if device == "cuda":
            ours["fastcam triton"] = lambda edge=edge, r=radius: path_affinity(edge, radius=r, backend="triton")
        yield Case(
            name=f"B {B}, {H} x {W}, radius {radius}, forward",
            runners={
                **ours,
                "IRN: gather by indices": lambda edge=edge, r=radius: irn(edge, r),
                "the same, indices made before": lambda edge=edge, r=radius, i=indices: irn(edge, r, i),
                "shifted slices": lambda edge=edge, r=radius: slices(edge, r),
            },
            expected=lambda edge=edge, r=radius: irn(edge, r),
            moved=4 * edge.numel() * (1 + len(paths(radius))),
            operations=edge.numel() * steps,
        )

        def gradient(form: str, edge: Tensor = edge, r: int = radius, i: list[Tensor] = indices) -> Tensor:
            leaf = edge.detach().requires_grad_()
            out = path_affinity(leaf, radius=r) if form == "fastcam" else irn(leaf, r, i)
            return torch.autograd.grad(out.square().sum() / 100, leaf)[0]

        yield Case(
            name=f"B {B}, {H} x {W}, radius {radius}, forward and backward",
            runners={
                "fastcam": lambda f=gradient: f("fastcam"),
                "IRN: gather, indices made before": lambda f=gradient: f("irn"),
            },
            expected=lambda f=gradient: f("irn"),
            tolerance=1e-3,
            moved=8 * edge.numel() * (1 + len(paths(radius))),
            operations=3 * edge.numel() * steps,
        )
