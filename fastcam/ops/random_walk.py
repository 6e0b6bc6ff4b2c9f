"""Many steps of a random walk that spreads maps over the pixels within a radius (IRN, AffinityNet)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcam import backends
from fastcam._checks import check_same
from fastcam._library import op
from fastcam._paths import count

POLICY = "int radius, float beta, int steps, str method, str backend"
FWD = op(f"random_walk_fwd(Tensor x, Tensor affinity, {POLICY}) -> Tensor", fake=lambda x, *_: x.new_empty(x.shape))
BWD = op(
    f"random_walk_bwd(Tensor grad, Tensor affinity, {POLICY}) -> Tensor",
    fake=lambda grad, *_: grad.new_empty(grad.shape),
)
# Best first. triton comes after the reference, hence only by name, until a GPU has run it.
CANDIDATES = {"cpp": backends.needs_cpp, "reference": backends.always, "triton": backends.needs_gpu}


class _RandomWalk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, affinity: Tensor, *constants: Any) -> Tensor:
        ctx.save_for_backward(affinity)
        ctx.constants = constants
        return FWD(x, affinity, *constants)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return BWD(grad, *ctx.saved_tensors, *ctx.constants), None, *[None] * len(ctx.constants)


def random_walk(
    x: Tensor,
    affinity: Tensor,
    *,
    radius: int = 5,
    beta: float = 10.0,
    steps: int = 256,
    method: Literal["chebyshev", "steps"] = "chebyshev",
    backend: str | None = None,
) -> Tensor:
    r"""Maps after many steps of a random walk over pairs of similar pixels.

    .. math:: y = x\,T^n, \quad T_{ij} = \frac{A_{ij}}{\sum_k A_{kj}}, \quad A_{ij} = a_{ij}^\beta, \quad A_{ii} = 1

    (IRN, Ahn, Cho and Kwak, CVPR 2019, eq. 11; AffinityNet, Ahn and Kwak, CVPR 2018, eq. 6.) Columns of T sum to 1 and
    act from the right: every result is a weighted mean of the input, so constants stay. The published codes square the
    dense T (``exp_times=8`` is ``steps=256``); here each step is a stencil, and T is never formed. IRN also multiplies
    its maps by ``1 - edge`` first. A stencil of affinities (B, P, H, W) is what :func:`fastcam.path_affinity` and
    :func:`fastcam.feature_affinity` give.

    ``"chebyshev"``: T is similar to a symmetric matrix with eigenvalues in [-1, 1], for which the n-th power is a sum
    of Chebyshev polynomials whose coefficients are binomial probabilities: about :math:`5 \sqrt n` terms, a
    multiplication each, instead of n (85 for 256 steps). With :math:`\tau` the sum of the coefficients left out,

    .. math:: |y - \tilde y| \le \tau \sqrt{(2 P + 1) H W} \max |x|

    because the similarity scales by the square roots of column sums, which lie in [1, 2 P + 1]. The number of terms is
    the least for which this is at most 1e-4 max |x|; on images the error is far smaller. ``"steps"`` multiplies n
    times, as does ``"chebyshev"`` where n is so small that nothing may be left out.

    Cost: 4 P multiply-adds a pixel, channel and multiplication; one copy of the affinities beside the input, (P + 4 C)
    H W numbers an image. Differentiable in ``x`` (the transposed walk), not in ``affinity``.

    Args:
        x: maps :math:`(B, C, H, W)`, any strides, float32, float16, bfloat16 (float64 in ``cpp`` and ``reference``).
            Values must be finite: what is not spreads.
        affinity: :math:`(B, P, H, W)` in the order of :func:`fastcam.path_affinity`; same dtype and device. Values
            outside [0, 1] count as 0 or 1; pairs that leave the image are ignored.
        radius: that of the affinities.
        beta: exponent of the affinities, positive.
        steps: n, at least 0; 0 gives ``x`` again.
        method: ``"chebyshev"`` or ``"steps"``.
        backend: ``"cpp"``, ``"triton"``, ``"reference"``, or ``None`` to choose.

    Returns:
        Maps :math:`(B, C, H, W)` in the dtype of ``x``; sums are taken in float32. A pixel without neighbours keeps its
        value, zero maps stay zero.

    Raises:
        ValueError: shapes that do not fit each other or the radius, an image without pixels, two devices, a radius
            below 1, ``beta`` that is not positive and finite, negative ``steps``, an unknown method.
        TypeError: dtypes that are not floating or differ.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> x = torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)
        >>> affinity = torch.ones(1, 4, 1, 2)  # the only pair inside the image is that of the two pixels
        >>> random_walk(x, affinity, radius=2, steps=1)
        tensor([[[[0.5000, 0.5000]]]])
    """
    if radius < 1:
        raise ValueError(f"random_walk: expected radius >= 1, got {radius}")
    pairs = count(radius)
    if x.ndim != 4 or 0 in x.shape[2:] or affinity.shape != (x.shape[0], pairs, *x.shape[2:]):
        raise ValueError(
            f"random_walk: expected x (B, C, H, W) with H, W >= 1 and, for radius {radius}, affinity "
            f"(B, {pairs}, H, W), got {tuple(x.shape)} and {tuple(affinity.shape)}"
        )
    if not 0 < beta < math.inf:
        raise ValueError(f"random_walk: expected a finite beta > 0, got {beta}")
    if steps < 0:
        raise ValueError(f"random_walk: expected steps >= 0, got {steps}")
    if method not in ("chebyshev", "steps"):
        raise ValueError(f"random_walk: expected method 'chebyshev' or 'steps', got {method!r}")
    check_same("random_walk", x=x, affinity=affinity)
    name = backends.resolve("random_walk", CANDIDATES, x, backend)
    constants = radius, beta, steps, method, name
    if torch.is_grad_enabled() and x.requires_grad:
        return _RandomWalk.apply(x, affinity, *constants)
    return FWD(x, affinity, *constants)
