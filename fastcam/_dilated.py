"""The dilated 3 x 3 neighbourhoods of PAMR and PAR."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

Offset = tuple[int, int]  # (dy, dx)


def neighbours(dilations: Sequence[int]) -> list[Offset]:
    """For every dilation the eight ``(dy, dx)`` around the centre, row by row."""
    return [(d * y, d * x) for d in dilations for y in (-1, 0, 1) for x in (-1, 0, 1) if (y, x) != (0, 0)]


def position_weights(dilations: Sequence[int]) -> list[float]:
    """What PAR adds to the weight of each neighbour: 0.01 of a softmax over distances, which are in units of 0.3 of
    their standard deviation."""
    distances = [math.hypot(*offset) for offset in neighbours(dilations)]
    unit = 0.3 * (statistics.stdev(distances) + 1e-8)
    scores = [math.exp(-((d / unit) ** 2)) for d in distances]
    return [0.01 * s / sum(scores) for s in scores]
