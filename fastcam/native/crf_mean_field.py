"""Launchers of ``csrc/cpu/{crf_mean_field,lattice}.cpp``. 16-bit inputs are converted to float32 first."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcam import _C
from fastcam.native._memory import empty
from fastcam.reference.crf_mean_field import check_compats, problems_per_image, true_sizes

_NORMALIZATIONS = ("symmetric", "before", "after", "none")  # in the order of the enumerations in crf_mean_field.cpp
_KERNELS = ("fast", "lattice", "exact")
MAX_POINTS = 2**30 // 6 - 1  # vertices of five features, and copies of them, have 32-bit numbers


class Lattice:
    """The permutohedral lattice of ``features (d, N)``; see ``fastcam.reference.crf_mean_field.Lattice``."""

    def __init__(self, features: Tensor) -> None:
        points = features.float().contiguous()
        self._size = features.shape
        self._lattice = _C.Lattice(points.data_ptr(), *features.shape, torch.get_num_threads())

    def filter(self, x: Tensor, reverse: bool = False) -> Tensor:
        """``x (V, N)``, float32 or float64 -> :math:`(V, N)`."""
        x = x.contiguous()
        out = empty(x.shape, x.dtype)
        self._lattice.filter(
            x.data_ptr(), out.data_ptr(), x.dtype == torch.float64, len(x), reverse, torch.get_num_threads()
        )
        return out

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """``vertex (N, d + 1)``, ``weight (N, d + 1)``, ``neighbour (d + 1, M, 2)``."""
        d, N = self._size
        vertex = torch.empty((N, d + 1), dtype=torch.int32)
        neighbour = torch.empty((d + 1, self._lattice.vertices, 2), dtype=torch.int32)
        weight = torch.empty((N, d + 1))
        self._lattice.copy_to(vertex.data_ptr(), weight.data_ptr(), neighbour.data_ptr())
        return vertex, weight, neighbour


def crf_mean_field_fwd(unary: Tensor, *rest: Any) -> Tensor:
    """``unary (B G, K, H, W)`` -> Q after the last step; arguments as the reference's."""
    arguments, out = _arguments(unary, *rest)
    _C.crf_mean_field_fwd(*arguments.before_out, out.data_ptr(), *arguments.after_out)
    return out.to(unary.dtype)


def crf_mean_field_bwd(grad: Tensor, compat_grad: bool, unary: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients as the reference's. Holds Q of every step of the images that are in work."""
    arguments, out = _arguments(unary, *rest)
    g = grad.to(out.dtype).contiguous()
    grads = [torch.zeros(c.shape if compat_grad and c is not None else 0, dtype=torch.float64) for c in rest[2:4]]
    _C.crf_mean_field_bwd(
        g.data_ptr(), *arguments.before_out, out.data_ptr(), *(t.data_ptr() if t.numel() else 0 for t in grads),
        *arguments.after_out,
    )  # fmt: skip
    gaussian, bilateral = (t.to(out.dtype) for t in grads)
    return out.to(unary.dtype), gaussian, bilateral


class _Arguments(NamedTuple):
    before_out: tuple[Any, ...]
    after_out: tuple[Any, ...]
    alive: tuple[Any, ...]  # what the addresses point to


def _arguments(
    unary: Tensor, image: Tensor | None, valid: Tensor | None, gaussian_compat: Tensor | None,
    bilateral_compat: Tensor | None, gaussian_sigma: list[float], bilateral_sigma: list[float], iterations: int,
    normalization: str, kernel: str,
) -> tuple[_Arguments, Tensor]:  # fmt: skip
    """What the C++ functions take, and room for a result like ``unary``."""
    work = torch.promote_types(unary.dtype, torch.float32)
    problems, K, H, W = unary.shape
    _check_memory(K, H, W, work)
    G = problems_per_image(unary, image, valid)
    B = problems // G
    u = unary.to(work).contiguous()
    rgb, gaussian, bilateral = (
        None if t is None else t.to(work).contiguous() for t in (image, gaussian_compat, bilateral_compat)
    )
    check_compats(gaussian, bilateral)
    sizes = torch.tensor(true_sizes(valid, B, H, W), dtype=torch.int64).reshape(B, 2)
    sigma = torch.tensor([*(gaussian_sigma or [1, 1]), *(bilateral_sigma or [1] * 5)], dtype=torch.float64)
    before_out = (
        u.data_ptr(), _address(rgb), sizes.data_ptr(), _address(gaussian), _address(bilateral),
        gaussian is not None and gaussian.ndim == 2, bilateral is not None and bilateral.ndim == 2, sigma.data_ptr(),
    )  # fmt: skip
    after_out = (
        work == torch.float64, B, G, K, H, W, iterations, _NORMALIZATIONS.index(normalization),
        _KERNELS.index(kernel), torch.get_num_threads(),
    )  # fmt: skip
    alive = u, rgb, gaussian, bilateral, sizes, sigma
    return _Arguments(before_out, after_out, alive), empty((problems, K, H, W), work)


def _check_memory(K: int, H: int, W: int, work: torch.dtype) -> None:
    """Refuse an image that cannot be done here: Linux would grant the memory, and kill the process later."""
    needed = H * W * (200 + 5 * (K + 3) * work.itemsize)  # lattice and its construction; energies, Q, two arrays each
    installed = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if H * W > MAX_POINTS or needed > installed:
        raise ValueError(
            f"crf_mean_field: an image of {H} x {W} with {K} labels needs about {needed / 1e9:.0f} GB (this machine "
            f"has {installed / 1e9:.0f}) and at most {MAX_POINTS:,} pixels; cut it into overlapping tiles"
        )


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
