"""SLIC in plain PyTorch, on whole numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam._lab import rgb_to_lab, to_bytes
from fastcam._slic import Grid, grid, spread

LIMIT = 127  # half units of colour difference that count in one channel
FAR = 65535  # largest distance, and the one of a centre out of reach


def superpixel_slic_fwd(
    image: Tensor, n_segments: int, compactness: float, iterations: int, connect: bool
) -> Tensor:  # fmt: skip
    """RGB ``(B, 3, H, W)`` -> superpixels int32 ``(B, H, W)``."""
    B, _, H, W = image.shape
    if image.numel() == 0:
        return torch.zeros(B, H, W, dtype=torch.int32, device=image.device)
    lab = rgb_to_lab(to_bytes("superpixel_slic", image))
    plan = grid(H, W, n_segments)
    labels = torch.stack([_cluster(one, plan, compactness, iterations) for one in lab])
    return (join_small(labels, plan.rows * plan.columns) if connect else labels).to(torch.int32)


def _cluster(lab: Tensor, plan: Grid, compactness: float, iterations: int) -> Tensor:
    """Lab ``(3, H, W)`` -> each pixel's centre, int64 ``(H, W)``."""
    H, W = lab.shape[1:]
    rows, columns, reach, stride = plan
    K = rows * columns
    y = (2 * torch.arange(rows, device=lab.device) + 1) * H // (2 * rows)
    x = (2 * torch.arange(columns, device=lab.device) + 1) * W // (2 * columns)
    of_row = torch.arange(H, device=lab.device) * rows // H
    of_column = torch.arange(W, device=lab.device) * columns // W
    labels = of_row[:, None] * columns + of_column
    centres = torch.stack([y[:, None].expand(rows, columns), x.expand(rows, columns)]).reshape(2, K)
    centres = _to_lowest_gradient(lab, centres)
    colours = lab[:, centres[0], centres[1]].long()

    offsets = torch.arange(-reach, reach + 1, device=lab.device)
    square = offsets * offsets
    place = (spread(H, W, K, compactness) * (square[:, None] + square).double() + 0.5).floor().clamp(max=FAR).long()
    number = torch.arange(K, device=lab.device)[:, None, None]
    for t in range(iterations + 1):
        last = t == iterations
        wy, wx = centres[0][:, None, None] + offsets[:, None], centres[1][:, None, None] + offsets  # windows
        inside = (wy >= 0) & (wy < H) & (wx >= 0) & (wx < W)
        if not last:
            inside = inside & (wy % stride == t % stride)
        at = wy.clamp(0, H - 1) * W + wx.clamp(0, W - 1)
        seen = lab.flatten(1)[:, at]
        difference = (seen - colours[:, :, None, None]).abs().clamp(max=LIMIT)
        distance = (difference.square().sum(0) + place).clamp(max=FAR)
        key = torch.where(inside & (distance < FAR), distance, FAR) * (FAR + 1) + number
        nearest = labels.new_full((H * W,), FAR * (FAR + 1)).scatter_reduce_(0, at.flatten(), key.flatten(), "amin")
        labels = torch.where(nearest < FAR * (FAR + 1), nearest % (FAR + 1), labels.flatten()).view(H, W)
        if last:
            break
        mine = (inside & (labels.flatten()[at] == number)).long()
        count = mine.sum((1, 2))
        parts = [wy.expand_as(at), wx.expand_as(at), *seen]
        means = [((part * mine).sum((1, 2)) + count // 2) // count.clamp(min=1) for part in parts]
        moved = torch.where(count > 0, torch.stack(means), torch.cat([centres, colours]))
        centres, colours = moved[:2], moved[2:]
    return labels


def _to_lowest_gradient(lab: Tensor, centres: Tensor) -> Tensor:
    """Centres ``(2, K)`` moved to the pixel around them, the first in scan order, whose colours change least."""
    H, W = lab.shape[1:]
    down, up = (
        (torch.arange(H, device=lab.device) + 1).clamp(max=H - 1),
        (torch.arange(H, device=lab.device) - 1).clamp(min=0),
    )
    right, left = (
        (torch.arange(W, device=lab.device) + 1).clamp(max=W - 1),
        (torch.arange(W, device=lab.device) - 1).clamp(min=0),
    )
    change = (lab[:, down] - lab[:, up]).abs() + (lab[:, :, right] - lab[:, :, left]).abs()
    step = torch.arange(-1, 2, device=lab.device)
    y = (centres[0][:, None] + step.repeat_interleave(3)).clamp(0, H - 1)
    x = (centres[1][:, None] + step.repeat(3)).clamp(0, W - 1)
    best = change.sum(0)[y, x].argmin(1, keepdim=True)
    return torch.cat([y.gather(1, best), x.gather(1, best)], 1).T


def join_small(labels: Tensor, centres: int) -> Tensor:
    """The 4-connected pieces of labels ``(B, H, W)``, the small ones joined to others, numbered in scan order."""
    B, H, W = labels.shape
    root = pieces(labels)
    flat = root.flatten(1)
    size = torch.zeros_like(flat).scatter_add_(1, flat, torch.ones_like(flat))
    pixel = torch.arange(H * W, device=labels.device).expand(B, -1)
    before = torch.where(pixel >= W, pixel - W, (pixel - 1).clamp(min=0))  # above, or in the top row to the left
    joins = (flat == pixel) & (size * 4 * centres < H * W) & (pixel > 0)
    parent = torch.where(joins, flat.gather(1, before), flat)
    while not torch.equal(parent, further := parent.gather(1, parent)):
        parent = further
    kept = parent == pixel
    return ((kept.cumsum(1) - 1).gather(1, parent)).view(B, H, W)


def pieces(labels: Tensor) -> Tensor:
    """For every pixel of labels ``(B, H, W)`` the first pixel, in scan order, of its 4-connected piece."""
    B, H, W = labels.shape
    root = torch.arange(H * W, device=labels.device).view(1, H, W).repeat(B, 1, 1)
    vertical, horizontal = labels[:, 1:] == labels[:, :-1], labels[:, :, 1:] == labels[:, :, :-1]
    while True:
        before = root.clone()
        for same, a, b in (
            (vertical, (slice(None), slice(1, None)), (slice(None), slice(None, -1))),
            (horizontal, (slice(None), slice(None), slice(1, None)), (slice(None), slice(None), slice(None, -1))),
        ):
            least = torch.minimum(root[a], root[b])
            first, second = torch.where(same, least, root[a]), torch.where(same, least, root[b])
            root[a] = torch.minimum(root[a], first)
            root[b] = torch.minimum(root[b], second)
        flat = root.flatten(1)
        root = flat.gather(1, flat).view(B, H, W)
        if torch.equal(root, before):
            return root
