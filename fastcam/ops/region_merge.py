"""Neighbouring regions merged, most similar first, and the tree of all merges."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from torch import Tensor

from fastcam import backends
from fastcam._checks import FLOATS, check_labels
from fastcam._library import PACKAGES, op
from fastcam.ops.region_graph import Graph, region_graph
from fastcam.ops.region_reduce import region_reduce


def _fwd_fake(
    edges: Tensor, border: Tensor, area: Tensor, perimeter: Tensor, sums: Tensor, hist: Tensor, sizes: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    S = area.shape[0]
    return area.new_empty((S, 3)), sums.new_empty((S, 2)), area.new_empty((sizes.shape[0],))


FWD = op(
    "region_merge_fwd(Tensor edges, Tensor border, Tensor area, Tensor perimeter, Tensor sums, Tensor hist, "
    "Tensor sizes, int channels, str weight, str criterion, float start, float stop, float factor, float fraction, "
    "float penalty, str backend) -> (Tensor, Tensor, Tensor)",
    fake=_fwd_fake,
)
CANDIDATES = {"cpp": backends.needs_cpp, "reference": backends.always}
WEIGHTS = ("content_border", "content", "mean_color")
CRITERIA = ("adaptive", "best_first")
BINS = 16
MOST_REGIONS = 2**21  # two of their numbers and a similarity fit into 64 bits
TEXTURES = 10  # of the uniform local binary patterns


@dataclass(frozen=True)
class MergeTree:
    """All merges of one image in the order they happened, so that any earlier state can be had without running again.

    Attributes:
        labels: the regions that were merged, :math:`(H, W)`.
        merges: int64 :math:`(M, 2)`: the region that took the other up, which is the lower number, and the other.
        values: float64 :math:`(M,)`: similarity of the two (times the penalty where the choice was not mutual).
        thresholds: float64 :math:`(M,)`: the threshold under which they merged; ``best_first``: their similarity.
        rounds: int64 :math:`(M,)`: number of the round, 0 first.
        regions: how many regions there were, those without pixels not counted.
        stop: the threshold at which merging ended.
    """

    labels: Tensor
    merges: Tensor
    values: Tensor
    thresholds: Tensor
    rounds: Tensor
    regions: int
    stop: float

    def region_of(self, level: float | None = None, *, count: int | None = None) -> Tensor:
        """As :meth:`cut`, for regions instead of pixels: int64 :math:`(S,)`, -1 for a label that no pixel has."""
        done = self._merges_until(level, count)
        S = int(self.labels.max()) + 1 if self.labels.numel() else 0
        kept = torch.arange(S)
        pairs = self.merges[:done].tolist()
        for keep, gone in pairs:
            kept[gone] = keep
        while not torch.equal(kept, further := kept[kept]):
            kept = further
        there = self.labels.long().flatten().bincount(minlength=S).cpu() > 0
        first = there & (kept == torch.arange(S))
        number = (first.cumsum(0) - 1)[kept]
        return torch.where(there, number, -1).to(self.labels.device)

    def cut(self, level: float | None = None, *, count: int | None = None) -> Tensor:
        """The regions at a stage of merging.

        Args:
            level: the state in which the threshold first fell to ``level`` or below: what is left to merge is less
                similar. ``None``, without a count, is the last state.
            count: the state in which this many regions are left.

        Returns:
            int64 :math:`(H, W)`: regions numbered from 0 in the order of their lowest label. A lower level or count is
            a coarsening of a higher one.

        Raises:
            ValueError: both are given; a level or count below where merging ended.
        """
        return self.region_of(level, count=count)[self.labels.long()]

    def _merges_until(self, level: float | None, count: int | None) -> int:
        M = len(self.merges)
        if level is not None and count is not None:
            raise ValueError(f"MergeTree: expected a level or a count, got level {level} and count {count}")
        if count is not None:
            if not self.regions - M <= count <= self.regions:
                raise ValueError(
                    f"MergeTree: expected a count from {self.regions - M} to {self.regions}, got {count}; "
                    f"a region_merge with stop below {self.stop} goes further"
                )
            return self.regions - count
        if level is None:
            return M
        if not level >= self.stop:
            raise ValueError(f"MergeTree: merging stopped at {self.stop}, got level {level}; pass a lower stop")
        below = (self.thresholds <= level).nonzero()
        return int(below[0]) if len(below) else M


def region_merge(
    labels: Tensor,
    image: Tensor,
    *,
    weight: Literal["content_border", "content", "mean_color"] | Callable[..., Tensor] = "content_border",
    criterion: Literal["adaptive", "best_first"] = "adaptive",
    stop: float = 0.9,
    start: float = 2.0,
    factor: float = 1.05,
    min_fraction: float = 0.01,
    penalty: float = 0.9,
    texture: bool = False,
    graphs: list[Graph] | None = None,
    backend: str | None = None,
) -> list[MergeTree]:
    r"""Merges neighbouring regions of every image, the most similar ones first.

    Similarity by ``weight``, of regions i and j:

    - ``"content_border"``: :math:`S = S_c + \beta_{ij} S_b`, in [0, 2].
      :math:`S_c = \frac12 BC + \frac12 \exp(-\|\mu_i - \mu_j\|^2 / 20^2)` compares the regions: means in CIE Lab,
      Bhattacharyya coefficient of 16 bins a channel. :math:`S_b`, the mean :math:`S_c` of the pairs of first regions
      that touch along the common border, compares what meets there;
      :math:`\beta = \min(\sqrt{b (p_i + p_j) / (p_i p_j)}, 1)` weighs it by the border b and the perimeters p.
    - ``"content"``: :math:`S_c`. ``"mean_color"``: :math:`1 / (1 + \|\mu_i - \mu_j\| / 20)`.
    - a function ``(a, b, contact)`` of P pairs: ``a``, ``b`` :class:`~fastcam.reference.region_merge.Regions`,
      ``contact`` their :class:`~fastcam.reference.region_merge.Contact`; it returns :math:`(P,)`, larger is merged
      sooner, the order of a and b must not matter. It is called once a round, on all pairs, and runs on the reference
      backend.

    Similarities are rounded to multiples of :math:`2^{-20}`, at least one, so that all machines decide alike.

    ``"adaptive"``: in a round every region names its most similar neighbour (ties: the lower number). Pairs that name
    each other have their similarity as value, others ``penalty`` times it. Those above the threshold T are merged in
    descending order, each region once, unless they are fewer than ``min_fraction`` of all regions: then nothing is
    merged and T is divided by A. After n merges of R regions, :math:`A = \max(1 + n/R, 1.01)` and T rises to
    :math:`\min(T A, T_0)`: the next round takes only the best again. It ends with T at ``stop``.
    ``"best_first"``: the most similar pair, as long as it is above ``stop``.

    The rounds follow Chaibou et al., J. Electronic Imaging 26(6), 2017, as its abstract and a derived public program
    (P. Sapirstein's slicMerge) describe them; descriptors and constants are our own: inspired by, not a replication.

    Cost: that of :func:`region_graph`, one pass over the image, and per merge the neighbours of two regions times the
    bins. Not differentiable. Sizes depend on values, so a GPU is waited for.

    Args:
        labels: :math:`(B, H, W)`, integers from 0, superpixels for example.
        image: RGB :math:`(B, 3, H, W)` in 0..255, uint8 or floating.
        weight, criterion: as above.
        stop: T or similarity at which merging ends; 0 merges as far as it goes.
        start: :math:`T_0`. ``factor``: the first A.
        min_fraction, penalty: as above.
        texture: a fourth histogram, of uniform local binary patterns (8 neighbours) of the lightness, in BC.
        graphs: what :func:`region_graph` gave for ``labels``, where it is at hand.
        backend: ``"cpp"``, ``"reference"``, or ``None`` to choose.

    Returns:
        One :class:`MergeTree` an image.

    Raises:
        ValueError: shapes that do not fit, two devices, an image with NaN, an unknown weight or criterion, numbers out
            of range, a callable that returns another shape or NaN; labels as for :func:`region_graph`, more than
            2^21 regions.
        TypeError: labels that are no integers, an image neither uint8 nor floating.
        BackendError: a backend asked for by name cannot run, or cannot call functions.

    Example:
        >>> image = torch.zeros(1, 3, 1, 3)
        >>> image[..., 2] = 255
        >>> tree = region_merge(torch.tensor([[[0, 1, 2]]]), image)[0]
        >>> tree.cut()
        tensor([[0, 0, 1]])
        >>> tree.cut(count=3)
        tensor([[0, 1, 2]])
    """
    _check(labels, image, weight, criterion, start, stop, factor, min_fraction, penalty)
    names = {"reference": backends.always} if callable(weight) else CANDIDATES
    name = backends.resolve("region_merge", names, labels, backend)
    if graphs is None:
        graphs = region_graph(labels, backend=name)
    elif len(graphs) != len(labels):
        raise ValueError(f"region_merge: expected {len(labels)} graphs, one an image, got {len(graphs)}")
    most = max((len(g.area) for g in graphs), default=0)
    if most > MOST_REGIONS:
        raise ValueError(f"region_merge: expected at most {MOST_REGIONS} regions an image, got {most}")
    launchers = import_module(f"fastcam.{PACKAGES[name]}.region_merge")
    sizes = torch.tensor([[len(g.edges), len(g.area)] for g in graphs], dtype=torch.int64, device=labels.device)
    sizes = sizes.view(-1, 2)
    sums, hist = launchers.region_merge_describe(image.detach(), labels, sizes, BINS)
    if texture:
        hist = torch.cat([hist, _texture(image, labels, [len(g.area) for g in graphs])], 1)
    channels = 4 if texture else 3
    numbers = start, stop, factor, min_fraction, penalty
    if callable(weight):
        return _with_function(labels, graphs, sums, hist, channels, weight, criterion, *numbers)
    flat = [torch.cat(parts) for parts in zip(*graphs, strict=True)] if graphs else [sizes.new_zeros(0)] * 4
    merges, values, counts = FWD(*flat, sums, hist, sizes, channels, weight, criterion, *numbers, name)
    trees, first = [], 0
    for one, graph, M in zip(labels, graphs, counts.tolist(), strict=True):
        row, number = merges[first : first + M], values[first : first + M]
        regions = int((graph.area > 0).sum())
        trees.append(MergeTree(one, row[:, 1:], number[:, 0], number[:, 1], row[:, 0], regions, stop))
        first += len(graph.area)
    return trees


def _with_function(
    labels: Tensor, graphs: list[Graph], sums: Tensor, hist: Tensor, channels: int, weight: Any, *options: Any
) -> list[MergeTree]:
    from fastcam.reference.region_merge import merge

    def checked(a: Any, b: Any, contact: Any) -> Tensor:
        value = weight(a, b, contact)
        if value.shape != contact.border.shape or bool(value.isnan().any()):
            raise ValueError(
                f"region_merge: expected weight to return ({len(contact.border)},) without NaN, got "
                f"{tuple(value.shape)}, {int(value.isnan().sum())} NaN"
            )
        return value.double()

    trees = []
    sizes = [len(g.area) for g in graphs]
    for one, graph, s, h in zip(labels, graphs, sums.split(sizes), hist.split(sizes), strict=True):
        log = merge(graph.edges, graph.border, graph.area, graph.perimeter, s, h, channels, checked, *options)
        rows = torch.tensor([row[:3] for row in log], dtype=torch.int64, device=labels.device).view(-1, 3)
        numbers = torch.tensor([row[3:] for row in log], dtype=torch.float64, device=labels.device).view(-1, 2)
        regions = int((graph.area > 0).sum())
        trees.append(MergeTree(one, rows[:, 1:], numbers[:, 0], numbers[:, 1], rows[:, 0], regions, options[2]))
    return trees


def _texture(image: Tensor, labels: Tensor, sizes: list[int]) -> Tensor:
    """Counts of the uniform local binary patterns of each region :math:`(S, 10)`, image behind image.

    A pattern says which of the 8 neighbours are at least as light as the pixel. Going round, it changes at most twice
    in a uniform one, whose bin is the number of lighter neighbours; all others share the last bin.
    """
    from fastcam._lab import rgb_to_lab, to_bytes

    light = rgb_to_lab(to_bytes("region_merge", image))[:, 0]
    padded = torch.nn.functional.pad(light[:, None].double(), (1, 1, 1, 1), mode="replicate")[:, 0]
    H, W = light.shape[1:]
    around = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))
    lighter = torch.stack([padded[:, y : y + H, x : x + W] >= light for y, x in around])
    changes = (lighter != lighter.roll(1, 0)).sum(0)
    pattern = torch.where(changes <= 2, lighter.sum(0), TEXTURES - 1)
    widest = max(sizes, default=0)
    counts = region_reduce(pattern[:, None].double(), labels, reduce="hist", num_regions=widest, bins=TEXTURES,
                           range=(0, TEXTURES))  # fmt: skip
    return torch.cat([one[:S, 0] for one, S in zip(counts, sizes, strict=True)]).double()


def _check(
    labels: Tensor, image: Tensor, weight: Any, criterion: str, start: float, stop: float, factor: float,
    fraction: float, penalty: float,
) -> None:  # fmt: skip
    check_labels("region_merge", labels=labels)
    if labels.ndim != 3 or image.shape != (labels.shape[0], 3, *labels.shape[1:]):
        raise ValueError(
            "region_merge: expected labels (B, H, W) and image (B, 3, H, W), "
            f"got {tuple(labels.shape)} and {tuple(image.shape)}"
        )
    if image.dtype != torch.uint8 and image.dtype not in FLOATS:
        raise TypeError(
            f"region_merge: expected image uint8 or floating, got {str(image.dtype).removeprefix('torch.')}"
        )
    if image.device != labels.device:
        raise ValueError(f"region_merge: expected one device, got labels on {labels.device}, image on {image.device}")
    if not callable(weight) and weight not in WEIGHTS:
        raise ValueError(f"region_merge: expected weight in {WEIGHTS} or a function, got {weight!r}")
    if criterion not in CRITERIA:
        raise ValueError(f"region_merge: expected criterion in {CRITERIA}, got {criterion!r}")
    if not 0 <= stop < float("inf") or not 0 < start < float("inf"):
        raise ValueError(f"region_merge: expected stop >= 0 and start > 0, got {stop} and {start}")
    if not 1 < factor < float("inf") or not 0 <= fraction <= 1 or not 0 < penalty <= 1:
        raise ValueError(
            "region_merge: expected factor > 1, min_fraction in [0, 1], penalty in (0, 1], "
            f"got {factor}, {fraction}, {penalty}"
        )
