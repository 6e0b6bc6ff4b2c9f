"""Mean field of the dense CRF and the permutohedral lattice, in plain PyTorch.

Krähenbühl and Koltun, NIPS 2011 and ICML 2013; Adams, Baek and Davis, Fast High-Dimensional Filtering Using the
Permutohedral Lattice, 2010. Where points lie in the lattice is computed in float32 whatever the dtype of the values, so
that all backends see the same vertices.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CUT = 4e-5  # kernel="fast" leaves out spatial weights below this: 4.5 standard deviations
COORDINATE_LIMIT = 2**22  # lattice coordinates from here on have no fraction worth the name in float32
CHUNK = 2**22  # pairs of points whose exact weights are in memory at a time

Filter = Callable[[Tensor, bool], Tensor]  # (r (K, N), whether the adjoint is wanted) -> (K, N)


class Lattice:
    """The permutohedral lattice of N points: their simplices, weights, and which vertices are neighbours.

    Args:
        features: :math:`(d, N)`, finite.

    Attributes:
        vertex: int64 :math:`(N, d + 1)`, the vertices of each point's simplex, numbered as they are first met.
        weight: float32 :math:`(N, d + 1)`, barycentric coordinates, 0 to 1, sum 1.
        neighbour: int64 :math:`(d + 1, M, 2)`, the vertices one step forward and back along each axis, ``M`` where
            there is none.
    """

    def __init__(self, features: Tensor) -> None:
        d, N = features.shape
        # The x86 build of pydensecrf fills the last group of four points with zeros, whose vertices enter too.
        points = torch.cat([features.float(), features.new_zeros((d, 1), dtype=torch.float32)[:, : N % 4]], dim=1)
        keys, weight = _simplices(points)
        keys, vertex = _first_met(keys.reshape(-1, d))
        self.vertex = vertex.view(-1, d + 1)[:N]
        self.weight = weight[:N]
        self.neighbour = _neighbours(keys)

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """``vertex``, ``weight``, ``neighbour``."""
        return self.vertex, self.weight, self.neighbour

    def filter(self, x: Tensor, reverse: bool = False) -> Tensor:
        """``x (V, N)`` -> :math:`(V, N)`: splat, blur, slice. ``reverse`` blurs axes backwards: the exact adjoint."""
        axes, M, _ = self.neighbour.shape
        weight = self.weight.to(x.dtype)
        z = x.new_zeros((M + 1, len(x)))  # the last row stands for absent neighbours
        z.index_add_(0, self.vertex.flatten(), (weight[..., None] * x.mT[:, None]).flatten(0, 1))
        for j in reversed(range(axes)) if reverse else range(axes):
            z[:M] += 0.5 * (z[self.neighbour[j, :, 0]] + z[self.neighbour[j, :, 1]])
        return (weight[..., None] * z[self.vertex]).sum(1).mT / (1 + 2.0 ** (1 - axes))


def _simplices(points: Tensor) -> tuple[Tensor, Tensor]:
    """``(d, N)`` -> coordinates of all vertices :math:`(N, d + 1, d)`, weights :math:`(N, d + 1)`."""
    d, N = points.shape
    step = torch.tensor(math.sqrt(2 / 3) * (d + 1), dtype=torch.float32).item()
    elevated = points.new_zeros((d + 1, N))
    total = points.new_zeros(N)
    for j in range(d, 0, -1):
        scaled = points[j - 1] * torch.tensor(step / math.sqrt(j * (j + 1)), dtype=torch.float32)
        elevated[j] = total - j * scaled
        total = total + scaled
    elevated[0] = total
    if not (elevated.abs() < COORDINATE_LIMIT).all():
        raise ValueError(
            "crf_mean_field: expected finite lattice features (coordinates over sxy, image over srgb) of less than "
            f"about a million, got {points.abs().max().item():.3g}"
        )
    inverse = torch.tensor(1 / (d + 1), dtype=torch.float32)
    nearest = (elevated * inverse).round()
    remainder = elevated - nearest * (d + 1)
    rank = torch.zeros_like(nearest, dtype=torch.int64)
    for i in range(d):
        for j in range(i + 1, d + 1):
            below = remainder[i] < remainder[j]
            rank[i] += below
            rank[j] += ~below
    rank += nearest.sum(0).long()
    wrap = (rank < 0).long() - (rank > d).long()
    rank += wrap * (d + 1)
    base = (nearest.long() + wrap) * (d + 1)
    share = (elevated - base) * inverse
    weight = points.new_zeros((d + 2, N))
    weight.scatter_add_(0, d - rank, share)
    weight.scatter_add_(0, d + 1 - rank, -share)
    weight[0] += 1 + weight[d + 1]
    k = torch.arange(d + 1, device=points.device)
    keys = base[:d].T[:, None] + torch.where(rank[:d].T[:, None] <= d - k[:, None], k[:, None], k[:, None] - (d + 1))
    return keys, weight[: d + 1].T.contiguous()


def _codes(rows: Tensor) -> Tensor:
    """One number for each integer row :math:`(R, d)`, equal exactly for equal rows."""
    rows = rows - rows.amin(0)
    code = rows[:, 0]
    for i in range(1, rows.shape[1]):
        code = torch.unique(code, return_inverse=True)[1] * (rows[:, i].amax() + 1) + rows[:, i]
    return torch.unique(code, return_inverse=True)[1]


def _first_met(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct rows in the order in which they first occur, and the place of every row among them."""
    code = _codes(rows)
    at = torch.arange(len(rows), device=rows.device)
    first = at.new_full((int(code.max()) + 1,), len(rows)).scatter_reduce_(0, code, at, "amin")
    order = first.argsort()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=rows.device)
    return rows[first[order]], place[code]


