"""Which regions of a label map touch, and along how many pixel sides."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastcam import backends
from fastcam._checks import check_labels
from fastcam._library import op


def _fwd_fake(labels: Tensor, backend: str) -> tuple[Tensor, ...]:
    context = torch.library.get_ctx()
    edges, regions = context.new_dynamic_size(), context.new_dynamic_size()
    sizes = ((edges, 2), (edges,), (regions,), (regions,), (labels.shape[0], 2))
    return tuple(labels.new_empty(size, dtype=torch.int64) for size in sizes)


FWD = op("region_graph_fwd(Tensor labels, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)", fake=_fwd_fake)
CANDIDATES = {"cpp": backends.needs_cpp, "reference": backends.always}


class Graph(NamedTuple):
    """The regions of one image and their neighbours, all int64.

    Attributes:
        edges: :math:`(E, 2)` pairs ``i < j`` of regions that touch, in ascending order.
        border: :math:`(E,)` number of 4-neighbouring pixel pairs with one pixel in i, one in j.
        area: :math:`(S,)` pixels of each region.
        perimeter: :math:`(S,)` pixel sides between the region and anything else, the image's frame included: the sum
            of its borders plus its sides on the frame.
    """

    edges: Tensor
    border: Tensor
    area: Tensor
    perimeter: Tensor


def region_graph(labels: Tensor, *, backend: str | None = None) -> list[Graph]:
    r"""The region adjacency graph of every image.

    .. math:: b_{ij} = \#\{(p, q) \text{ 4-neighbours} : l_p = i,\ l_q = j\}, \qquad
              p_i = \sum_j b_{ij} + \text{sides of } i \text{ on the frame}

    Cost: one pass over the labels; memory in proportion to the number of edges (``cpp``) or of neighbouring pixels of
    different labels (``reference``). Not differentiable. How many edges there are depends on the values, so on a GPU
    this waits for them.

    Args:
        labels: :math:`(B, H, W)`, integers from 0, any strides. A region is all pixels of one label, in one piece or
            several; labels may have gaps.
        backend: ``"cpp"``, ``"reference"``, or ``None`` to choose.

    Returns:
        One :class:`Graph` an image. S is the image's largest label plus one; a label that no pixel has gets area and
        perimeter 0.

    Raises:
        ValueError: labels that are not :math:`(B, H, W)`, a label below 0 or above 2^24 - 1.
        TypeError: labels that are no integers.
        BackendError: a backend asked for by name cannot run.

    Example:
        >>> graph = region_graph(torch.tensor([[[0, 0, 1], [2, 2, 1]]]))[0]
        >>> graph.edges.tolist(), graph.border.tolist(), graph.perimeter.tolist()
        ([[0, 1], [0, 2], [1, 2]], [1, 2, 1], [6, 6, 6])
    """
    check_labels("region_graph", labels=labels)
    if labels.ndim != 3:
        raise ValueError(f"region_graph: expected labels (B, H, W), got {tuple(labels.shape)}")
    name = backends.resolve("region_graph", CANDIDATES, labels, backend)
    edges, border, area, perimeter, counts = FWD(labels, name)
    of_edges, of_regions = counts.T.tolist()
    per_image = zip(
        edges.split(of_edges), border.split(of_edges), area.split(of_regions), perimeter.split(of_regions), strict=True
    )
    return [Graph(*parts) for parts in per_image]
