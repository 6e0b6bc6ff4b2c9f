"""Checks of arguments that ``densecrf`` and ``utils`` share."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]


def numbers(where: str, name: str, given: ArrayLike, ndim: int | None = None) -> NDArray[Any]:
    """An array of real numbers, with ``ndim`` axes."""
    array = np.asarray(given)
    if array.dtype.kind not in "fiu":
        raise TypeError(f"{where}: expected {name} of real numbers, got {array.dtype}")
    if ndim is not None and array.ndim != ndim:
        raise ValueError(f"{where}: expected {name} with {ndim} axes, got shape {array.shape}")
    return array


def floats(where: str, name: str, given: ArrayLike, ndim: int | None) -> Floats:
    """A float32 copy in C order."""
    with np.errstate(over="ignore"):  # what is too large for float32 becomes inf, which callers judge
        return np.array(numbers(where, name, given, ndim), dtype=np.float32, order="C")


def count(where: str, name: str, given: int, least: int) -> int:
    """An integer of at least ``least``."""
    try:
        number = operator.index(given)
    except TypeError:
        raise TypeError(f"{where}: expected {name} an integer, got {type(given).__name__}") from None
    if number < least:
        raise ValueError(f"{where}: expected {name} >= {least}, got {number}")
    return number


def sigmas(where: str, name: str, given: float | Sequence[float], n: int) -> list[float]:
    """``n`` positive numbers from one or from ``n``."""
    values = numbers(where, name, given).astype(np.float64)
    if values.shape not in ((), (n,)) or not ((values > 0) & (values < np.inf)).all():
        raise ValueError(f"{where}: expected {name} a positive number or {n} of them, got {given}")
    return np.broadcast_to(values, n).tolist()