def _neighbours(keys: Tensor) -> Tensor:
    """Vertices ``(M, d)`` -> :math:`(d + 1, M, 2)`: who is at key +- delta_j; delta_j = d on axis j, -1 elsewhere."""
    M, d = keys.shape
    delta = (d + 1) * torch.eye(d + 1, d, dtype=keys.dtype, device=keys.device) - 1
    both = torch.stack([delta, -delta], dim=1)
    code = _codes(torch.cat([keys, (keys[None, :, None] + both[:, None]).reshape(-1, d)]))
    owner = torch.full((int(code.max()) + 1,), M, device=keys.device)
    owner[code[:M]] = torch.arange(M, device=keys.device)
    return owner[code[M:]].view(d + 1, M, 2)


class _Term(NamedTuple):
    """One pairwise term: ``filter(r (K, N), reverse) -> (K, N)``, the diagonals around it, and the compatibility."""

    filter: Filter
    before: Tensor  # (N,), 1 where the normalisation has nothing there
    after: Tensor
    compat: Tensor  # (K,) or (K, K)

    def message(self, q: Tensor) -> Tensor:
        """``K q``, K the normalised kernel."""
        return self.after * self.filter(self.before * q, False)

    def energy(self, q: Tensor) -> Tensor:
        return self.compatible(self.message(q))

    def adjoint(self, g: Tensor) -> Tensor:
        return self.before * self.filter(self.after * self.compatible(g), True)

    def compatible(self, r: Tensor) -> Tensor:
        return self.compat[:, None] * r if self.compat.ndim == 1 else self.compat @ r


def diagonals(norm: Tensor, normalization: str) -> tuple[Tensor, Tensor]:
    """What stands before and after the raw kernel, from the raw kernel of ones."""
    one, norm = torch.ones_like(norm), norm + 1e-20
    if normalization == "symmetric":
        return norm.rsqrt(), norm.rsqrt()
    return {"before": (1 / norm, one), "after": (one, 1 / norm), "none": (one, one)}[normalization]


def _term(filter: Filter, compat: Tensor, N: int, normalization: str) -> _Term:
    return _Term(filter, *diagonals(filter(compat.new_ones(1, N), False)[0], normalization), compat)


