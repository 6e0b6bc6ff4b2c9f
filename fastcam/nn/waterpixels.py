"""Waterpixels: superpixels by a watershed whose basins are kept round."""

from __future__ import annotations

import numpy as np
import torch
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree
from scipy.spatial import cKDTree
from torch import Tensor

from fastcam._slic import grid
from fastcam.nn.regions import gradient_contour
from fastcam.ops.superpixel_slic import MOST_SEGMENTS


def waterpixels(image: Tensor, n_segments: int, *, regularity: float = 8.0, shrink: float = 2 / 3) -> Tensor:
    r"""Superpixels whose boundaries lie on the crests of the gradient.

    The image is cut into a grid of about ``n_segments`` cells of step :math:`\sigma`, each shrunk about its centre. Of
    the minima of the gradient g in a shrunk cell the marker is the one that, as g is flooded, takes up the others: of
    two basins that meet, the one of fewer pixels ends. The superpixels are the basins of the markers in a watershed of

    .. math:: g + k\, d, \quad d(x) = \frac{2}{\sigma} \min_i \|x - q_i\|

    with g the morphological gradient of the lightness (3 x 3 pixels, 0 to 255) and :math:`q_i` the centres of the
    markers. Machairas et al., IEEE Transactions on Image Processing 24(11), 2015.

    The watershed is the minimum spanning forest of the 4-neighbouring pixels that is rooted in the markers; edges weigh
    the larger of both values, and equal ones go by their place, so that ties decide nothing at random.

    Cost: a sort of two edges a pixel, and a loop over those inside the shrunk cells: about a third of a second for
    500 x 375, on the CPU, an image at a time. :func:`fastcam.superpixel_slic` is sixty times as fast.

    Args:
        image: RGB :math:`(B, 3, H, W)` in 0..255, uint8 or floating.
        n_segments: how many are wanted, from 1 to 65535.
        regularity: k; 0 follows the gradient alone, 16 gives nearly equal cells.
        shrink: side of a shrunk cell, as a part of the cell's, above 0 and at most 1.

    Returns:
        int32 :math:`(B, H, W)`: one superpixel a cell, 4-connected, numbered from 0 in scan order of first pixels.

    Raises:
        ValueError: an image that is not :math:`(B, 3, H, W)` or holds a NaN, numbers out of range.
    """
    if not 1 <= n_segments <= MOST_SEGMENTS:
        raise ValueError(f"waterpixels: expected n_segments from 1 to {MOST_SEGMENTS}, got {n_segments}")
    if not 0 <= regularity < float("inf") or not 0 < shrink <= 1:
        raise ValueError(f"waterpixels: expected regularity >= 0 and shrink in (0, 1], got {regularity} and {shrink}")
    gradient = 255 * gradient_contour(image).cpu().double().numpy()
    out = np.zeros(gradient.shape, np.int32)
    if out.size:
        for one, labels in zip(gradient, out, strict=True):
            labels[:] = _watershed(one, n_segments, regularity, shrink)
    return torch.from_numpy(out).to(image.device)


def _watershed(g: np.ndarray, n_segments: int, regularity: float, shrink: float) -> np.ndarray:
    """Gradient ``(H, W)`` -> superpixels ``(H, W)``."""
    H, W = g.shape
    rows, columns, *_ = grid(H, W, n_segments)
    of_row, of_column = _shrunk(H, rows, shrink), _shrunk(W, columns, shrink)
    inside = (of_row[:, None] >= 0) & (of_column >= 0)
    cell = np.where(inside, of_row[:, None] * columns + of_column, -1).ravel()
    flat, first, second = g.ravel(), *_neighbours(H, W)

    within = (cell[first] == cell[second]) & (cell[first] >= 0)
    marker = _markers(flat, cell, first[within], second[within])

    y, x = np.divmod(np.arange(H * W), W)
    marked = marker >= 0
    size = np.bincount(marker[marked], minlength=rows * columns)
    places = [np.bincount(marker[marked], at[marked], minlength=rows * columns) / size for at in (y, x)]
    distance, _ = cKDTree(np.stack(places, 1)).query(np.stack([y, x], 1))
    height = flat + regularity * 2 / np.sqrt(H * W / (rows * columns)) * distance

    # A root joined to every marker makes the forest a tree. scipy takes 0 for no edge, and ranks leave it no ties.
    same = (marker[first] == marker[second]) & (marker[first] >= 0)
    weight = np.where(same, -1.0, np.maximum(height[first], height[second]))
    rank = np.empty(len(weight))
    rank[np.argsort(weight, kind="stable")] = np.arange(1, len(weight) + 1)
    start = np.unique(marker, return_index=True)[1][-rows * columns :]  # the first pixel of every marker
    ends = np.concatenate([first, start]), np.concatenate([second, np.full(len(start), H * W)])
    graph = csr_matrix((np.concatenate([rank, np.full(len(start), 0.5)]), ends), shape=(H * W + 1, H * W + 1))
    forest = minimum_spanning_tree(graph)[: H * W, : H * W]
    labels = connected_components(forest, directed=False)[1]
    order = np.unique(labels, return_index=True)[1].argsort().argsort()  # of first pixels
    return order[labels].reshape(H, W)


def _shrunk(size: int, cells: int, shrink: float) -> np.ndarray:
    """For each of ``size`` rows the shrunk cell it lies in, or -1; every cell keeps its middle row."""
    at = np.arange(size)
    of = at * cells // size
    low = -(-np.arange(cells + 1) * size // cells)
    begin, end = low[of], low[of + 1]
    off_centre = np.abs(2 * at + 1 - begin - end)
    return np.where((off_centre < shrink * (end - begin)) | (at == (begin + end - 1) // 2), of, -1)


def _neighbours(H: int, W: int) -> tuple[np.ndarray, np.ndarray]:
    """All pairs of 4-neighbouring pixels, as two lists of their numbers."""
    pixel = np.arange(H * W).reshape(H, W)
    return (
        np.concatenate([pixel[:, :-1].ravel(), pixel[:-1].ravel()]),
        np.concatenate([pixel[:, 1:].ravel(), pixel[1:].ravel()]),
    )


def _markers(g: np.ndarray, cell: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """For every pixel the cell whose marker it belongs to, or -1; edges ``first``, ``second`` lie inside cells."""
    level = np.maximum(g[first], g[second])
    order = np.argsort(level, kind="stable")
    root, area, lowest = list(range(len(g))), [1] * len(g), list(range(len(g)))  # lowest: pixel of the basin's minimum
    heights = g.tolist()

    def find(p: int) -> int:
        while root[p] != p:
            root[p] = p = root[root[p]]
        return p

    for a, b, h in zip(first[order].tolist(), second[order].tolist(), level[order].tolist(), strict=True):
        a, b = find(a), find(b)
        if a == b:
            continue
        # What begins at this height is no minimum of its own; of two true ones the larger takes up the other.
        keys = [(heights[lowest[r]] < h, area[r], -lowest[r]) for r in (a, b)]
        keep = a if keys[0] > keys[1] else b
        gone = a + b - keep
        root[gone] = keep
        area[keep] += area[gone]

    pixels = (cell >= 0).nonzero()[0]
    winner = np.full(len(g), -1)
    winner[pixels] = [lowest[find(p)] for p in pixels.tolist()]
    # The marker is the flat zone around the winner, inside its cell.
    flat = g[first] == g[second]
    zones = csr_matrix((np.ones(flat.sum()), (first[flat], second[flat])), shape=(len(g), len(g)))
    zone = connected_components(zones, directed=False)[1]
    return np.where((winner >= 0) & (zone == zone[winner]), cell, -1)
