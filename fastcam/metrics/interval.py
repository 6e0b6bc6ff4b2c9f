"""A mean over repeated trials and how far chance may have moved it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


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
