"""Features of regions: pooling over a region's own cells, contours, and how much a region stands out."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import dijkstra
from torch import Tensor

from fastcam._lab import rgb_to_lab, to_bytes
from fastcam.ops.region_graph import Graph, region_graph
from fastcam.ops.region_reduce import region_reduce

CHANNELS = 128  # pooled at a time: what is compared takes 12 bytes a channel and cell of a bin


def region_cells(regions: Tensor, stride: int) -> Tensor:
    """Which cells of a feature map each region covers with at least one pixel.

    Args:
        regions: int64 ``(H, W)``; negative pixels belong to no region.
        stride: pixels a cell is wide and high.

    Returns:
        int64 ``(P, 3)``: region, row, column, in that order.
    """
    y, x = (regions >= 0).nonzero().unbind(dim=1)
    return torch.stack([regions[y, x], y // stride, x // stride], dim=1).unique(dim=0)


def masked_roi_pool(features: Tensor, cells: Tensor, count: int, bins: int = 7) -> Tensor:
    """The largest feature of a region's cells in each part of its box.

    Row bin u of a box of h rows from y0 spans ``y0 + floor(u h / bins)`` to ``y0 + ceil((u + 1) h / bins) - 1``,
    columns alike: bins of small boxes overlap. For features that are not negative this is RoI pooling of the features
    with 0 outside the region.

    Args:
        features: of one image, ``(C, h, w)``. The gradient goes to the first cell, in row-major order, that has the
            largest value.
        cells: what :func:`region_cells` gave, inside the features.
        count: number of regions N.
        bins: rows and columns of bins.

    Returns:
        ``(N, C, bins, bins)``; 0 in a bin without a cell of its region.
    """
    region, place = cells[:, 0], cells[:, 1:]
    wide = region[:, None].expand(-1, 2)
    low = place.new_full((count, 2), torch.iinfo(torch.int64).max).scatter_reduce(0, wide, place, "amin")
    high = place.new_full((count, 2), -1).scatter_reduce(0, wide, place, "amax")
    size = (high - low + 1)[region][:, :, None]
    bin_ = torch.arange(bins, device=cells.device)
    at = (place - low[region])[:, :, None]
    inside = (at >= bin_ * size // bins) & (at < -(-(bin_ + 1) * size // bins))  # (P, 2, bins)
    pair, u, v = (inside[:, 0, :, None] & inside[:, 1, None]).nonzero().unbind(dim=1)
    slot = (region[pair] * bins + u) * bins + v
    flat = features.flatten(1).T[place[:, 0] * features.shape[2] + place[:, 1]]  # (P, C)
    parts = [
        _largest(flat[:, c : c + CHANNELS], pair, slot, count * bins**2) for c in range(0, flat.shape[1], CHANNELS)
    ]
    return torch.cat(parts, dim=1).view(count, bins, bins, -1).permute(0, 3, 1, 2)


def _largest(flat: Tensor, pair: Tensor, slot: Tensor, slots: int) -> Tensor:
    """Maxima ``(slots, C)`` of the rows ``pair`` of ``flat`` in each slot, 0 in an empty one."""
    where = slot[:, None].expand(-1, flat.shape[1])
    with torch.no_grad():
        values = flat[pair]
        best = values.new_full((slots, flat.shape[1]), -torch.inf).scatter_reduce(0, where, values, "amax")
        if not flat.requires_grad:
            return torch.where(best > -torch.inf, best, 0)
        order = torch.where(values == best[slot], pair[:, None], len(flat))
        first = pair.new_full((slots, flat.shape[1]), len(flat)).scatter_reduce(0, where, order, "amin")
    return torch.cat([flat, flat.new_zeros(1, flat.shape[1])]).gather(0, first)


def region_mean_pool(features: Tensor, cells: Tensor, count: int) -> Tensor:
    """The mean feature ``(N, C, 1, 1)`` of a region's cells; arguments as of :func:`masked_roi_pool`."""
    region, place = cells[:, 0], cells[:, 1:]
    flat = features.flatten(1).T[place[:, 0] * features.shape[2] + place[:, 1]]
    total = flat.new_zeros(count, flat.shape[1]).index_add(0, region, flat)
    return (total / region.bincount(minlength=count).clamp(min=1)[:, None])[:, :, None, None]


def gradient_contour(image: Tensor) -> Tensor:
    """How much the lightness changes around each pixel: largest less smallest CIE L of 3 x 3 pixels, divided by 100.

    Args:
        image: RGB ``(B, 3, H, W)`` in 0..255, uint8 or floating.

    Returns:
        float32 ``(B, H, W)`` in [0, 1]; pixels outside the image do not count.

    Raises:
        ValueError: an image that is not ``(B, 3, H, W)`` or holds a NaN.
    """
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"gradient_contour: expected image (B, 3, H, W), got {tuple(image.shape)}")
    light = rgb_to_lab(to_bytes("gradient_contour", image))[:, :1].float() / 2
    if light.numel() == 0:
        return light[:, 0]
    high, low = (torch.nn.functional.max_pool2d(sign * light, 3, stride=1, padding=1) for sign in (1, -1))
    return ((high + low) / 100).clamp(0, 1)[:, 0]


def geodesic_saliency(image: Tensor, regions: Tensor, *, slack: float = 4.0, graph: Graph | None = None) -> Tensor:
    """How far a region is from the image's border, in colour: a saliency for images that have none.

    The way from a region to the border costs, at each step to a neighbour, the distance of their mean colours; what
    can be reached from the border through small steps is background (Wei, Wen, Zhu, Sun, "Geodesic Saliency Using
    Background Priors", ECCV 2012).

    Args:
        image: RGB uint8 ``(3, H, W)``.
        regions: int ``(H, W)``, counted from 0.
        slack: CIE Lab distance that costs nothing, so that many small steps through a texture stay small.
        graph: of the regions, where it is at hand.

    Returns:
        float32 ``(H, W)`` in [0, 1], divided by its maximum: 0 where every region can be reached for nothing.
    """
    graph = region_graph(regions[None])[0] if graph is None else graph
    count = len(graph.area)
    colour = region_reduce(rgb_to_lab(image[None]).double() / 2, regions[None], num_regions=count)[0]
    border = torch.cat([regions[0], regions[-1], regions[:, 0], regions[:, -1]]).unique().cpu().long()
    i, j = graph.edges.cpu().T
    step = (torch.linalg.vector_norm(colour[i] - colour[j], dim=1).cpu() - slack).clamp(min=0)
    # scipy takes 0 for no edge, hence the 1e-9; the border is one more node, at which all its regions begin.
    ends = np.concatenate([i, np.full(len(border), count)]), np.concatenate([j, border])
    costs = np.concatenate([step + 1e-9, np.full(len(border), 1e-9)])
    way = dijkstra(csr_matrix((costs, ends), (count + 1, count + 1)), directed=False, indices=count)[:count]
    distance = torch.from_numpy(np.where(np.isfinite(way), way, 0.0))
    distance = torch.where(distance < 1e-3, 0, distance)
    largest = float(distance.max()) if count else 0.0
    return (distance / largest if largest > 0 else distance).float().to(regions.device)[regions.long()]
