"""Mean field of a fully connected CRF behind the classes of ``pydensecrf.densecrf``.

Names, order of arguments and numbers are pydensecrf's. Arrays may have any strides and precision and be read-only; what
pydensecrf would crash on or turn into NaN raises a ``ValueError`` or ``TypeError`` that names the argument.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum
from functools import cached_property
from typing import Literal, TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastcam.compat.pydensecrf._arguments import Floats, count, floats, sigmas
from fastcam.ops.crf_mean_field import Lattice, crf_mean_field


class KernelType(IntEnum):
    """Which parameters of a kernel pydensecrf could train. Inference is the same for all."""

    CONST_KERNEL = 0
    DIAG_KERNEL = 1
    FULL_KERNEL = 2


class NormalizationType(IntEnum):
    """Where messages are divided by the kernel of ones: nowhere, before it, after it, or by its root on either side."""

    NO_NORMALIZATION = 0
    NORMALIZE_BEFORE = 1
    NORMALIZE_AFTER = 2
    NORMALIZE_SYMMETRIC = 3


CONST_KERNEL, DIAG_KERNEL, FULL_KERNEL = KernelType
NO_NORMALIZATION, NORMALIZE_BEFORE, NORMALIZE_AFTER, NORMALIZE_SYMMETRIC = NormalizationType

_NORMALIZATIONS: dict[NormalizationType, Literal["none", "before", "after", "symmetric"]] = {
    NO_NORMALIZATION: "none",
    NORMALIZE_BEFORE: "before",
    NORMALIZE_AFTER: "after",
    NORMALIZE_SYMMETRIC: "symmetric",
}

Choice = TypeVar("Choice", KernelType, NormalizationType)


class Unary:
    """Energies of every label at every point.

    Attributes:
        energy: float32 :math:`(M, N)`.
    """

    def __init__(self, energy: Floats) -> None:
        self.energy = energy


class ConstUnary(Unary):
    """Energies ``u`` :math:`(M, N)` as they are."""

    def __init__(self, u: ArrayLike) -> None:
        super().__init__(floats("ConstUnary", "u", u, 2))


class LogisticUnary(Unary):
    """Energies ``L f`` of linear classifiers ``L`` :math:`(M, D)` on features ``f`` :math:`(D, N)`."""

    def __init__(self, L: ArrayLike, f: ArrayLike) -> None:
        weights, features = floats("LogisticUnary", "L", L, 2), floats("LogisticUnary", "f", f, 2)
        if weights.shape[1] != features.shape[0]:
            raise ValueError(f"LogisticUnary: expected L (M, D) and f (D, N), got {weights.shape} and {features.shape}")
        super().__init__(weights @ features)


class _Term:
    """A pairwise term. Its lattice is built at the first use and kept.

    Args:
        features: gives :math:`(d, N)`.
        mu: the compatibility: factors of the messages :math:`(M,)`, or a matrix :math:`(M, M)`.
        normalization: where messages are normalised.
        sigma: of a term on pixels, its 2 (coordinates) or 5 (and colours) standard deviations.
        image: its colours :math:`(3, H, W)`.
    """

    def __init__(
        self,
        features: Callable[[], Floats],
        mu: Floats,
        normalization: NormalizationType,
        sigma: Sequence[float] = (),
        image: Floats | None = None,
    ) -> None:
        self.features = features
        self.mu = mu
        self.normalization = normalization
        self.sigma = sigma
        self.image = image

    @cached_property
    def lattice(self) -> tuple[Lattice, Floats]:
        """The lattice, and the kernel of ones :math:`(N,)` to the power that normalises: -1/2 if on both sides."""
        features = self.features()
        lattice = Lattice(torch.from_numpy(features))
        norm = lattice.filter(torch.from_numpy(np.ones((1, features.shape[1]), np.float32)))[0].numpy()
        return lattice, np.reciprocal(np.sqrt(norm) if self.normalization == NORMALIZE_SYMMETRIC else norm)

    def energy(self, Q: Floats) -> Floats:
        """What marginals add to the energies, both :math:`(M, N)`."""
        lattice, scale = self.lattice
        if self.normalization in (NORMALIZE_BEFORE, NORMALIZE_SYMMETRIC):
            Q = Q * scale
        message = lattice.filter(torch.from_numpy(Q)).numpy()
        if self.normalization in (NORMALIZE_AFTER, NORMALIZE_SYMMETRIC):
            message = message * scale
        with np.errstate(over="ignore"):  # the softmax judges it
            return self.mu @ message if self.mu.ndim == 2 else self.mu[:, None] * message


class DenseCRF:
    """A fully connected CRF over points with any features.

    Cost of a step and term with d features and V vertices: 2 (d + 1) N M multiply-adds to and from the lattice and
    2 (d + 1) V M in it, on :func:`torch.get_num_threads` threads.

    Args:
        nvar: number of points N.
        nlabels: number of labels M.

    Raises:
        ValueError: a number below 1.
        TypeError: a number that is not an integer.
    """

    def __init__(self, nvar: int, nlabels: int) -> None:
        name = type(self).__name__
        self._shape = count(name, "nlabels", nlabels, 1), count(name, "nvar", nvar, 1)
        self._energy: Floats | None = None
        self._terms: list[_Term] = []

    def setUnary(self, u: Unary) -> None:
        """Sets the energies; see :meth:`setUnaryEnergy`. Unlike pydensecrf's, ``u`` may be used again."""
        if not isinstance(u, Unary):
            raise TypeError(f"{self._where('setUnary')}: expected u a Unary, got {type(u).__name__}")
        self._set_energy("setUnary", u.energy)

    def setUnaryEnergy(self, u: ArrayLike, f: ArrayLike | None = None) -> None:
        """Sets the energies to a copy of ``u``.

        Args:
            u: negative log-probabilities :math:`(M, N)`; ``inf`` rules a label out. With ``f``, linear classifiers
                :math:`(M, D)`.
            f: features :math:`(D, N)`.

        Raises:
            ValueError: a shape that does not fit; NaN, ``-inf``, or a point without a finite energy.
            TypeError: not numbers.
        """
        unary = ConstUnary(u) if f is None else LogisticUnary(u, f)
        self._set_energy("setUnaryEnergy", unary.energy)

    def addPairwiseEnergy(
        self,
        features: ArrayLike,
        compat: ArrayLike,
        kernel: KernelType = DIAG_KERNEL,
        normalization: NormalizationType = NORMALIZE_SYMMETRIC,
    ) -> None:
        r"""Adds a term with the kernel :math:`\exp(-\tfrac12 \|f_i - f_j\|^2)`, on a lattice.

        Args:
            features: :math:`(d, N)`, d from 1 to 15, divided by their standard deviations.
            compat: a number w (Potts: points that agree lower the energy by w), a vector :math:`(M,)` that multiplies
                messages without a change of sign, or a matrix :math:`(M, M)` of costs, of which the symmetric part is
                taken.
            kernel: without effect.
            normalization: where messages are divided by the kernel of ones.

        Raises:
            ValueError: a shape that does not fit; features or compatibilities that are not finite; an unknown kernel or
                normalisation.
            TypeError: not numbers.
        """
        where = self._where("addPairwiseEnergy")
        points = floats(where, "features", features, 2)
        if not 1 <= points.shape[0] <= 15 or points.shape[1] != self._shape[1]:
            raise ValueError(f"{where}: expected features (1 to 15, {self._shape[1]}), got {points.shape}")
        if not np.isfinite(points).all():
            raise ValueError(f"{where}: expected finite features, got NaN or inf")
        mu, normalization = self._options(where, compat, kernel, normalization)
        self._terms.append(_Term(lambda: points, mu, normalization))

    def inference(self, niter: int) -> Floats:
        """Marginals :math:`(M, N)` after ``niter`` steps of mean field; 0 gives ``softmax(-u)``.

        Raises:
            ValueError: no unary was set; a negative number; messages that overflow.
            TypeError: not an integer.
        """
        steps = count(self._where("inference"), "niter", niter, 0)
        Q, tmp1, tmp2 = self.startInference()
        for _ in range(steps):
            self.stepInference(Q, tmp1, tmp2)
        return Q

    def startInference(self) -> tuple[Floats, Floats, Floats]:
        """Marginals :math:`(M, N)` before the first step, and two arrays for :meth:`stepInference`.

        Raises:
            ValueError: no unary was set.
        """
        empty = np.empty((0, 0), np.float32)
        return _softmax(self._where("startInference"), -self._unary("startInference")), empty, empty.copy()

    def stepInference(self, Q: Floats, tmp1: Floats, tmp2: Floats) -> None:
        """One step of mean field, in place.

        Args:
            Q: the marginals that :meth:`startInference` gave.
            tmp1: without effect, as ``tmp2``; pydensecrf works in them.
            tmp2: without effect.

        Raises:
            ValueError: no unary was set; a shape that does not fit; messages that overflow.
            TypeError: ``Q`` is no writable float32 array.
        """
        where = self._where("stepInference")
        if not (isinstance(Q, np.ndarray) and Q.dtype == np.float32 and Q.flags.writeable):
            raise TypeError(f"{where}: expected Q as startInference returns it, a writable float32 array")
        self._check_shape(where, "Q", Q)
        score = -self._unary("stepInference")
        values = np.ascontiguousarray(Q)
        for term in self._terms:
            score -= term.energy(values)
        Q[:] = _softmax(where, score)

    def klDivergence(self, Q: ArrayLike) -> float:
        r"""How far marginals are from the CRF's distribution, up to a constant, as pydensecrf measures it.

        .. math:: \sum_i \langle Q_i, \log Q_i + U_i + \sum_k \mu_k(K_k Q)_i \rangle

        The pairwise part counts every pair twice.

        Raises:
            ValueError: no unary was set; a shape that does not fit.
            TypeError: not numbers.
        """
        where = self._where("klDivergence")
        q = floats(where, "Q", Q, 2)
        self._check_shape(where, "Q", q)
        unary = np.where(q > 0, self._unary("klDivergence"), 0)  # a label that is ruled out costs nothing
        parts = [np.log(np.maximum(q, np.float32(1e-20))), unary, *(term.energy(q) for term in self._terms)]
        return sum(float((q * part).sum(dtype=np.float64)) for part in parts)

    def _where(self, method: str) -> str:
        return f"{type(self).__name__}.{method}"

    def _check_shape(self, where: str, name: str, array: Floats) -> None:
        if array.shape != self._shape:
            raise ValueError(f"{where}: expected {name} {self._shape} (labels, points), got {array.shape}")

    def _set_energy(self, method: str, energy: Floats) -> None:
        self._check_shape(self._where(method), "u", energy)
        if not np.isfinite(energy.min(axis=0)).all():  # the minimum is NaN where a number is
            raise ValueError(
                f"{self._where(method)}: expected u without NaN and -inf, and a finite energy at every point"
            )
        self._energy = energy

    def _unary(self, method: str) -> Floats:
        if self._energy is None:
            raise ValueError(f"{self._where(method)}: no unary was set; call setUnaryEnergy, with zeros for none")
        return self._energy

    def _options(
        self, where: str, compat: ArrayLike, kernel: KernelType, normalization: NormalizationType
    ) -> tuple[Floats, NormalizationType]:
        """The compatibility as a term takes it, and the normalisation."""
        _choice(where, "kernel", kernel, KernelType)
        return _compat(where, compat, self._shape[0]), _choice(where, "normalization", normalization, NormalizationType)


