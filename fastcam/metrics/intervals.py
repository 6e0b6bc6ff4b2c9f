"""How far chance may have moved a score: intervals of means and of bootstrap draws."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

CHUNK = 2**22  # numbers that the bootstrap draws at a time


def mean_interval(values: Tensor | Sequence[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % confidence interval: ``1.96 std / sqrt(n)``, with the population's ``std``.

    The form of the few-shot literature, over the accuracies of independent episodes.

    Args:
        values: ``(n,)``, one a trial.

    Returns:
        Two numbers in the unit of ``values``; the interval of a single value is 0.

    Raises:
        ValueError: no value, another shape, or one that is not finite.

    Example:
        >>> mean_interval([0.5, 1.0])
        (0.75, 0.3464823227814083)
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    if x.ndim != 1 or len(x) == 0 or not x.isfinite().all():
        raise ValueError(f"mean_interval: expected 1 or more finite values (n,), got {tuple(x.shape)}")
    return x.mean().item(), 1.96 * x.std(correction=0).item() / math.sqrt(len(x))


def quantile_interval(values: Tensor, level: float = 0.95) -> tuple[float, float]:
    """The middle ``level`` of bootstrap values ``(draws,)``, without NaN; NaN if there is no other."""
    values = values[~values.isnan()].double()
    if not len(values):
        return torch.nan, torch.nan
    low, high = values.quantile(torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)).tolist()
    return low, high


def bootstrap_interval(
    values: Sequence[float] | Tensor,
    groups: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    draws: int = 10_000,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of a mean, from the percentiles of means over values drawn with replacement.

    Queries for one object or of one class rise and fall together; drawn one by one they would promise more than they
    hold. With ``groups`` whole groups are drawn. Differences of two methods on the same queries make a paired interval.

    Args:
        values: of the queries, ``(n,)``.
        groups: of the queries; ``None`` draws them one by one.
        level: part of the draws inside the interval.
        draws: their number.
        seed: of the draws.

    Returns:
        Lower and upper end; both are the mean where there is one value or group.

    Raises:
        ValueError: no values, another number of groups, NaN, or a level outside (0, 1).
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    names = list(range(len(x))) if groups is None else list(groups)
    if x.ndim != 1 or len(x) == 0 or len(names) != len(x):
        raise ValueError(
            f"bootstrap_interval: expected values (n,) and n groups, got {tuple(x.shape)} and {len(names)} groups"
        )
    if bool(x.isnan().any()) or not 0 < level < 1 or draws < 1:
        raise ValueError(
            f"bootstrap_interval: expected finite values, level in (0, 1) and draws >= 1, got level {level}, {draws} "
            f"draws and {int(x.isnan().sum())} NaN"
        )
    number = {name: i for i, name in enumerate(dict.fromkeys(names))}
    index = torch.tensor([number[name] for name in names])
    sums = torch.zeros(len(number), dtype=torch.float64).index_add_(0, index, x)
    counts = index.bincount(minlength=len(number)).double()
    generator, size = torch.Generator().manual_seed(seed), max(1, CHUNK // len(number))
    means = torch.empty(draws, dtype=torch.float64)
    for part in means.split(size):
        drawn = torch.randint(len(number), (len(part), len(number)), generator=generator)
        part.copy_(sums[drawn].sum(dim=1) / counts[drawn].sum(dim=1))
    return quantile_interval(means, level)
