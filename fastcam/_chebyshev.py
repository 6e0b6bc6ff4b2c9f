r"""Powers as short sums of Chebyshev polynomials.

.. math:: x^n = \sum_{k \equiv n\,(2)} c_k T_k(x), \quad c_k = 2^{1 - n} \binom{n}{(n - k) / 2}, \quad
          c_0 = 2^{-n} \binom{n}{n / 2}

The coefficients are the probabilities that a walk of n fair steps of +-1 ends at +-k: positive, of sum 1, and of
variance n. So those beyond some multiple of :math:`\sqrt n` are negligible, and as :math:`|T_k| \le 1` on [-1, 1], what
is left out is no larger than their sum (Sachdeva and Vishnoi, "Faster Algorithms via Approximation Theory", 2014, 3).
"""

from __future__ import annotations

import math

TOLERANCE = 1e-4  # what a walk's sum may leave out, as a share of the largest value


def walk_degree(method: str, steps: int, pairs: int, pixels: int) -> int:
    """The degree of the sum that stands for ``steps`` of a walk; ``steps`` itself where that is no more or asked for.

    Column sums of its matrix lie in [1, 2 pairs + 1]; :func:`fastcam.random_walk` says how they bound the error.
    """
    return steps if method == "steps" else degree(steps, TOLERANCE / math.sqrt((2 * pairs + 1) * pixels))


def coefficients(n: int, degree: int) -> list[float]:
    """:math:`c_0, ..., c_{degree}` of :math:`x^n`; every second one is 0."""
    return [_coefficient(n, k) if (n - k) % 2 == 0 else 0.0 for k in range(degree + 1)]


def degree(n: int, tail: float) -> int:
    """The smallest degree such that the coefficients beyond it add up to at most ``tail``; at most ``n``."""
    left_out = 0.0
    for k in range(n, 0, -2):
        left_out += _coefficient(n, k)
        if left_out > tail:
            return k
    return n % 2


def _coefficient(n: int, k: int) -> float:
    i = (n - k) // 2
    log = math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) - n * math.log(2)
    return math.exp(log) * (2 if k else 1)
