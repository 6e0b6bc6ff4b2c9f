"""Pairs of pixels within a radius, and the straight paths between them, in the order that IRN numbers them.

A pair is a source and a destination, which lies to its right or below: half a disc, the other half follows by symmetry.
Affinities of pairs are planes ``(B, P, H, W)``: entry ``[b, p, y, x]`` belongs to source ``(y, x)`` and destination
``(y, x) + destinations(radius)[p]``.
"""

from __future__ import annotations

from functools import cache

from torch import Tensor

Offset = tuple[int, int]  # (dy, dx)
Window = tuple[slice, slice]  # rows, columns


@cache
def paths(radius: int) -> tuple[tuple[Offset, ...], ...]:
    """For every destination the pixels on the way to it, from the destination to the source ``(0, 0)``, both included.

    A pixel of the bounding box is on the way if its distance to the line is below 1. Paths are sorted by length, those
    of one length by row and column of the destination; the pixels of a path by decreasing ``|dy| + |dx|``.
    """
    reach = range(1 - radius, radius)
    ends = [(0, dx) for dx in range(1, radius)]
    ends += [(dy, dx) for dy in range(1, radius) for dx in reach if dy * dy + dx * dx < radius * radius]
    return tuple(sorted((_path(dy, dx) for dy, dx in ends), key=len))


def count(radius: int) -> int:
    """P, the number of destinations: 12 for radius 3, 34 for 5, 152 for 10; none for radius 1."""
    disc = sum(dy * dy + dx * dx < radius * radius for dy in range(1, radius) for dx in range(1 - radius, radius))
    return radius - 1 + disc


def destinations(radius: int) -> tuple[Offset, ...]:
    """The P destinations ``(dy, dx)``."""
    return tuple(path[0] for path in paths(radius))


def sources(destination: Offset, height: int, width: int, margin: int = 0) -> Window:
    """Rows and columns of the sources whose destination lies inside the image, perhaps none.

    With ``margin``, only sources whose distance to the left, right and lower border is at least that.
    """
    dy, dx = destination
    bottom, left, right = max(dy, margin), max(-dx, margin), max(dx, margin)
    return slice(0, max(0, height - bottom)), slice(left, max(left, width - right))


def crop(x: Tensor, window: Window, offset: Offset = (0, 0)) -> Tensor:
    """The view of the last two dimensions inside the window, or inside the window moved by an offset."""
    rows, columns = window
    dy, dx = offset
    return x[..., rows.start + dy : rows.stop + dy, columns.start + dx : columns.stop + dx]


def _path(dy: int, dx: int) -> tuple[Offset, ...]:
    box = [(y, x) for y in range(dy + 1) for x in range(min(0, dx), max(0, dx) + 1)]
    near = [(y, x) for y, x in box if (dy * x - dx * y) ** 2 < dy * dy + dx * dx]
    return tuple(sorted(near, key=lambda p: -abs(p[0]) - abs(p[1])))
