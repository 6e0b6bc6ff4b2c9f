"""Labels of an image against fusing its maps and taking the arg-max, with and without fastcam's fusion."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import cam_fuse, cam_label
from fastcam.bench._harness import Case, CaseIterator, compiled
from fastcam.bench.cam_fuse import SCALES, irn, network_outputs, sizes_of

BACKGROUND = 0.15


def argmax(maps: Tensor, keys: Tensor) -> Tensor:
    """Labels of fused maps ``(1, n, H, W)``."""
    scores = torch.cat([torch.full_like(maps[:, :1], BACKGROUND), maps], 1)
    return torch.cat([keys.new_zeros(1), keys + 1])[scores.argmax(1)].to(torch.uint8)


def selected(cams: list[Tensor], H: int, W: int, keys: Tensor) -> Tensor:
    """IRN's full-size maps of the present classes, then their arg-max."""
    return argmax(irn([c[:, keys] for c in cams], H, W, slice(None))[1], keys)


def published(cams: list[Tensor], H: int, W: int, keys: Tensor) -> Tensor:
    """The same as published: every class is resized."""
    return argmax(irn(cams, H, W, keys)[1], keys)


def cases(device: str) -> CaseIterator:
    """An image at four scales with its mirror images, a constant background."""
    for H, W, C, present in ((375, 500, 20, 3), (375, 500, 20, 20), (1024, 2048, 19, 19)):
        cams = network_outputs(H, W, C, device)
        keys = torch.arange(present, device=device) * (C // present)
        _, whole = sizes_of(H, W)
        flips = [False, True] * len(SCALES)

        def views(cams=cams, keys=keys) -> list[Tensor]:
            return [view for cam in cams for view in cam[:, keys].split(1)]

        def ours(views=views, keys=keys, H=H, W=W, whole=whole, flips=flips) -> Tensor:
            return cam_label(views(), (H, W), background=BACKGROUND, keys=keys, grid=whole, flips=flips)

        def fused(views=views, keys=keys, H=H, W=W, whole=whole, flips=flips) -> Tensor:
            return argmax(cam_fuse(views(), (H, W), grid=whole, flips=flips), keys)

        rivals = {
            "IRN, arg-max": published,
            "IRN, classes selected first, arg-max": selected,
            "the same, torch.compile": compiled(selected),
        }
        yield Case(
            name=f"{W} x {H}, {C} classes, {present} present, 4 scales mirrored, float32",
            runners={
                "fastcam": ours,
                "cam_fuse, arg-max": fused,
                **{name: lambda f=f, cams=cams, keys=keys, H=H, W=W: f(cams, H, W, keys) for name, f in rivals.items()},
            },
            expected=lambda cams=cams, keys=keys, H=H, W=W: selected(cams, H, W, keys),
            tolerance=0.0,
            flips=1e-4,
            moved=4 * sum(c[:, keys].numel() for c in cams) + H * W,
            operations=present * H * W * len(SCALES) * 4,
        )
