"""Superpixels by local k-means (SLIC)."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcam import backends
from fastcam._checks import FLOATS
from fastcam._library import op

FWD = op(
    "superpixel_slic_fwd(Tensor image, Tensor? contour, int n_segments, float compactness, float contour_weight, "
    "int iterations, bool connect, str backend) -> Tensor",
    fake=lambda image, *_: image.new_empty((image.shape[0], *image.shape[2:]), dtype=torch.int32),
)
CANDIDATES = {"cpp": backends.needs_cpp, "reference": backends.always}
MOST_SEGMENTS = 65535  # their numbers and one more fit into 16 bits


def superpixel_slic(
    image: Tensor,
    n_segments: int,
    *,
    compactness: float = 10.0,
    iterations: int = 10,
    enforce_connectivity: bool = True,
    contour: Tensor | None = None,
    contour_weight: float = 50.0,
    backend: str | None = None,
) -> Tensor:
    r"""Superpixels of an image: k-means on colour and place, each centre looking only around itself.

    About ``n_segments`` centres start on a grid, each moved to the lowest gradient of the 3 x 3 pixels there. A pixel
    goes to the centre that minimises

    .. math:: D = \|c - c_k\|_1 + \frac{m}{S} \|x - x_k\|_1, \quad S = \sqrt{H W / n}

    over the centres in whose window it lies (the grid's step to each side), and keeps its label where there is none;
    centres become the means of their pixels. Iteration t looks at every third row only, from row t modulo 3 on (every
    second or every row where the step is below 12 or 8 pixels), a last assignment at all. Achanta et al., PAMI 2012,
    who add squares: sums of absolute differences find more of the edges and take less time.

    All of it is integer arithmetic, so every backend, machine and number of threads gives the same labels: colours are
    CIE L*a*b* in half units, means are rounded, places to whole pixels, distances to half units; equal ones go to the
    earlier centre.

    With a ``contour`` map g, superpixels do not grow across its lines: D has one more term,
    :math:`\gamma \max g` over the pixels of the straight line from the centre to the pixel.

    With ``enforce_connectivity`` the 4-connected pieces of the labels are the superpixels. A piece smaller than a
    quarter of :math:`S^2` joins the larger piece beside it whose centre's colour is nearest to that of its own; or,
    between small ones only, the piece above its first pixel in scan order, in the top row the one to the left.

    Cost: about 4 distances a pixel and iteration on a third of the rows; with a contour each of them reads about S / 2
    pixels. Not differentiable.

    Args:
        image: RGB :math:`(B, 3, H, W)` in 0..255, uint8, or floating, which is rounded and clipped.
        n_segments: how many are wanted, at least 1; more than pixels counts as one for each pixel. Rows and columns of
            the grid multiply to about that, at most 65535.
        compactness: m. Larger: rounder superpixels; smaller: closer to the edges.
        iterations: k-means steps before the last assignment; 0 takes the centres as they start.
        enforce_connectivity: ``False`` gives the number of each pixel's centre; some may be missing, some in pieces.
        contour: g :math:`(B, H, W)`, floating, clipped to [0, 1]: :func:`fastcam.nn.regions.gradient_contour`, or
            what a network takes for a boundary.
        contour_weight: :math:`\gamma`, what a full line counts in units of CIE L*a*b*.
        backend: ``"cpp"``, ``"reference"``, or ``None`` to choose.

    Returns:
        int32 :math:`(B, H, W)`: superpixels numbered from 0 in scan order of their first pixels, each 4-connected.

    Raises:
        ValueError: an image that is not :math:`(B, 3, H, W)` or holds a NaN, ``n_segments`` not positive or above
            65535, ``compactness`` not positive and finite, ``iterations`` negative; a contour of another size, on
            another device or with a NaN, ``contour_weight`` negative.
        TypeError: an image neither uint8 nor floating, a contour that is not floating.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> image = torch.zeros(1, 3, 2, 4)
        >>> image[..., 2:] = 255
        >>> superpixel_slic(image, 2)
        tensor([[[0, 0, 1, 1],
                 [0, 0, 1, 1]]], dtype=torch.int32)
    """
    if image.ndim != 4 or image.shape[1] != 3:
        raise ValueError(f"superpixel_slic: expected image (B, 3, H, W), got {tuple(image.shape)}")
    if image.dtype != torch.uint8 and image.dtype not in FLOATS:
        raise TypeError(
            f"superpixel_slic: expected image uint8 or floating, got {str(image.dtype).removeprefix('torch.')}"
        )
    if not 1 <= n_segments <= MOST_SEGMENTS:
        raise ValueError(f"superpixel_slic: expected n_segments from 1 to {MOST_SEGMENTS}, got {n_segments}")
    if not 0 < compactness < float("inf"):
        raise ValueError(f"superpixel_slic: expected a positive compactness, got {compactness}")
    if iterations < 0:
        raise ValueError(f"superpixel_slic: expected iterations >= 0, got {iterations}")
    if contour is not None and contour.shape != (image.shape[0], *image.shape[2:]):
        expected = (image.shape[0], *image.shape[2:])
        raise ValueError(f"superpixel_slic: expected contour {expected} for the image, got {tuple(contour.shape)}")
    if contour is not None and contour.dtype not in FLOATS:
        raise TypeError(
            f"superpixel_slic: expected a floating contour, got {str(contour.dtype).removeprefix('torch.')}"
        )
    if contour is not None and contour.device != image.device:
        raise ValueError(
            f"superpixel_slic: expected one device, got image on {image.device}, contour on {contour.device}"
        )
    if not 0 <= contour_weight < float("inf"):
        raise ValueError(f"superpixel_slic: expected contour_weight >= 0, got {contour_weight}")
    name = backends.resolve("superpixel_slic", CANDIDATES, image, backend)
    return FWD(image, contour, n_segments, compactness, contour_weight, iterations, enforce_connectivity, name)
