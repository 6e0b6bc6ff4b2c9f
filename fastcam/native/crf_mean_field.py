"""Launchers of ``csrc/cpu/{crf_mean_field,lattice}.cpp``. 16-bit inputs are converted to float32 first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastcam import _C

_NORMALIZATIONS = ("symmetric", "before", "after", "none")  # in the order of the enumerations in crf_mean_field.cpp
_KERNELS = ("fast", "lattice", "exact")


class Lattice:
    """The permutohedral lattice of ``features (d, N)``; see ``fastcam.reference.crf_mean_field.Lattice``."""

    def __init__(self, features: Tensor) -> None:
        points = features.float().contiguous()
        self._size = features.shape
        self._lattice = _C.Lattice(points.data_ptr(), *features.shape, torch.get_num_threads())

    def filter(self, x: Tensor, reverse: bool = False) -> Tensor:
        """``x (V, N)``, float32 or float64 -> :math:`(V, N)`."""
        x = x.contiguous()
        out = torch.empty_like(x)
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
    """``unary (B, K, H, W)`` -> Q after the last step; arguments as the reference's."""
    return _launch(_C.crf_mean_field_fwd, None, unary, *rest)


def crf_mean_field_bwd(grad: Tensor, unary: Tensor, *rest: Any) -> Tensor:
    """Gradient of the unary; arguments as the reference's. Holds Q of every step of the images that are in work."""
    return _launch(_C.crf_mean_field_bwd, grad, unary, *rest)


def _launch(
    run: Callable[..., None], grad: Tensor | None, unary: Tensor, image: Tensor | None, valid: Tensor | None,
    gaussian_compat: Tensor | None, bilateral_compat: Tensor | None, gaussian_sigma: list[float],
    bilateral_sigma: list[float], iterations: int, normalization: str, kernel: str,
) -> Tensor:  # fmt: skip
    work = torch.promote_types(unary.dtype, torch.float32)
    B, K, H, W = unary.shape
    u = unary.to(work).contiguous()
    g, rgb, gaussian, bilateral = (
        None if t is None else t.to(work).contiguous() for t in (grad, image, gaussian_compat, bilateral_compat)
    )
    for compat in (gaussian, bilateral):
        if compat is not None and not compat.isfinite().all():
            raise ValueError("crf_mean_field: expected finite compatibilities")
    sizes = torch.tensor([[H, W]] * B, dtype=torch.int64) if valid is None else valid.contiguous()
    if valid is not None and not ((valid >= 0) & (valid <= torch.tensor([H, W]))).all():
        raise ValueError(
            f"crf_mean_field: expected valid heights in [0, {H}] and widths in [0, {W}], got {valid.tolist()}"
        )
    sigma = torch.tensor([*(gaussian_sigma or [1, 1]), *(bilateral_sigma or [1] * 5)], dtype=torch.float64)
    out = torch.empty((B, K, H, W), dtype=work)
    first = () if g is None else (g.data_ptr(),)
    run(
        *first, u.data_ptr(), _address(rgb), sizes.data_ptr(), _address(gaussian), _address(bilateral),
        gaussian is not None and gaussian.ndim == 2, bilateral is not None and bilateral.ndim == 2, sigma.data_ptr(),
        out.data_ptr(), work == torch.float64, B, K, H, W, iterations, _NORMALIZATIONS.index(normalization),
        _KERNELS.index(kernel), torch.get_num_threads(),
    )  # fmt: skip
    return out.to(unary.dtype)


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
