"""Region merging in plain PyTorch: all similarities anew after every round."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastcam._lab import rgb_to_lab, to_bytes

COLOR_SCALE = 20.0  # Lab units at which the similarity of means has fallen to 1 / e
STEPS = 2.0**20  # similarities are counted in 1 / STEPS, so that rounding decides no order


class Regions(NamedTuple):
    """What P regions are compared by, all float64: everything adds up when regions merge.

    Attributes:
        area: pixels :math:`(P,)`.
        perimeter: pixel sides to other regions and on the frame :math:`(P,)`.
        color: sums of L, a, b over the pixels :math:`(P, 3)`.
        hist: counts :math:`(P, F)` of the histograms, one behind the other.
    """

    area: Tensor
    perimeter: Tensor
    color: Tensor
    hist: Tensor

    @property
    def mean(self) -> Tensor:
        """Mean L, a, b :math:`(P, 3)`."""
        return self.color / self.area[:, None]

    def of(self, which: Tensor) -> Regions:
        """Those regions."""
        return Regions(*(part[which] for part in self))


class Contact(NamedTuple):
    """Where P pairs of regions touch, float64.

    Attributes:
        border: common pixel sides :math:`(P,)`.
        initial: mean content similarity of the pairs of first regions that touch along the border :math:`(P,)`.
    """

    border: Tensor
    initial: Tensor


Weight = Callable[[Regions, Regions, Contact], Tensor]


def content_similarity(a: Regions, b: Regions, channels: int = 3) -> Tensor:
    r""":math:`\frac{1}{2n} \sum_f \sqrt{h_f h'_f} + \frac12 \exp(-\|\mu - \mu'\|^2 / 20^2)`, h per pixel, n histograms.

    In [0, 1], 1 for regions that look the same.
    """
    overlap = (a.hist * b.hist).sqrt().sum(-1) / (channels * (a.area * b.area).sqrt())
    return 0.5 * overlap + 0.5 * (-(a.mean - b.mean).square().sum(-1) / COLOR_SCALE**2).exp()


def border_weight(border: Tensor, p: Tensor, q: Tensor) -> Tensor:
    r"""Weight of a border of length b between perimeters p, q: :math:`\beta = \min(\sqrt{b (p + q) / (p q)}, 1)`."""
    return (border * (p + q) / (p * q)).sqrt().clamp(max=1)


def content_border_similarity(a: Regions, b: Regions, contact: Contact, channels: int = 3) -> Tensor:
    r""":math:`S = S_\text{content} + \beta S_\text{border}`, in [0, 2]."""
    beta = border_weight(contact.border, a.perimeter, b.perimeter)
    return content_similarity(a, b, channels) + beta * contact.initial


def mean_color_similarity(a: Regions, b: Regions) -> Tensor:
    r""":math:`1 / (1 + \|\mu - \mu'\| / 20)`."""
    return 1 / (1 + (a.mean - b.mean).square().sum(-1).sqrt() / COLOR_SCALE)


def region_merge_describe(image: Tensor, labels: Tensor, sizes: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """RGB ``(B, 3, H, W)``, labels ``(B, H, W)``, sizes ``(B, 2)`` -> Lab sums ``(S, 3)``, counts ``(S, 3 bins)``."""
    lab = rgb_to_lab(to_bytes("region_merge", image)).long()
    l, ab = lab[:, :1] * bins // 200, (lab[:, 1:] - 56).clamp(min=0) * bins // 400
    bin_of = torch.cat([l, ab], 1).clamp(max=bins - 1) + bins * torch.arange(3, device=lab.device)[:, None, None]
    lab[:, 1:] -= 256
    S = int(sizes[:, 1].sum())
    first = sizes[:, 1].cumsum(0) - sizes[:, 1]
    region = (labels.long() + first[:, None, None]).flatten()
    sums = lab.new_zeros(S, 3).index_add_(0, region, lab.movedim(1, -1).reshape(-1, 3))
    at = region[:, None] * 3 * bins + bin_of.movedim(1, -1).reshape(-1, 3)
    return sums.double() / 2, at.flatten().bincount(minlength=S * 3 * bins).view(S, 3 * bins).double()


def region_merge_fwd(
    edges: Tensor, border: Tensor, area: Tensor, perimeter: Tensor, sums: Tensor, hist: Tensor, sizes: Tensor,
    channels: int, weight: str, criterion: str, start: float, stop: float, factor: float, fraction: float,
    penalty: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Graphs and descriptors of all images one behind the other -> merges ``(S, 3)``, their numbers ``(S, 2)``, and how
    many each image has ``(B,)``."""
    named: dict[str, Weight] = {
        "content_border": lambda a, b, contact: content_border_similarity(a, b, contact, channels),
        "content": lambda a, b, contact: content_similarity(a, b, channels),
        "mean_color": lambda a, b, contact: mean_color_similarity(a, b),
    }
    of_edges, of_regions = sizes.T.tolist()
    graphs = zip(
        edges.split(of_edges), border.split(of_edges), area.split(of_regions), perimeter.split(of_regions),
        sums.split(of_regions), hist.split(of_regions), strict=True,
    )  # fmt: skip
    merges, numbers = edges.new_zeros(len(area), 3), sums.new_zeros(len(area), 2)
    counts, first = [], 0
    for e, b, a, p, s, h in graphs:
        log = merge(e, b, a, p, s, h, channels, named[weight], criterion, start, stop, factor, fraction, penalty)
        counts.append(len(log))
        if log:
            merges[first : first + len(log)] = torch.tensor([row[:3] for row in log], device=edges.device)
            numbers[first : first + len(log)] = torch.tensor([row[3:] for row in log], device=edges.device).to(numbers)
        first += len(a)
    return merges, numbers, torch.tensor(counts, dtype=torch.int64, device=edges.device)