class DenseCRF2D(DenseCRF):
    """A fully connected CRF over the pixels of an image; pixel (x, y) is point ``y * w + x``.

    :meth:`inference` with at most one Gaussian and one bilateral term is :func:`fastcam.crf_mean_field` with
    ``kernel="lattice"``.

    Args:
        w: width.
        h: height.
        nlabels: number of labels M.

    Raises:
        ValueError: a number below 1.
        TypeError: a number that is not an integer.
    """

    def __init__(self, w: int, h: int, nlabels: int) -> None:
        name = type(self).__name__
        self._w, self._h = count(name, "w", w, 1), count(name, "h", h, 1)
        super().__init__(self._w * self._h, nlabels)

    def addPairwiseGaussian(
        self,
        sxy: float | Sequence[float],
        compat: ArrayLike,
        kernel: KernelType = DIAG_KERNEL,
        normalization: NormalizationType = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds a Gaussian on coordinates.

        Args:
            sxy: standard deviation in pixels, or ``(sx, sy)``.
            compat: as in :meth:`addPairwiseEnergy`, with ``kernel`` and ``normalization``.
            kernel: without effect.
            normalization: where messages are divided by the kernel of ones.

        Raises:
            ValueError: a standard deviation that is not positive and finite; see :meth:`addPairwiseEnergy`.
            TypeError: not numbers.
        """
        where = self._where("addPairwiseGaussian")
        sigma = sigmas(where, "sxy", sxy, 2)
        mu, normalization = self._options(where, compat, kernel, normalization)
        self._terms.append(_Term(lambda: self._features(sigma, None), mu, normalization, sigma))

    def addPairwiseBilateral(
        self,
        sxy: float | Sequence[float],
        srgb: float | Sequence[float],
        rgbim: NDArray[np.uint8],
        compat: ArrayLike,
        kernel: KernelType = DIAG_KERNEL,
        normalization: NormalizationType = NORMALIZE_SYMMETRIC,
    ) -> None:
        """Adds a Gaussian on coordinates and colours.

        Args:
            sxy: standard deviation in pixels, or ``(sx, sy)``.
            srgb: standard deviation in grey levels, or one for each channel.
            rgbim: image uint8 :math:`(h, w, 3)`, any strides; copied.
            compat: as in :meth:`addPairwiseEnergy`, with ``kernel`` and ``normalization``.
            kernel: without effect.
            normalization: where messages are divided by the kernel of ones.

        Raises:
            ValueError: a standard deviation that is not positive and finite; an image of another shape; see
                :meth:`addPairwiseEnergy`.
            TypeError: an image that is not uint8; not numbers.
        """
        where = self._where("addPairwiseBilateral")
        sigma = [*sigmas(where, "sxy", sxy, 2), *sigmas(where, "srgb", srgb, 3)]
        colours = np.asarray(rgbim)
        if colours.dtype != np.uint8:
            raise TypeError(f"{where}: expected rgbim uint8, got {colours.dtype}; other values: addPairwiseEnergy")
        if colours.shape != (self._h, self._w, 3):
            raise ValueError(
                f"{where}: expected rgbim (h, w, 3) = {(self._h, self._w, 3)}, got {colours.shape}; "
                "for other channels: utils.create_pairwise_bilateral and addPairwiseEnergy"
            )
        image = np.ascontiguousarray(colours.transpose(2, 0, 1), dtype=np.float32)
        mu, normalization = self._options(where, compat, kernel, normalization)
        self._terms.append(_Term(lambda: self._features(sigma, image), mu, normalization, sigma, image))

    def inference(self, niter: int) -> Floats:
        """Marginals :math:`(M, h w)` after ``niter`` steps of mean field; 0 gives ``softmax(-u)``.

        Raises:
            ValueError: no unary was set; a negative number; messages that overflow; standard deviations too small for
                the lattice.
            TypeError: not an integer.
        """
        steps = count(self._where("inference"), "niter", niter, 0)
        terms = {len(term.sigma): term for term in self._terms}
        normalizations = {term.normalization for term in self._terms} or {NORMALIZE_SYMMETRIC}
        if 0 in terms or len(terms) < len(self._terms) or len(normalizations) > 1:
            return super().inference(niter)
        image = gaussian = bilateral = None
        if term := terms.get(2):
            gaussian = term.sigma, torch.from_numpy(term.mu)
        if term := terms.get(5):
            image = torch.from_numpy(term.image)[None]
            bilateral = term.sigma[:2], term.sigma[2:], torch.from_numpy(term.mu)
        Q = crf_mean_field(
            torch.from_numpy(self._unary("inference")).view(1, -1, self._h, self._w),
            image,
            iterations=steps,
            gaussian=gaussian,
            bilateral=bilateral,
            normalization=_NORMALIZATIONS[normalizations.pop()],
            kernel="lattice",
        )
        return Q.view(self._shape).numpy()

    def _features(self, sigma: Sequence[float], image: Floats | None) -> Floats:
        """``x / sx, y / sy`` and the channels over theirs: :math:`(d, h w)`."""
        y, x = np.mgrid[: self._h, : self._w].astype(np.float32)
        planes: Floats = np.stack([x, y, *(() if image is None else image)]).reshape(len(sigma), -1)
        return np.divide(planes, np.array(sigma, np.float32)[:, None], out=planes)


def _softmax(where: str, score: Floats) -> Floats:
    """Over the labels, in place."""
    with np.errstate(all="ignore"):  # judged below
        score -= score.max(axis=0)
        np.exp(score, out=score)
        total = score.sum(axis=0)
        score /= total
    if not np.isfinite(total).all():
        raise ValueError(f"{where}: expected compatibilities whose messages do not overflow")
    return score


def _choice(where: str, name: str, given: Choice, kind: type[Choice]) -> Choice:
    try:
        return kind(given)
    except ValueError:
        raise ValueError(f"{where}: expected {name} one of {', '.join(kind.__members__)}, got {given!r}") from None


def _compat(where: str, given: ArrayLike, M: int) -> Floats:
    """A number, vector or matrix as factors :math:`(M,)` of the messages or a symmetric matrix."""
    compat = floats(where, "compat", given, None)
    if compat.shape not in ((), (M,), (M, M)):
        raise ValueError(f"{where}: expected compat a number, ({M},) or ({M}, {M}), got shape {compat.shape}")
    if not np.isfinite(compat).all():
        raise ValueError(f"{where}: expected compat finite in float32, got NaN, inf or too large a number")
    if compat.ndim == 0:
        return np.full(M, -compat, np.float32)
    return compat if compat.ndim == 1 else np.float32(0.5) * (compat + compat.T)
