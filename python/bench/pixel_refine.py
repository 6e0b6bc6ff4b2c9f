"""PAMR and PAR against the published form in plain torch, and a faster one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastcam import pixel_refine
from fastcam._dilated import neighbours
from fastcam.bench._harness import Case, CaseIterator, compiled

DILATIONS = (1, 2, 4, 8, 12, 24)


def published(masks: Tensor, image: Tensor, dilations: Sequence[int] = DILATIONS, iterations: int = 10) -> Tensor:
    """PAMR as its authors write it: dilated convolutions with one-hot kernels copy the neighbours into a tensor (B, C,
    48, H, W), again in every iteration."""
    one_hot = torch.eye(9, device=image.device)[:, None].reshape(9, 1, 3, 3)
    around = one_hot[[0, 1, 2, 3, 5, 6, 7, 8]]

    def copies(x: Tensor, kernel: Tensor) -> Tensor:
        flat = x.reshape(-1, 1, *x.shape[2:])
        planes = [F.conv2d(F.pad(flat, (d,) * 4, mode="replicate"), kernel, dilation=d) for d in dilations]
        return torch.cat(planes, 1).reshape(*x.shape[:2], -1, *x.shape[2:])

    std = copies(image, one_hot).std(2, keepdim=True)
    scores = -(copies(image, around) - image.unsqueeze(2)).abs() / (1e-8 + 0.1 * std)
    weights = scores.mean(1, keepdim=True).softmax(2)
    for _ in range(iterations):
        masks = (copies(masks, around) * weights).sum(2)
    return masks


def slices(masks: Tensor, image: Tensor, dilations: Sequence[int] = DILATIONS, iterations: int = 10) -> Tensor:
    """The same with shifted slices and no copies of masks: what is easily had in plain torch."""
    H, W, reach = *masks.shape[2:], max(dilations)
    offsets = neighbours(dilations)

    def shifted(padded: Tensor, offset: tuple[int, int]) -> Tensor:
        y, x = reach + offset[0], reach + offset[1]
        return padded[:, :, y : y + H, x : x + W]

    padded = F.pad(image, (reach,) * 4, mode="replicate")
    samples = torch.stack([shifted(padded, o) for o in offsets] + [image] * len(dilations))
    unit = 1e-8 + 0.1 * samples.std(0)
    weights = torch.stack([-((shifted(padded, o) - image).abs() / unit).mean(1) for o in offsets], 1).softmax(1)
    for _ in range(iterations):
        padded, masks = F.pad(masks, (reach,) * 4, mode="replicate"), torch.zeros_like(masks)
        for p, offset in enumerate(offsets):
            masks.addcmul_(shifted(padded, offset), weights[:, p, None])
    return masks


def cases(device: str) -> CaseIterator:
    """VOC images with 2 and 21 masks, ToCo's crops with 4."""
    g = torch.Generator().manual_seed(0)
    for B, C, H, W in ((1, 4, 224, 224), (1, 2, 375, 500), (1, 21, 375, 500)):
        B = 16 * B if device == "cuda" else B
        image = F.interpolate(torch.rand(B, 3, H // 8, W // 8, generator=g), (H, W), mode="bilinear").to(device)
        image += 0.05 * torch.rand(B, 3, H, W, generator=g).to(device)
        masks = torch.rand(B, C, H, W, generator=g).to(device)
        fused = compiled(slices)
        runners: dict[str, Callable[[], Any]] = {"fastcam": lambda m=masks, i=image: pixel_refine(m, i, mode="pamr")}
        if device == "cuda":
            runners["fastcam triton"] = lambda m=masks, i=image: pixel_refine(m, i, mode="pamr", backend="triton")
        runners["shifted slices"] = lambda m=masks, i=image: slices(m, i)
        if C < 21:  # with 21 the published form takes 2.5 GB and most of a minute
            runners["published: one-hot convolutions"] = lambda m=masks, i=image: published(m, i)
            runners["shifted slices, torch.compile"] = lambda m=masks, i=image, f=fused: f(m, i)
        yield Case(
            name=f"B {B}, {C} masks, {H} x {W}, PAMR, 48 neighbours, 10 iterations",
            runners=runners,
            expected=lambda m=masks, i=image: slices(m, i),
            moved=4 * B * H * W * (3 + 2 * C),
            operations=2 * 10 * 48 * B * C * H * W,
        )