Merge = tuple[int, int, int, float, float]  # round, kept, absorbed, value, threshold


def merge(
    edges: Tensor, border: Tensor, area: Tensor, perimeter: Tensor, sums: Tensor, hist: Tensor, channels: int,
    weight: Weight, criterion: str, start: float, stop: float, factor: float, fraction: float, penalty: float,
) -> list[Merge]:  # fmt: skip
    """The merges of one image, in order."""
    regions = Regions(area.double(), perimeter.double(), sums, hist)
    i, j, length = edges[:, 0], edges[:, 1], border.double()
    initial = content_similarity(regions.of(i), regions.of(j), channels)
    pairs = torch.ones_like(initial)  # of first regions along each border
    alive = int((area > 0).sum())
    threshold, log, rounds = start, [], 0
    while alive > 1 and len(i) and threshold > stop:
        value = _count_in_steps(weight(regions.of(i), regions.of(j), Contact(length, initial / pairs)))
        if criterion == "adaptive":
            chosen = _matching(i, j, value, penalty)
            wanted = max(1.0, fraction * alive)
            if len(chosen) < wanted:
                break  # no threshold would do
            while threshold > stop and sum(v > threshold for v, _, _ in chosen) < wanted:
                threshold /= factor
            if threshold <= stop:
                break
            chosen = [pair for pair in chosen if pair[0] > threshold]
        else:
            threshold = float(value.max())
            if threshold <= stop:
                break
            chosen = [min((threshold, int(i[e]), int(j[e])) for e in (value == threshold).nonzero()[:, 0])]
        log += [(rounds, a, b, v, threshold) for v, a, b in chosen]
        rounds += 1

        # The lower number stands for both; what adds up is added, borders that fall together too.
        kept = torch.arange(len(area), device=area.device)
        gone = torch.tensor([b for _, _, b in chosen], device=area.device)
        kept[gone] = torch.tensor([a for _, a, _ in chosen], device=area.device)
        regions = Regions(*(torch.zeros_like(part).index_add_(0, kept, part) for part in regions))
        i, j = kept[i], kept[j]
        inner = i == j
        regions.perimeter.index_add_(0, i[inner], -2 * length[inner])
        low, high = torch.minimum(i, j)[~inner], torch.maximum(i, j)[~inner]
        key, group = torch.unique(low * len(area) + high, return_inverse=True)
        length, initial, pairs = (
            part.new_zeros(len(key)).index_add_(0, group, part[~inner]) for part in (length, initial, pairs)
        )
        i, j = key // len(area), key % len(area)
        alive -= len(chosen)
        if criterion == "adaptive":
            factor = max(1 + len(chosen) / (alive + len(chosen)), 1.01)
            threshold = min(threshold * factor, start)
    return log


def _count_in_steps(value: Tensor) -> Tensor:
    return (value * STEPS).round().clamp(min=1) / STEPS


def _matching(i: Tensor, j: Tensor, value: Tensor, penalty: float) -> list[tuple[float, int, int]]:
    """Every region with its most similar neighbour, at `penalty` times the value where that one prefers another: in
    descending order those ``(value, i, j)`` whose regions none before has."""
    best: dict[int, tuple[float, int]] = {}
    for a, b, v in zip(i.tolist(), j.tolist(), value.tolist(), strict=True):
        for one, other in ((a, b), (b, a)):
            best[one] = max(best.get(one, (-1.0, 0)), (v, -other))
    candidates = set()
    for one, (v, other) in best.items():
        mutual = best[-other][1] == -one
        candidates.add((v if mutual else penalty * v, min(one, -other), max(one, -other)))
    chosen: list[tuple[float, int, int]] = []
    taken: set[int] = set()
    for v, a, b in sorted(candidates, key=lambda c: (-c[0], c[1], c[2])):
        if not {a, b} & taken:
            taken |= {a, b}
            chosen.append((v, a, b))
    return chosen
