"""Mean field of the dense CRF in Triton: a batch at a time, rows of labels innermost, sums in float32, no atomics.

Between the build of the lattices and the last step the host reads nothing, so that steps can be captured in a CUDA
graph. A step with a lattice is a splat, a blur an axis, and one kernel that slices, normalises, weighs with the
compatibility, adds the energies and takes the softmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcam.kernels.lattice import Lattice, blocks, gather_corners, row_width, store_messages, to_rows
from fastcam.reference.crf_mean_field import problems_per_image

__all__ = ["Lattice", "crf_mean_field_bwd", "crf_mean_field_fwd"]

REACH = 4.5  # kernel="fast" leaves out spatial weights beyond so many standard deviations, 4e-5
VANISHES = 15.0  # standard deviations where a weight is 0 in float32
SPATIAL = {"BLOCK_Y": 32, "BLOCK_I": 16, "BLOCK_C": 64}
EXACT = {"BLOCK_I": 64, "BLOCK_J": 32}
SLICED = ("z_ptr", "vertex_ptr", "weight_ptr", "scale_ptr", "compat_ptr")


@triton.jit(do_not_specialize=["n", "columns", "pixels", "radius"])
def _crf_spatial_kernel(
    x_ptr, before_ptr, after_ptr, compat_ptr, out_ptr, n, columns, pixels, radius, sigma,
    ENTER: tl.constexpr, SCALED: tl.constexpr, ADD: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_Y: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_Y lines by BLOCK_C columns of a Gaussian along the lines of one of many (n, columns) blocks.

    A line has ``pixels`` pixels of WIDTH labels: down an image it is a row of pixels, along a row of pixels it is one
    of them. The band of weights times a tile of lines is a matrix product.
    """
    tiles = tl.cdiv(n, BLOCK_Y)
    block, tile = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles
    y = tile * BLOCK_Y + tl.arange(0, BLOCK_Y)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_Y, BLOCK_C], tl.float32)
    last = tl.minimum(n, tile * BLOCK_Y + BLOCK_Y + radius)
    for first in range(tl.maximum(0, tile * BLOCK_Y - radius), last, BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        far = tl.abs(y[:, None] - i[None, :])
        scaled = far.to(tl.float32) / sigma
        weight = tl.where(far <= radius, tl.exp(-0.5 * scaled * scaled), 0.0)
        mask = (i[:, None] < n) & (c[None, :] < columns)
        line = block * n + i[:, None]
        x = tl.load(x_ptr + line * columns + c[None, :], mask=mask, other=0.0)
        if ENTER:
            x = x * tl.load(before_ptr + line * pixels + c[None, :] // WIDTH, mask=mask, other=0.0)
        total += tl.dot(weight, x, input_precision="ieee")
    mask = (y[:, None] < n) & (c[None, :] < columns)
    line = block * n + y[:, None]
    pixel, label = line * pixels + c[None, :] // WIDTH, c[None, :] % WIDTH
    to_ptr = out_ptr + line * columns + c[None, :]
    if SCALED:
        total = total * tl.load(after_ptr + pixel, mask=mask, other=0.0)
        total = total * tl.load(compat_ptr + label, mask=c[None, :] < columns, other=0.0)
    if ADD:
        total += tl.load(to_ptr, mask=mask, other=0.0)
    tl.store(to_ptr, total, mask=mask)


@triton.jit(do_not_specialize=["N"])
def _crf_exact_kernel(
    feature_ptr, x_ptr, before_ptr, after_ptr, compat_ptr, out_ptr, N,
    SCALED: tl.constexpr, ADD: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: sums over all points j of an image of exp(-|f_i - f_j|^2 / 2) x_j, for BLOCK_I points i."""
    b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK_I + tl.arange(0, BLOCK_I)
    k = tl.program_id(2) * BLOCK_K + tl.arange(0, BLOCK_K)
    feature_ptr += b * D * N
    own = ()
    for c in tl.static_range(D):
        own = own + (tl.load(feature_ptr + c * N + i, mask=i < N, other=0.0)[:, None],)  # type: ignore[assignment] # noqa: RUF005
    total = tl.zeros([BLOCK_I, BLOCK_K], tl.float32)
    for first in range(0, N, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        square = tl.zeros([BLOCK_I, BLOCK_J], tl.float32)
        for c in tl.static_range(D):
            difference = own[c] - tl.load(feature_ptr + c * N + j, mask=j < N, other=0.0)[None, :]
            square += difference * difference
        mask = (j[:, None] < N) & (k[None, :] < WIDTH)
        x = tl.load(x_ptr + (b * N + j[:, None]) * WIDTH + k[None, :], mask=mask, other=0.0)
        if SCALED:
            x = x * tl.load(before_ptr + b * N + j, mask=j < N, other=0.0)[:, None]
        total += tl.dot(tl.exp(-0.5 * square), x, input_precision="ieee")
    n = b * N + i
    mask = (i[:, None] < N) & (k[None, :] < WIDTH)
    to_ptr = out_ptr + n[:, None] * WIDTH + k[None, :]
    store_messages(to_ptr, total, after_ptr, compat_ptr, n, k, mask, SCALED, ADD)


@triton.jit
def _messages(
    message_ptr, z_ptr, vertex_ptr, weight_ptr, scale_ptr, compat_ptr, alpha, n, k, there,
    MESSAGE: tl.constexpr, CORNERS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What rows ``n`` hear: the rows stored before (MESSAGE), and a slice of the last lattice (CORNERS > 0)."""
    mask = there[:, None] & (k[None, :] < WIDTH)
    total = tl.zeros(mask.shape, tl.float32)
    if CORNERS > 0:
        scale = alpha * tl.load(scale_ptr + n, mask=there, other=0.0)[:, None]
        compat = tl.load(compat_ptr + k, mask=k < WIDTH, other=0.0)[None, :]
        total = scale * compat * gather_corners(z_ptr, vertex_ptr, weight_ptr, n, k, there, CORNERS, WIDTH)
    if MESSAGE:
        total += tl.load(message_ptr + n[:, None] * WIDTH + k[None, :], mask=mask, other=0.0)
    return total


@triton.jit(do_not_specialize=["R"])
def _crf_update_kernel(
    unary_ptr, inside_ptr, message_ptr, z_ptr, vertex_ptr, weight_ptr, scale_ptr, compat_ptr, out_ptr, bad_ptr,
    R, alpha, MESSAGE: tl.constexpr, CORNERS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: softmax(-U - messages) of BLOCK_N of the R pixels; 0 outside. ``bad`` is set where there is none."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    there = tl.load(inside_ptr + n, mask=n < R, other=0) != 0
    row, label = n[:, None] * WIDTH + k[None, :], k[None, :] < WIDTH
    heard = _messages(
        message_ptr, z_ptr, vertex_ptr, weight_ptr, scale_ptr, compat_ptr, alpha, n, k, there, MESSAGE, CORNERS, WIDTH
    )
    unary = tl.load(unary_ptr + row, mask=there[:, None] & label, other=float("inf"))
    energy = tl.where(there[:, None], -unary - heard, 0.0)
    q = tl.exp(energy - tl.max(energy, 1)[:, None])
    sum = tl.sum(q, 1)
    tl.store(bad_ptr + tl.zeros([BLOCK_N], tl.int32), 1, mask=there & ~((sum > 0) & (sum < float("inf"))))
    tl.store(out_ptr + row, tl.where(there[:, None], q / sum[:, None], 0.0), mask=(n[:, None] < R) & label)


@triton.jit(do_not_specialize=["R"])
def _crf_gradient_kernel(
    q_ptr, inside_ptr, message_ptr, z_ptr, vertex_ptr, weight_ptr, scale_ptr, compat_ptr, energy_ptr, total_ptr,
    R, alpha, MESSAGE: tl.constexpr, CORNERS: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program: gradient of the energies that gave ``q``, from that of ``q``, which is what BLOCK_N of the R pixels
    hear; added to ``total``."""
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    there = tl.load(inside_ptr + n, mask=n < R, other=0) != 0
    row, mask = n[:, None] * WIDTH + k[None, :], (n[:, None] < R) & (k[None, :] < WIDTH)
    g = _messages(
        message_ptr, z_ptr, vertex_ptr, weight_ptr, scale_ptr, compat_ptr, alpha, n, k, there, MESSAGE, CORNERS, WIDTH
    )
    q = tl.load(q_ptr + row, mask=mask, other=0.0)
    energy = q * (tl.sum(q * g, 1)[:, None] - g)
    tl.store(total_ptr + row, energy + tl.load(total_ptr + row, mask=mask, other=0.0), mask=mask)
    tl.store(energy_ptr + row, energy, mask=mask)


class _Scales(NamedTuple):
    """What stands around a raw kernel: a number a pixel before and after it, and one a label."""

    before: Tensor  # (B N,)
    after: Tensor
    compat: Tensor  # (width,)


# (rows, scales or None, out rows, whether to add to them): rows through a symmetric kernel
Filter = Callable[[Tensor, "_Scales | None", Tensor, bool], None]


def _spatial(sigma: list[float], cut: bool, B: int, H: int, W: int) -> Filter:
    reach = REACH if cut else VANISHES
    radius_x, radius_y = (int(min(reach * s, n - 1)) for s, n in zip(sigma, (W, H), strict=True))

    def run(x: Tensor, scales: _Scales | None, out: Tensor, add: bool) -> None:
        width, half = x.shape[1], torch.empty_like(x)
        before, after, compat = scales or (None, None, None)
        down = (B * triton.cdiv(H, SPATIAL["BLOCK_Y"]), triton.cdiv(W * width, SPATIAL["BLOCK_C"]))
        _crf_spatial_kernel[down](
            x, before, None, None, half, H, W * width, W, radius_y, sigma[1],
            ENTER=scales is not None, SCALED=False, ADD=False, WIDTH=width, **SPATIAL,
        )  # fmt: skip
        size = {**SPATIAL, "BLOCK_C": _dot_block(width)}
        along = (B * H * triton.cdiv(W, size["BLOCK_Y"]), triton.cdiv(width, size["BLOCK_C"]))
        _crf_spatial_kernel[along](
            half, None, after, compat, out, W, width, 1, radius_x, sigma[0],
            ENTER=False, SCALED=scales is not None, ADD=add, WIDTH=width, **size,
        )  # fmt: skip

    return run


def _exact(features: Tensor) -> Filter:
    B, d, N = features.shape

    def run(x: Tensor, scales: _Scales | None, out: Tensor, add: bool) -> None:
        width = x.shape[1]
        across = _dot_block(width)
        _crf_exact_kernel[(triton.cdiv(N, EXACT["BLOCK_I"]), B, triton.cdiv(width, across))](
            features, x, *(scales or (None, None, None)), out, N,
            SCALED=scales is not None, ADD=add, D=d, WIDTH=width, BLOCK_K=across, **EXACT,
        )  # fmt: skip

    return run


def _dot_block(width: int) -> int:
    """Labels a program of a matrix product takes; ``tl.dot`` wants at least 16."""
    return min(max(16, triton.next_power_of_2(width)), 64)


class _Term:
    """A pairwise term: a raw kernel (a lattice or a filter), its normalisation and its compatibility, for a batch."""

    def __init__(
        self, lattice: Lattice | None, filter: Filter | None, inside: Tensor, compat: Tensor, normalization: str,
        width: int,
    ) -> None:  # fmt: skip
        self.lattice, self.filter = lattice, filter
        ones = inside.reshape(-1, 1).float()
        norm = torch.empty_like(ones)
        if lattice is not None:
            lattice.slice(lattice.blurred(ones), norm)
        elif filter is not None:
            filter(ones, None, norm, False)
        norm = norm.flatten() + 1e-20
        one, root = torch.ones_like(norm), norm.rsqrt()
        around = {"symmetric": (root, root), "before": (1 / norm, one), "after": (one, 1 / norm), "none": (one, one)}
        self.before, self.after = around[normalization]
        K = len(compat)
        self.vector, self.one = norm.new_zeros(width), norm.new_ones(width)
        self.matrix: Tensor | None = None
        if compat.ndim == 1:
            self.vector[:K] = compat
        else:
            self.vector = self.one
            self.matrix = norm.new_zeros((width, width))
            self.matrix[:K, :K] = compat
        self._weights: dict[bool, Tensor] = {}

    def scales(self, adjoint: bool, compatible: bool = True) -> _Scales:
        before, after = (self.after, self.before) if adjoint else (self.before, self.after)
        return _Scales(before, after, self.vector if compatible else self.one)

    def mixed(self, x: Tensor) -> Tensor:
        """The matrix of the compatibility, if it is one; it commutes with kernels, whose numbers are a pixel's."""
        return x if self.matrix is None else x @ self.matrix

    def send(self, x: Tensor, adjoint: bool, out: Tensor, add: bool, compatible: bool = True) -> None:
        """Messages of rows ``x``, or what the adjoint sends, to rows ``out``; raw ones if not ``compatible``."""
        x, scales = self.mixed(x) if compatible else x, self.scales(adjoint, compatible)
        if self.lattice is not None:
            z = self._blurred(self.lattice, x, adjoint)
            self.lattice.slice(z, out, scales.after, scales.compat, add)
        elif self.filter is not None:
            self.filter(x, scales, out, add)

    def unsliced(self, lattice: Lattice, x: Tensor, adjoint: bool) -> dict[str, Any]:
        """What a kernel needs to slice the messages of rows ``x`` itself."""
        scales = self.scales(adjoint)
        return {
            "z_ptr": self._blurred(lattice, self.mixed(x), adjoint), "vertex_ptr": lattice.vertex,
            "weight_ptr": lattice.weight, "scale_ptr": scales.after, "compat_ptr": scales.compat,
            "alpha": lattice.alpha, "CORNERS": lattice.weight.shape[1],
        }  # fmt: skip

    def _blurred(self, lattice: Lattice, x: Tensor, adjoint: bool) -> Tensor:
        if adjoint not in self._weights:
            self._weights[adjoint] = lattice.splat_weights(self.scales(adjoint).before)
        return lattice.blurred(x, self._weights[adjoint], adjoint)


class MeanField:
    """The problem of a batch: energies, terms, and the steps as launches."""

    def __init__(
        self, unary: Tensor, image: Tensor | None, valid: Tensor | None, gaussian_compat: Tensor | None,
        bilateral_compat: Tensor | None, gaussian_sigma: list[float], bilateral_sigma: list[float], normalization: str,
        kernel: str,
    ) -> None:  # fmt: skip
        if unary.dtype == torch.float64:
            raise TypeError("crf_mean_field: the triton backend computes in float32, got unary float64")
        B, K, H, W = unary.shape
        self.shape, self.dtype, self.width = unary.shape, unary.dtype, row_width(K)
        self.unary = to_rows(unary.flatten(2), torch.inf)
        self.bad = torch.zeros(1, dtype=torch.int32, device=unary.device)
        self.compats = [compat for compat in (gaussian_compat, bilateral_compat) if compat is not None]
        self.valid = valid
        x, y = torch.arange(W, device=unary.device), torch.arange(H, device=unary.device)
        if valid is None:
            self.inside = torch.ones((B, H * W), dtype=torch.bool, device=unary.device)
        else:
            inside = (y[:, None] < valid[:, :1, None]) & (x < valid[:, 1:, None])
            self.inside = inside.flatten(1)
        self.terms: list[_Term] = []

        def add(lattice: Lattice | None, filter: Filter | None, compat: Tensor) -> None:
            self.terms.append(_Term(lattice, filter, self.inside, compat, normalization, self.width))

        if gaussian_compat is not None:
            if kernel == "lattice":
                places = _features(x, y, gaussian_sigma, None).expand(B, -1, -1)
                add(Lattice(places, self.inside), None, gaussian_compat)
            else:
                add(None, _spatial(gaussian_sigma, kernel == "fast", B, H, W), gaussian_compat)
        if bilateral_compat is not None:
            features = _features(x, y, bilateral_sigma, image)
            if kernel == "exact":  # zeros outside, where an image may hold anything
                add(None, _exact(torch.where(self.inside[:, None], features, 0)), bilateral_compat)
            else:
                add(Lattice(features, self.inside), None, bilateral_compat)

    def rows(self) -> Tensor:
        return torch.empty_like(self.unary)

    def planes(self, rows: Tensor) -> Tensor:
        """Rows -> ``(B, K, H, W)`` in the dtype of the unary."""
        B, K, H, W = self.shape
        return rows.view(B, H, W, -1)[..., :K].permute(0, 3, 1, 2).to(self.dtype).contiguous()

    def update(self, q: Tensor | None, out: Tensor) -> None:
        """The next Q from rows ``q``, which ``out`` may be; the first of all without."""
        self._launch(_crf_update_kernel, self._hear(q, False), unary_ptr=self.unary, out_ptr=out, bad_ptr=self.bad)

    def gradient(self, grad: Tensor | None, energy: Tensor, q: Tensor, total: Tensor) -> None:
        """Gradient of the energies that gave rows ``q``, into ``energy`` and added to ``total``.

        ``grad``: rows of the gradient of ``q``; without, ``energy`` holds what is here asked for, a step later.
        """
        heard = self._hear(energy if grad is None else None, True)
        if grad is not None:
            heard |= {"message_ptr": grad, "MESSAGE": True}
        self._launch(_crf_gradient_kernel, heard, q_ptr=q, energy_ptr=energy, total_ptr=total)

    def _launch(self, kernel: Any, heard: dict[str, Any], **rows: Tensor) -> None:
        size, R = blocks(self.width), self.inside.numel()
        kernel[(triton.cdiv(R, size["BLOCK_N"]),)](
            inside_ptr=self.inside, R=R, WIDTH=self.width, **rows, **heard, **size
        )

    def result(self, iterations: int) -> Tensor:
        """Q after some steps, ``(B, K, H, W)`` in the dtype of the unary."""
        q = self.rows()
        self.update(None, q)
        for _ in range(iterations):
            self.update(q, q)
        return self.planes(q)

    def steps(self, iterations: int) -> list[Tensor]:
        """Rows of Q after 0, 1, ... steps."""
        steps = [self.rows()]
        self.update(None, steps[0])
        for _ in range(iterations):
            steps.append(self.rows())
            self.update(steps[-2], steps[-1])
        return steps

    def check(self) -> None:
        """The one synchronisation after the build: refuse what the kernels met."""
        H, W = self.shape[2:]
        valid, finite = self.valid, [compat.isfinite().all() for compat in self.compats]
        fits = [] if valid is None else [((valid >= 0) & (valid <= valid.new_tensor([H, W]))).all()]
        distributions, *rest = torch.stack([self.bad[0] == 0, *fits, *finite]).tolist()
        if not all(rest[len(fits) :]):
            raise ValueError("crf_mean_field: expected finite compatibilities")
        if valid is not None and not rest[0]:
            raise ValueError(
                f"crf_mean_field: expected valid heights in [0, {H}] and widths in [0, {W}], got {valid.tolist()}"
            )
        if not distributions:
            raise ValueError(
                "crf_mean_field: expected unary without NaN and -inf, with a finite energy at every pixel, and "
                "messages that do not overflow"
            )

    def _hear(self, x: Tensor | None, adjoint: bool) -> dict[str, Any]:
        """Arguments of a kernel for the messages of rows ``x``; a lattice of the last term is left for it to slice."""
        heard: dict[str, Any] = dict.fromkeys(SLICED) | {"alpha": 1.0, "CORNERS": 0}
        heard |= {"message_ptr": None, "MESSAGE": False}
        if x is None or not self.terms:
            return heard
        stored, lattice = self.terms, self.terms[-1].lattice
        if lattice is not None:
            heard |= self.terms[-1].unsliced(lattice, x, adjoint)
            stored = stored[:-1]
        if stored:
            heard |= {"message_ptr": self.rows(), "MESSAGE": True}
        for i, term in enumerate(stored):
            term.send(x, adjoint, heard["message_ptr"], add=i > 0)
        return heard


def _features(x: Tensor, y: Tensor, sigma: list[float], image: Tensor | None) -> Tensor:
    """``(x/sx, y/sy)``, with an image ``(B, 3, H, W)`` followed by its channels over theirs: :math:`(B, d, H W)`."""
    planes = [x.expand(len(y), -1), y[:, None].expand(-1, len(x))]
    if image is not None:
        planes = [p.expand(len(image), -1, -1) for p in planes] + list(image.unbind(1))
    # By a tensor: a division by a number is a product with its reciprocal on a GPU, which rounds otherwise.
    over = [p.float() / torch.full((), s, device=x.device) for p, s in zip(planes, sigma, strict=True)]
    return torch.stack(over, dim=-3).flatten(-2)


def crf_mean_field_fwd(
    unary: Tensor, image: Tensor | None, valid: Tensor | None, gaussian_compat: Tensor | None,
    bilateral_compat: Tensor | None, gaussian_sigma: list[float], bilateral_sigma: list[float], iterations: int,
    normalization: str, kernel: str,
) -> Tensor:  # fmt: skip
    """``unary (B G, K, H, W)`` -> Q after the last step; arguments as the reference's."""
    image, valid = _per_problem(unary, image, valid)
    if unary.numel() == 0:
        return unary.new_empty(unary.shape)
    field = MeanField(
        unary, image, valid, gaussian_compat, bilateral_compat, gaussian_sigma, bilateral_sigma, normalization, kernel
    )
    out = field.result(iterations)
    field.check()
    return out


def _per_problem(unary: Tensor, image: Tensor | None, valid: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Image and size of every problem: several on one image have a lattice each here."""
    G = problems_per_image(unary, image, valid)
    image, valid = (t if t is None or G == 1 else t.repeat_interleave(G, dim=0) for t in (image, valid))
    return image, valid


def crf_mean_field_bwd(
    grad: Tensor, compat_grad: bool, unary: Tensor, image: Tensor | None, valid: Tensor | None,
    gaussian_compat: Tensor | None, bilateral_compat: Tensor | None, gaussian_sigma: list[float],
    bilateral_sigma: list[float], iterations: int, normalization: str, kernel: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients as the reference's. Holds Q of every step of the whole batch.

    With dE the gradient of the energies of a step and Q what the step before gave: the gradient of a compatibility is
    the sum over pixels of dE times K Q, which is K^T dE times Q.
    """
    image, valid = _per_problem(unary, image, valid)
    compats = gaussian_compat, bilateral_compat
    of_gaussian, of_bilateral = (
        unary.new_zeros(c.shape if compat_grad and c is not None else 0, dtype=torch.float32) for c in compats
    )
    if unary.numel() == 0:
        return unary.new_empty(unary.shape), of_gaussian, of_bilateral
    field = MeanField(
        unary, image, valid, gaussian_compat, bilateral_compat, gaussian_sigma, bilateral_sigma, normalization, kernel
    )
    of_compats = [g for g, c in zip((of_gaussian, of_bilateral), compats, strict=True) if compat_grad and c is not None]
    steps, energy, K = field.steps(iterations), field.rows(), unary.shape[1]
    total = torch.zeros_like(energy)
    field.gradient(to_rows(grad.flatten(2), 0.0), energy, steps[-1], total)
    for q in reversed(steps[:-1]):
        for term, of_compat in zip(field.terms, of_compats, strict=False):
            heard = field.rows()
            term.send(energy, True, heard, add=False, compatible=False)
            heard, by = heard[:, :K], q[:, :K]
            of_compat += (heard * by).sum(0) if of_compat.ndim == 1 else heard.mT @ by
        field.gradient(None, energy, q, total)
    field.check()
    return field.planes(total), of_gaussian, of_bilateral
