"""Confusion matrices at many thresholds against an arg-max and a confusion matrix for each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastcam import cam_sweep
from fastcam.bench._harness import Case, CaseIterator, compiled


def one_threshold(scores: Tensor, target: Tensor, t: Tensor, C: int) -> Tensor:
    """Confusion matrix of one image at one threshold."""
    pred = torch.cat([t.expand_as(scores[:1]), scores]).argmax(0)
    flat = torch.where(target == 255, (C + 1) ** 2, target * (C + 1) + pred)
    return torch.zeros((C + 1) ** 2 + 1, dtype=torch.int64, device=scores.device).scatter_add_(
        0, flat.flatten(), torch.ones_like(flat.flatten())
    )[:-1].reshape(C + 1, C + 1)  # fmt: skip


compiled_threshold = compiled(one_threshold)


def torch_loop(scores: Tensor, target: Tensor, thresholds: Tensor, C: int) -> Tensor:
    """One arg-max and one confusion matrix a threshold, each compiled."""
    return torch.stack([compiled_threshold(scores, target, t, C) for t in thresholds])


def numpy_loop(scores: Tensor, target: Tensor, thresholds: Tensor, C: int) -> Tensor:
    """The same in numpy, as the published evaluation scripts do."""
    maps, true = scores.cpu().numpy(), target.cpu().numpy()
    counts = true != 255
    matrices = []
    for t in thresholds.tolist():
        pred = np.pad(maps, ((1, 0), (0, 0), (0, 0)), constant_values=t).argmax(0)
        flat = (C + 1) * true[counts] + pred[counts]
        matrices.append(np.bincount(flat, minlength=(C + 1) ** 2).reshape(C + 1, C + 1))
    return torch.from_numpy(np.stack(matrices))


def cases(device: str) -> CaseIterator:
    """One image, maps of the present classes."""
    for H, W, C, present, T in (
        (375, 500, 20, 3, 1),
        (375, 500, 20, 3, 100),
        (375, 500, 20, 20, 100),
        (480, 640, 80, 3, 100),
    ):
        g = torch.Generator().manual_seed(0)
        scores = torch.rand(present, H, W, generator=g).to(device)
        keys = torch.arange(present, device=device) * (C // present)
        target = torch.cat([keys.new_zeros(1), keys + 1])[
            torch.randint(0, present + 1, (H // 25, W // 20), generator=g).to(device)
        ]
        target = target.repeat_interleave(25, 0).repeat_interleave(20, 1)
        target = torch.nn.functional.pad(target, (0, W - target.shape[1], 0, H - target.shape[0]), value=255)
        thresholds = torch.linspace(0, 1, T, device=device) if T > 1 else torch.tensor([0.15], device=device)
        compact = scores, target, thresholds

        def ours(compact=compact, C=C, keys=keys) -> Tensor:
            scores, target, thresholds = compact
            return cam_sweep(scores[None], target[None], thresholds, num_classes=C, keys=keys)

        def spread(f, compact=compact, C=C, keys=keys) -> Tensor:
            """A loop that knows nothing of keys, on the present classes, its matrix spread over all labels."""
            scores, target, thresholds = compact
            labels = torch.cat([keys.new_zeros(1), keys + 1])
            narrow = torch.full((256,), 255, device=labels.device)
            narrow[labels] = torch.arange(len(labels), device=labels.device)
            counts = f(scores, narrow[target], thresholds, len(keys)).to(labels.device)
            full = counts.new_zeros(len(thresholds), C + 1, C + 1)
            full[:, labels[:, None], labels] = counts
            return full

        loops = {"arg-max and confusion a threshold, numpy": numpy_loop, "the same, torch.compile": torch_loop}
        yield Case(
            name=f"{W} x {H}, {C} classes, {present} present, {T} threshold{'s' * (T > 1)}, float32",
            runners={"fastcam": ours, **{name: lambda f=f, s=spread: s(f) for name, f in loops.items()}},
            expected=lambda s=spread: s(numpy_loop),
            tolerance=0.0,
            moved=4 * scores.numel() + target.numel() + 8 * T * (C + 1) ** 2,
            operations=0.0,
        )