def _spatial(h: int, w: int, sigma: list[float], cut: float, like: Tensor) -> Filter:
    def matrix(n: int, s: float) -> Tensor:
        at = torch.arange(n, dtype=like.dtype, device=like.device)
        weight = (-0.5 * ((at[:, None] - at) / s).square()).exp()
        return torch.where(weight >= cut, weight, 0)

    gx, gy = matrix(w, sigma[0]), matrix(h, sigma[1])
    return lambda r, reverse: (gy @ r.view(-1, h, w) @ gx).flatten(1)


def _exact(features: Tensor) -> Filter:
    d, N = features.shape

    def filter(r: Tensor, reverse: bool) -> Tensor:
        parts = []
        for part in features.split(max(1, CHUNK // N), dim=1):
            square = sum((part[j][:, None] - features[j]).square() for j in range(d))
            parts.append(r @ torch.exp(-0.5 * square).mT)
        return torch.cat(parts, dim=1)

    return filter


def _features(h: int, w: int, sigma: list[float], image: Tensor | None, like: Tensor) -> Tensor:
    """``(x/sx, y/sy)``, with an image ``(3, h, w)`` followed by its channels over theirs: :math:`(d, h w)`."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=like.dtype, device=like.device) for n in (h, w)), indexing="ij")
    planes = torch.stack([x, y]) if image is None else torch.cat([torch.stack([x, y]), image.to(like.dtype)])
    return (planes / torch.tensor(sigma, dtype=like.dtype, device=like.device)[:, None, None]).flatten(1)


def _terms(
    h: int, w: int, image: Tensor | None, gaussian_compat: Tensor | None, bilateral_compat: Tensor | None,
    gaussian_sigma: list[float], bilateral_sigma: list[float], normalization: str, kernel: str,
) -> list[_Term]:  # fmt: skip
    terms = []
    if gaussian_compat is not None:
        if kernel == "lattice":
            filter: Filter = Lattice(_features(h, w, gaussian_sigma, None, gaussian_compat.float())).filter
        else:
            filter = _spatial(h, w, gaussian_sigma, CUT if kernel == "fast" else 0.0, gaussian_compat)
        terms.append(_term(filter, gaussian_compat, h * w, normalization))
    if bilateral_compat is not None:
        if kernel == "exact":
            filter = _exact(_features(h, w, bilateral_sigma, image, bilateral_compat))
        else:
            filter = Lattice(_features(h, w, bilateral_sigma, image, bilateral_compat.float())).filter
        terms.append(_term(filter, bilateral_compat, h * w, normalization))
    return terms


def _softmax(energy: Tensor) -> Tensor:
    q = torch.softmax(-energy, dim=0)
    if not q.isfinite().all():
        raise ValueError(
            "crf_mean_field: expected unary without NaN and -inf, with a finite energy at every pixel, and messages "
            "that do not overflow"
        )
    return q


def _mean_field(unary: Tensor, terms: list[_Term], iterations: int) -> list[Tensor]:
    """Q after 0, 1, ... steps."""
    steps = [_softmax(unary)]
    for _ in range(iterations):
        steps.append(_softmax(unary + sum(t.energy(steps[-1]) for t in terms)))
    return steps


def true_sizes(valid: Tensor | None, B: int, H: int, W: int) -> list[tuple[int, int]]:
    """Height and width of every image in the batch."""
    if valid is None:
        return [(H, W)] * B
    sizes = [(int(h), int(w)) for h, w in valid.tolist()]
    for h, w in sizes:
        if not (0 <= h <= H and 0 <= w <= W):
            raise ValueError(
                f"crf_mean_field: expected valid heights in [0, {H}] and widths in [0, {W}], got {h} and {w}"
            )
    return sizes


def problems_per_image(unary: Tensor, image: Tensor | None, valid: Tensor | None) -> int:
    """How many problems in a row of ``unary`` belong to one image; 1 where nothing tells."""
    of_images = unary if valid is None else valid
    images = len(of_images if image is None else image)
    return len(unary) // images if images else 1


def check_compats(*compats: Tensor | None) -> None:
    """Compatibilities are finite."""
    if not all(c is None or bool(c.isfinite().all()) for c in compats):
        raise ValueError("crf_mean_field: expected finite compatibilities")


def crf_mean_field_fwd(
    unary: Tensor, image: Tensor | None, valid: Tensor | None, gaussian_compat: Tensor | None,
    bilateral_compat: Tensor | None, gaussian_sigma: list[float], bilateral_sigma: list[float], iterations: int,
    normalization: str, kernel: str,
) -> Tensor:  # fmt: skip
    """``unary (B G, K, H, W)`` -> Q after the last step; ``image`` and ``valid`` have B.

    A compatibility ``(K,)`` or ``(K, K)`` multiplies messages; where there is none, there is no such term.
    """
    check_compats(gaussian_compat, bilateral_compat)
    problems, K, H, W = unary.shape
    G = problems_per_image(unary, image, valid)
    out = unary.new_zeros(unary.shape)
    for b, (h, w) in enumerate(true_sizes(valid, problems // G, H, W)):
        if h * w == 0:
            continue
        terms = _terms(
            h, w, None if image is None else image[b, :, :h, :w], gaussian_compat, bilateral_compat, gaussian_sigma,
            bilateral_sigma, normalization, kernel,
        )  # fmt: skip
        for p in range(b * G, (b + 1) * G):
            u = unary[p, :, :h, :w].to(_work(unary)).reshape(K, -1)
            out[p, :, :h, :w] = _mean_field(u, terms, iterations)[-1].view(K, h, w)
    return out


def crf_mean_field_bwd(
    grad: Tensor, compat_grad: bool, unary: Tensor, image: Tensor | None, valid: Tensor | None,
    gaussian_compat: Tensor | None, bilateral_compat: Tensor | None, gaussian_sigma: list[float],
    bilateral_sigma: list[float], iterations: int, normalization: str, kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the unary and the compatibilities; those are empty where there are none or ``compat_grad`` is False.

    Runs the forward again, image by image, and keeps Q of every step of that image.

    With E = U + sum_k mu_k(K_k Q) and Q' = softmax(-E): dE = Q' (<g, Q'> - g), dU += dE, dQ = sum_k K_k^T mu_k^T dE;
    mu is symmetric, and its gradient is dE (K_k Q)^T, summed over pixels and steps.
    """
    problems, K, H, W = unary.shape
    G = problems_per_image(unary, image, valid)
    out = unary.new_zeros(unary.shape)
    compats = [c for c in (gaussian_compat, bilateral_compat) if c is not None]
    compat_grads = [torch.zeros_like(c) for c in compats]
    for b, (h, w) in enumerate(true_sizes(valid, problems // G, H, W)):
        if h * w == 0:
            continue
        terms = _terms(
            h, w, None if image is None else image[b, :, :h, :w], gaussian_compat, bilateral_compat, gaussian_sigma,
            bilateral_sigma, normalization, kernel,
        )  # fmt: skip
        for p in range(b * G, (b + 1) * G):
            u, g = (t[p, :, :h, :w].to(_work(unary)).reshape(K, -1) for t in (unary, grad))
            total = torch.zeros_like(u)
            steps = _mean_field(u, terms, iterations)
            for step in range(iterations, -1, -1):
                q = steps[step]
                g_energy = q * ((g * q).sum(0) - g)
                total += g_energy
                if step == 0:
                    break
                if compat_grad:
                    for term, sums in zip(terms, compat_grads, strict=True):
                        m = term.message(steps[step - 1])
                        sums += (g_energy * m).sum(1) if sums.ndim == 1 else g_energy @ m.mT
                g = sum((t.adjoint(g_energy) for t in terms), torch.zeros_like(u))
            out[p, :, :h, :w] = total.view(K, h, w)
    found = iter(compat_grads)
    gaussian, bilateral = (
        unary.new_empty(0, dtype=_work(unary)) if c is None or not compat_grad else next(found)
        for c in (gaussian_compat, bilateral_compat)
    )
    return out, gaussian, bilateral


def _work(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
