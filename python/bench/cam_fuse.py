"""Fusion of class activation maps against IRN's loop, the same with the classes selected first, and PSA's loop."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastcam import cam_fuse
from fastcam.bench._harness import Case, CaseIterator, compiled

SCALES = (1.0, 0.5, 1.5, 2.0)
STRIDE = 16
Pair = tuple[Tensor, Tensor]


def network_outputs(H: int, W: int, C: int, device: str) -> list[Tensor]:
    """Maps of an image and of its mirror image ``(2, C, h, w)`` at every scale."""
    g = torch.Generator().manual_seed(0)
    sizes = [((round(H * s) - 1) // STRIDE + 1, (round(W * s) - 1) // STRIDE + 1) for s in SCALES]
    return [torch.rand(2, C, h, w, generator=g).to(device) for h, w in sizes]


def sizes_of(H: int, W: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """IRN's sizes: strided by 4, and rounded up to multiples of 16."""
    return ((H - 1) // 4 + 1, (W - 1) // 4 + 1), (-(-H // STRIDE) * STRIDE, -(-W // STRIDE) * STRIDE)


def irn(cams: list[Tensor], H: int, W: int, keys: Tensor | slice) -> Pair:
    """``make_cam`` as published: every class is resized to both sizes, then the present ones are selected."""
    strided, whole = sizes_of(H, W)
    merged = [c[:1] + c[1:].flip(-1) for c in cams]
    maps = []
    for size in (strided, whole):
        resized = [F.interpolate(m, size, mode="bilinear", align_corners=False) for m in merged]
        total = torch.stack(resized).sum(0)[:, :, :H, :W][:, keys]
        maps.append(total / (F.adaptive_max_pool2d(total, (1, 1)) + 1e-5))
    return maps[0], maps[1]


def irn_selected(cams: list[Tensor], H: int, W: int, keys: Tensor) -> Pair:
    """The same with the present classes selected first: one line moved."""
    return irn([c[:, keys] for c in cams], H, W, slice(None))


def psa(cams: list[Tensor], H: int, W: int, keys: Tensor) -> Tensor:
    """PSA's and MCTformer's loop: every view at full size, multiplied by the tags, mirrored and added in numpy."""
    tags = np.zeros((cams[0].shape[1], 1, 1), np.float32)
    tags[keys.cpu().numpy()] = 1
    views = []
    for cam in cams:
        for flip in (0, 1):
            full = F.interpolate(cam[flip : flip + 1], (H, W), mode="bilinear", align_corners=False)[0]
            view = full.cpu().numpy() * tags
            views.append(view[..., ::-1] if flip else view)
    total = np.sum(views, axis=0)
    return torch.from_numpy(total / (total.max((1, 2), keepdims=True) + 1e-5))[None, keys.cpu()]


def fused(cams: list[Tensor], H: int, W: int, backend: str | None = None) -> Pair:
    """Both results by fastcam, of all classes that ``cams`` hold."""
    strided, whole = sizes_of(H, W)
    views = [view for cam in cams for view in cam.split(1)]
    flips = [False, True] * len(cams)
    small = cam_fuse(views, strided, flips=flips, backend=backend)
    return small, cam_fuse(views, (H, W), grid=whole, flips=flips, backend=backend)


def cases(device: str) -> CaseIterator:
    """An image at four scales with its mirror images: strided and full-size maps of the present classes."""
    for H, W, C, present in (
        (375, 500, 20, 1),
        (375, 500, 20, 3),
        (375, 500, 20, 20),
        (375, 500, 80, 3),
        (480, 640, 80, 3),
    ):
        cams = network_outputs(H, W, C, device)
        keys = torch.arange(present, device=device) * (C // present)
        strided, whole = sizes_of(H, W)
        views = [view for cam in cams for view in cam.split(1)]
        tags = torch.zeros(1, C, dtype=torch.bool, device=device)
        tags[:, keys] = True

        def selected(backend=None, cams=cams, keys=keys, H=H, W=W) -> Pair:
            return fused([c[:, keys] for c in cams], H, W, backend)

        def dense(views=views, tags=tags, keys=keys, H=H, W=W, whole=whole) -> Tensor:
            return cam_fuse(views, (H, W), grid=whole, flips=[False, True] * len(SCALES), present=tags)

        ours = {"fastcam": selected, "fastcam, full size only, absent classes written as 0": dense}
        if device == "cuda":
            ours |= {f"fastcam {name}": lambda name=name, f=selected: f(name) for name in ("cuda", "triton")}
        yield Case(
            name=f"{W} x {H}, {C} classes, {present} present, 4 scales mirrored, float32",
            runners={
                **ours,
                **{
                    name: lambda f=f, cams=cams, keys=keys, H=H, W=W: f(cams, H, W, keys)
                    for name, f in {
                        "IRN": irn,
                        "IRN, torch.compile": compiled(irn),
                        "IRN, classes selected first": irn_selected,
                        "PSA (torch and numpy), full size only": psa,
                    }.items()
                },
            },
            expected=lambda cams=cams, keys=keys, H=H, W=W: irn([c.double() for c in cams], H, W, keys),
            unchecked={
                "fastcam, full size only, absent classes written as 0": "one of the two results, with all classes",
                "PSA (torch and numpy), full size only": "one of the two results, without IRN's rounding of the size",
            },
            moved=4 * (sum(c[:, keys].numel() for c in cams) + present * (H * W + strided[0] * strided[1])),
            operations=present * H * W * len(SCALES) * 4,
        )
    yield from with_gradient(device)


def with_gradient(device: str) -> CaseIterator:
    """A training step's maps: a batch, two scales, forward and backward."""
    g = torch.Generator().manual_seed(0)
    B, C, H, W = 4, 20, 128, 128
    views = [torch.rand(B, C, n, n, generator=g).to(device) for n in (32, 16)]
    weight = torch.randn(B, C, H, W, generator=g).to(device)

    def eager(views: list[Tensor]) -> Tensor:
        one, *others = [F.interpolate(v.relu(), (H, W), mode="bilinear", align_corners=False) for v in views]
        x = sum(others, one)
        return x / (x.amax((2, 3), keepdim=True) + 1e-5)

    def both(f) -> tuple[Tensor, ...]:
        leaves = [v.detach().requires_grad_() for v in views]
        return torch.autograd.grad(f(leaves), leaves, weight)

    step = compiled(eager)
    yield Case(
        name=f"B {B}, {C} classes, 32 x 32 and 16 x 16 to {H} x {W}, float32, forward and backward",
        runners={
            "fastcam": lambda: both(lambda v: cam_fuse(v, (H, W))),
            "torch": lambda: both(eager),
            "the same, torch.compile": lambda: both(step),
        },
        expected=lambda: both(eager),
        tolerance=1e-3,  # sums over all pixels
        moved=4 * (2 * sum(v.numel() for v in views) + 2 * weight.numel()),
        operations=B * C * H * W * len(views) * 8,
    )
