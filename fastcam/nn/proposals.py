"""Masks that may be objects, from the tree of merges of an image's regions."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam.ops.region_merge import region_merge
from fastcam.ops.superpixel_slic import superpixel_slic


def tree_proposals(
    image: Tensor, *, superpixels: int = 400, count: int = 1000, area: tuple[float, float] = (2e-3, 0.85)
) -> Tensor:
    """The regions of a merge tree as segment proposals: every superpixel and every merge is one.

    The last merges are those of the most different regions, so that what they join are the whole things of an image:
    proposals come largest first, which is nearly the order from the root down.

    Args:
        image: RGB uint8 ``(3, H, W)``.
        superpixels: to start from.
        count: at most so many proposals.
        area: proposals below the first fraction of the image, or at or above the second, are left out.

    Returns:
        bool ``(J, H, W)``, the largest first.
    """
    labels = superpixel_slic(image[None], superpixels)
    tree = region_merge(labels, image[None], criterion="best_first", stop=0)[0]
    leaves = int(labels.max()) + 1
    member = torch.zeros(leaves + len(tree.merges), leaves, dtype=torch.bool)
    member[:leaves] = torch.eye(leaves, dtype=torch.bool)
    current = list(range(leaves))  # the row of the region that a label stands for now
    for row, (keep, gone) in enumerate(tree.merges.tolist(), start=leaves):
        member[row] = member[current[keep]] | member[current[gone]]
        current[keep] = row
    share = (member.double() @ labels.flatten().bincount(minlength=leaves).double().cpu()) / labels[0].numel()
    kept = ((share >= area[0]) & (share < area[1])).nonzero().flatten()
    order = kept[share[kept].argsort(descending=True, stable=True)][:count]
    return member[order].to(labels.device)[:, labels[0].long()]
