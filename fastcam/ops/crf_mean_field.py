"""Mean field of the fully connected CRF, and the permutohedral lattice behind it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastcam import backends
from fastcam._checks import FLOATS, check_same
from fastcam._library import PACKAGES, op

_ARGUMENTS = (
    "Tensor unary, Tensor? image, Tensor? valid, Tensor? gaussian_compat, Tensor? bilateral_compat, "
    "float[] gaussian_sigma, float[] bilateral_sigma, int iterations, str normalization, str kernel, str backend"
)
FWD = op(f"crf_mean_field_fwd({_ARGUMENTS}) -> Tensor", fake=lambda unary, *rest: unary.new_empty(unary.shape))


def _fake_bwd(grad: Tensor, compat_grad: bool, unary: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    gaussian, bilateral = (
        unary.new_empty(c.shape if compat_grad and c is not None else (0,), dtype=_work(unary)) for c in rest[2:4]
    )
    return unary.new_empty(unary.shape), gaussian, bilateral


BWD = op(f"crf_mean_field_bwd(Tensor grad, bool compat_grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", fake=_fake_bwd)
CANDIDATES = {"cpp": backends.needs_cpp, "reference": backends.always, "triton": backends.needs_gpu}
NORMALIZATIONS = ("symmetric", "before", "after", "none")
KERNELS = ("fast", "lattice", "exact")
FEW = 4  # labels up to which a separable Gaussian is faster than a lattice

Sigma = float | Sequence[float]
Compat = float | Sequence[float] | Sequence[Sequence[float]] | Tensor


class _CrfMeanField(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, unary: Tensor, *rest: Any) -> Tensor:
        *tensors, gaussian_sigma, bilateral_sigma, iterations, normalization, kernel, backend = rest
        ctx.save_for_backward(unary, *tensors)
        ctx.constants = gaussian_sigma, bilateral_sigma, iterations, normalization, kernel, backend
        return FWD(unary, *rest)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _, _, _, *wanted = ctx.needs_input_grad[:5]
        unary, *compats = BWD(grad, any(wanted), *ctx.saved_tensors, *ctx.constants)
        return unary, None, None, *(g if w else None for g, w in zip(compats, wanted, strict=True)), *[None] * 6


def crf_mean_field(
    unary: Tensor,
    image: Tensor | None,
    *,
    iterations: int = 10,
    gaussian: tuple[Sigma, Compat] | None = (3, 3),
    bilateral: tuple[Sigma, Sigma, Compat] | None = (80, 13, 10),
    normalization: Literal["symmetric", "before", "after", "none"] = "symmetric",
    kernel: Literal["fast", "lattice", "exact"] = "fast",
    valid: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    r"""Label distributions of a fully connected CRF after some steps of mean field.

    .. math:: Q^0 = \mathrm{softmax}(-U), \qquad Q \leftarrow \mathrm{softmax}\Big(-U - \sum_k \mu_k(K_k Q)\Big)

    over the labels, all pixels at once. :math:`K_k` is a Gaussian kernel over all pairs of pixels, each pixel with
    itself included: one on the coordinates (``gaussian``), one on coordinates and colours (``bilateral``),
    :math:`\exp(-\tfrac12 (\Delta x^2/s_x^2 + \Delta y^2/s_y^2 + \sum_c \Delta I_c^2/s_c^2))`. N x N is never formed.

    Krähenbühl and Koltun, NIPS 2011 and ICML 2013. Parameters mean what they mean in pydensecrf. Cost of a step with a
    lattice of M vertices: 12 N K multiply-adds to and from it and 12 M K in it. Differentiable in ``unary`` and in
    compatibilities that are tensors, through all steps; the gradient runs the forward again and holds Q of every step
    of an image.

    Args:
        unary: energies (negative log-probabilities) :math:`(B, K, H, W)`, any strides, float32, float16, bfloat16
            (float64 in ``cpp`` and ``reference``), or :math:`(B, G, K, H, W)`: G problems an image, which share its
            lattice. An energy of ``inf`` rules its label out.
        image: :math:`(B, 3, H, W)` in 0..255, uint8 or floating; ``None`` if ``bilateral`` is. Not differentiable.
        iterations: steps; 0 gives ``softmax(-unary)``.
        gaussian: ``(sxy, compat)`` or ``None``. ``sxy``: standard deviation in pixels, or ``(sx, sy)``.
        bilateral: ``(sxy, srgb, compat)`` or ``None``. ``srgb``: standard deviation in grey levels, or one for each
            channel. A compatibility ``compat`` is a number ``w`` (Potts: :math:`\mu(R) = -w R`, neighbours that agree
            lower the energy), a vector :math:`(K,)` (:math:`\mu(R) = \mathrm{diag}(v) R`; a Potts-like one is
            negative), or a matrix :math:`(K, K)` of costs, of which the symmetric part is taken.
        normalization: with :math:`n` the kernel of ones: ``"symmetric"`` :math:`n^{-1/2} K n^{-1/2}`, ``"before"``
            :math:`K n^{-1}`, ``"after"`` :math:`n^{-1} K`, ``"none"``.
        kernel: ``"lattice"``: both terms on permutohedral lattices, which gives pydensecrf's numbers. ``"fast"``: the
            same for more than four labels; up to four, where this is faster, the spatial term is an exact separable
            Gaussian (up to 4.5 standard deviations). ``"exact"``: true Gaussian sums, in time proportional to
            :math:`N^2`.
        valid: int64 :math:`(B, 2)`, true heights and widths of images padded to one size. Pixels outside take no part
            and are 0 in the result.
        backend: ``"cpp"``, ``"triton"``, ``"reference"``, or ``None`` to choose.

    Returns:
        Q in the shape and dtype of ``unary``; sums are taken in float32.

    Raises:
        ValueError: shapes that do not fit, two devices, numbers out of range; a unary with NaN, ``-inf`` or a pixel
            without any finite energy; an image with NaN or ``inf``, or standard deviations so small that the lattice
            would lose its precision.
        TypeError: a wrong dtype.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> unary = torch.tensor([0.0, 0.4, 1.0, 0.6]).reshape(1, 2, 1, 2)  # two labels, two pixels
        >>> crf_mean_field(unary, None, iterations=0, bilateral=None).flatten()
        tensor([0.7311, 0.5498, 0.2689, 0.4502])
        >>> crf_mean_field(unary, None, iterations=1, bilateral=None).flatten()
        tensor([0.8650, 0.7364, 0.1350, 0.2636])
    """
    shape = unary.shape
    if unary.ndim not in (4, 5) or shape[-3] == 0:
        raise ValueError(
            f"crf_mean_field: expected unary (B, K, H, W) or (B, G, K, H, W) with K > 0, got {tuple(shape)}"
        )
    B, K = shape[0], shape[-3]
    check_same("crf_mean_field", unary=unary)
    if bilateral is None:
        image = None
    elif image is None:
        raise ValueError("crf_mean_field: expected an image, or bilateral=None, got None")
    else:
        _check_image(image, unary)
    unary = unary.flatten(0, -4)
    if valid is not None:
        if valid.shape != (B, 2) or valid.dtype != torch.int64:
            raise ValueError(f"crf_mean_field: expected valid int64 ({B}, 2), got {valid.dtype} {tuple(valid.shape)}")
        if valid.device != unary.device:
            raise ValueError(
                f"crf_mean_field: expected one device, got unary on {unary.device}, valid on {valid.device}"
            )
    if iterations < 0:
        raise ValueError(f"crf_mean_field: expected iterations >= 0, got {iterations}")
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"crf_mean_field: expected normalization in {NORMALIZATIONS}, got {normalization!r}")
    if kernel not in KERNELS:
        raise ValueError(f"crf_mean_field: expected kernel in {KERNELS}, got {kernel!r}")
    if kernel == "fast" and K > FEW:
        kernel = "lattice"
    gaussian_sigma: list[float] = []
    bilateral_sigma: list[float] = []
    gaussian_compat = bilateral_compat = None
    if gaussian is not None:
        gaussian_sigma = _sigmas("gaussian sxy", gaussian[0], 2)
        gaussian_compat = _compat("gaussian", gaussian[1], K, unary)
    if bilateral is not None:
        bilateral_sigma = _sigmas("bilateral sxy", bilateral[0], 2) + _sigmas("bilateral srgb", bilateral[1], 3)
        bilateral_compat = _compat("bilateral", bilateral[2], K, unary)
    name = backends.resolve("crf_mean_field", CANDIDATES, unary, backend)
    tensors = unary, image, valid, gaussian_compat, bilateral_compat
    args = *tensors, gaussian_sigma, bilateral_sigma, iterations, normalization, kernel, name
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return _CrfMeanField.apply(*args).view(shape)
    return FWD(*args).view(shape)


def _work(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check_image(image: Tensor, unary: Tensor) -> None:
    expected = (unary.shape[0], 3, *unary.shape[-2:])
    if image.shape != expected:
        raise ValueError(f"crf_mean_field: expected image {expected}, as unary, got {tuple(image.shape)}")
    if image.dtype != torch.uint8 and image.dtype not in FLOATS:
        raise TypeError(f"crf_mean_field: expected image uint8 or floating, got {image.dtype}")
    if image.device != unary.device:
        raise ValueError(f"crf_mean_field: expected one device, got unary on {unary.device}, image on {image.device}")
    if image.requires_grad and torch.is_grad_enabled():
        raise ValueError("crf_mean_field: the image has no gradient here, pass image.detach()")


def _sigmas(name: str, given: Sigma, n: int) -> list[float]:
    sigmas = [float(s) for s in given] if isinstance(given, Sequence) else [float(given)] * n
    if len(sigmas) != n or not all(0 < s < float("inf") for s in sigmas):
        raise ValueError(f"crf_mean_field: expected {name} a positive number or {n} of them, got {given}")
    return sigmas


def _compat(name: str, given: Compat, K: int, unary: Tensor) -> Tensor:
    """Number, vector or matrix -> what multiplies the messages: ``(K,)`` or ``(K, K)``."""
    compat = torch.as_tensor(given, dtype=_work(unary), device=unary.device)
    if compat.ndim == 0:
        return -compat.expand(K)
    if compat.shape == (K,):
        return compat
    if compat.shape == (K, K):
        return (compat + compat.T) / 2
    raise ValueError(
        f"crf_mean_field: expected {name} compatibility a number, ({K},) or ({K}, {K}), got {tuple(compat.shape)}"
    )


class _LatticeFilter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lattice: Any, reverse: bool) -> Tensor:
        ctx.lattice, ctx.reverse = lattice, reverse
        return lattice.filter(x, reverse)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.lattice.filter(grad, not ctx.reverse), None, None


class Lattice:
    r"""A permutohedral lattice: a Gaussian filter for N points with d features, in time linear in N.

    Built once, used for any number of values. Approximates :math:`\sum_j \exp(-\tfrac12 \|f_i - f_j\|^2) x_j` up to a
    factor that depends on d (about 0.87 for d = 2, 0.5 to 0.7 for d = 5), which a normalisation removes. Adams, Baek
    and Davis 2010, numbers as pydensecrf.

    Args:
        features: :math:`(d, N)`, or :math:`(B, d, N)` for a lattice an image, floating, divided by their standard
            deviations. Not differentiable.
        backend: ``"cpp"``, ``"triton"``, ``"reference"``, or ``None`` to choose.

    Raises:
        ValueError: wrong shape; features that are not finite, or so large that float32 cannot place them in the
            lattice.
        TypeError: features that are not floating.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> lattice = Lattice(torch.tensor([[0.0, 0.5, 9.0]]))
        >>> lattice.filter(torch.ones(1, 3), normalization="after").allclose(torch.ones(1, 3))
        True
    """

    def __init__(self, features: Tensor, *, backend: str | None = None) -> None:
        if features.ndim not in (2, 3) or 0 in features.shape[-2:]:
            raise ValueError(
                f"Lattice: expected features (d, N) or (B, d, N) with d, N > 0, got {tuple(features.shape)}"
            )
        check_same("Lattice", features=features)
        if features.requires_grad and torch.is_grad_enabled():
            raise ValueError("Lattice: the features have no gradient here, pass features.detach()")
        package = PACKAGES[backends.resolve("Lattice", CANDIDATES, features, backend)]
        build = import_module(f"fastcam.{package}.crf_mean_field").Lattice
        self._batched = features.ndim == 3
        self._points = features.shape[-1]
        self._lattices = [build(f) for f in (features if self._batched else features[None])]

    def filter(
        self,
        x: Tensor,
        reverse: bool = False,
        normalization: Literal["symmetric", "before", "after"] | None = None,
    ) -> Tensor:
        """Filter values. Linear, and differentiable in them.

        Args:
            x: :math:`(V, N)`, or :math:`(B, V, N)` where the features had a batch.
            reverse: blur the axes in reverse order: without normalisation, the exact adjoint of the filter.
            normalization: ``None``, or as in :func:`crf_mean_field`.

        Returns:
            Filtered values, in the shape and dtype of ``x``.

        Raises:
            ValueError: a shape that does not fit the features; an unknown normalisation.
            TypeError: values that are not floating.
        """
        expected = f"({f'{len(self._lattices)}, ' if self._batched else ''}V, {self._points})"
        if (
            x.ndim != 2 + self._batched
            or x.shape[-1] != self._points
            or (self._batched and len(x) != len(self._lattices))
        ):
            raise ValueError(f"Lattice.filter: expected x {expected}, got {tuple(x.shape)}")
        if normalization not in (None, "symmetric", "before", "after"):
            raise ValueError(
                f"Lattice.filter: expected normalization symmetric, before, after or None, got {normalization!r}"
            )
        check_same("Lattice.filter", x=x)
        work = x.to(torch.promote_types(x.dtype, torch.float32))
        parts = []
        for lattice, values in zip(self._lattices, work if self._batched else work[None], strict=True):
            norm = None if normalization is None else lattice.filter(values.new_ones((1, self._points)), reverse)[0]
            if norm is not None and normalization != "after":
                values = values * (norm.rsqrt() if normalization == "symmetric" else 1 / norm)
            out = _LatticeFilter.apply(values, lattice, reverse)
            if norm is not None and normalization != "before":
                out = out * (norm.rsqrt() if normalization == "symmetric" else 1 / norm)
            parts.append(out)
        if not self._batched:
            return parts[0].to(x.dtype)
        return (torch.stack(parts) if parts else torch.empty_like(work)).to(x.dtype)
