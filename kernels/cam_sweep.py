"""Counts of true label, best class and thresholds exceeded in Triton. Integer atomics: any order gives the same."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["n", "P", "num_classes", "T", "ignore_index", "steps"])
def _cam_sweep_kernel(
    scores_ptr, target_ptr, thresholds_ptr, labels_ptr, present_ptr, counts_ptr,
    n, P, num_classes, T, ignore_index, steps, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK pixels of one image, one read of their scores."""
    b = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = p < P
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    winner = tl.zeros([BLOCK], tl.int64)
    for c in range(n):
        if tl.load(present_ptr + b * n + c) != 0:
            v = tl.load(scores_ptr + (b * n + c) * P + p, mask=inside, other=0.0).to(tl.float32)
            v = tl.where(v != v, float("inf"), v)
            winner = tl.where(v > best, tl.load(labels_ptr + c), winner)
            best = tl.where(v > best, v, best)
    # Binary search: `exceeded` thresholds are known to lie below.
    exceeded = tl.zeros([BLOCK], tl.int32)
    for step in range(steps):
        more = exceeded + (1 << (steps - 1 - step))
        t = tl.load(thresholds_ptr + tl.minimum(more, T) - 1, mask=more <= T, other=float("inf")).to(tl.float32)
        exceeded = tl.where(t < best, more, exceeded)
    true = tl.load(target_ptr + b * P + p, mask=inside, other=-1).to(tl.int64)
    inside &= (true != ignore_index) & (true >= 0) & (true <= num_classes)
    at = (true * (num_classes + 1) + winner) * (T + 1) + exceeded
    tl.atomic_add(counts_ptr + at, tl.full([BLOCK], 1, tl.int64), mask=inside)


BLOCK = 512


def cam_sweep_fwd(
    scores: Tensor, target: Tensor, thresholds: Tensor, labels: Tensor, present: Tensor | None, num_classes: int,
    ignore_index: int,
) -> Tensor:  # fmt: skip
    """Scores ``(B, n, H, W)``, true labels ``(B, H, W)``, ascending thresholds ``(T,)``, labels of channels ``(n,)`` ->
    counts int64 ``(C + 1, C + 1, T + 1)`` of true label, best label, number of thresholds below its score."""
    B, n, H, W = scores.shape
    T = len(thresholds)
    counts = torch.zeros((num_classes + 1, num_classes + 1, T + 1), dtype=torch.int64, device=scores.device)
    if target.numel() == 0:
        return counts
    there = torch.ones(B, n, dtype=torch.uint8, device=scores.device) if present is None else present.to(torch.uint8)
    _cam_sweep_kernel[(triton.cdiv(H * W, BLOCK), B)](
        scores.contiguous(), target.contiguous(), thresholds, labels, there.contiguous(), counts, n, H * W,
        num_classes, T, ignore_index, T.bit_length(), BLOCK,
    )  # fmt: skip
    return counts
