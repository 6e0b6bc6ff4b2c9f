"""Scores of partitions into regions: superpixels, and segmentations whose labels have no meaning.

Definitions are those of the BSDS500 benchmark (Arbelaez et al., PAMI 2011) and, for superpixels, of Stutz et al., CVIU
2018. Label maps are integer tensors ``(H, W)``; only which pixels share a label counts. An image may have several true
partitions, one an annotator.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastcam.ops.region_graph import region_graph

MATCH_DISTANCE = 0.0075  # of the diagonal: how far matched boundary pixels may lie apart in BSDS500


def overlaps(a: Tensor, b: Tensor) -> Tensor:
    """Common pixels of every region of ``a`` with every region of ``b``, int64 ``(regions of a, regions of b)``.

    Raises:
        ValueError: different shapes, float dtypes, or no pixel.
    """
    if a.shape != b.shape or a.is_floating_point() or b.is_floating_point() or a.numel() == 0:
        raise ValueError(
            "region metrics: expected two integer label maps of one shape with pixels, got "
            f"{a.dtype} {tuple(a.shape)}, {b.dtype} {tuple(b.shape)}"
        )
    (of_a, first), (of_b, second) = _numbered(a), _numbered(b)
    return (of_a * second + of_b).bincount(minlength=first * second).view(first, second)


def _numbered(labels: Tensor) -> tuple[Tensor, int]:
    """Labels of all pixels as numbers from 0 without gaps, in ascending order, and how many there are."""
    flat = labels.flatten().long()
    low = flat.min()
    if int(flat.max() - low) > 2 * flat.numel():
        values, flat = flat.unique(return_inverse=True)
        return flat, len(values)
    flat = flat - low
    number = (flat.bincount() > 0).cumsum(0) - 1  # ten times as fast as sorting
    return number[flat], int(number[-1]) + 1


def rand_index(pred: Tensor, truths: Sequence[Tensor]) -> float:
    """Probabilistic Rand index: share of pixel pairs on which partitions agree, mean over the true ones.

    A pair agrees if both partitions put it together or both apart. 1 for one pixel.
    """

    def one(truth: Tensor) -> float:
        n = overlaps(pred, truth).double()
        N = pred.numel()
        apart = (n.sum(1).square().sum() + n.sum(0).square().sum()) / 2 - n.square().sum()
        return 1 - float(apart) / max(N * (N - 1) / 2, 1)

    return _mean([one(truth) for truth in truths])


def variation_of_information(pred: Tensor, truths: Sequence[Tensor]) -> float:
    """H(pred) + H(truth) - 2 I(pred; truth) in bits, mean over the true partitions; 0 for equal ones."""

    def entropy(p: Tensor) -> float:
        return float(-(p[p > 0] * p[p > 0].log2()).sum())

    def one(truth: Tensor) -> float:
        p = overlaps(pred, truth).double() / pred.numel()
        return 2 * entropy(p.flatten()) - entropy(p.sum(0)) - entropy(p.sum(1))

    return _mean([one(truth) for truth in truths])


def best_overlaps(pred: Tensor, truths: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Of every true region of every annotator the IoU with the region of ``pred`` that fits it best, and its area.

    Returns:
        Two float64 ``(true regions of all annotators,)``.
    """
    best, area = [], []
    for truth in truths:
        n = overlaps(pred, truth).double()
        union = n.sum(1, keepdim=True) + n.sum(0) - n
        best.append((n / union).amax(0))
        area.append(n.sum(0))
    return torch.cat(best), torch.cat(area)


def covering(pred: Tensor, truths: Sequence[Tensor]) -> float:
    """Segmentation covering: best IoU of the true regions of all annotators, mean over their pixels."""
    best, area = best_overlaps(pred, truths)
    return float((best * area).sum() / area.sum())


def achievable_accuracy(pred: Tensor, truth: Tensor) -> float:
    """ASA: share of pixels that are right if every region of ``pred`` gets the true label it has most of."""
    return float(overlaps(pred, truth).amax(1).sum()) / pred.numel()


def undersegmentation_error(pred: Tensor, truth: Tensor) -> float:
    """What leaks over true borders: over all overlaps the smaller one of the part inside and the part outside, over
    all pixels (Neubert and Protzel, 2012)."""
    n = overlaps(pred, truth)
    return float(torch.minimum(n, n.sum(1, keepdim=True) - n).sum()) / pred.numel()


def boundary_recall(pred: Tensor, truth: Tensor, tolerance: int = 2) -> float:
    """Share of true boundary pixels with a boundary pixel of ``pred`` within ``tolerance`` rows and columns.

    A boundary pixel has a right, lower or lower right neighbour across a border; see :func:`boundaries`. NaN where the
    truth has none.
    """
    found = boundaries(pred)[None, None].float()
    near = torch.nn.functional.max_pool2d(found, 2 * tolerance + 1, stride=1, padding=tolerance)[0, 0] > 0
    true = boundaries(truth)
    return float(near[true].double().mean())


def compactness(pred: Tensor) -> float:
    r"""Isoperimetric quotient :math:`4 \pi A / p^2`, mean over pixels (Schick et al., 2012), p in pixel sides.

    A square has :math:`\pi / 4`.
    """
    _, inverse = pred.unique(return_inverse=True)
    graph = region_graph(inverse[None])[0]
    area, perimeter = graph.area.double(), graph.perimeter.double()
    return float((4 * math.pi * area.square() / perimeter.square()).sum() / area.sum())


def boundaries(labels: Tensor) -> Tensor:
    """bool ``(H, W)``: whether the 2 x 2 pixels from a pixel on to the right and down hold two labels.

    At the last row and column those of them that exist: BSDS500's boundaries of a label map, before thinning.
    """
    across, down = labels[:, 1:] != labels[:, :-1], labels[1:] != labels[:-1]
    out = torch.zeros(labels.shape, dtype=torch.bool, device=labels.device)
    out[:, :-1] |= across
    out[:-1, :-1] |= across[1:]
    out[:-1] |= down
    out[:-1, :-1] |= down[:, 1:]
    return out


def thin(mask: Tensor) -> Tensor:
    """Lines of a bool map ``(H, W)`` thinned to one pixel (Guo and Hall 1989), as MATLAB's ``bwmorph(..., "thin")``."""
    mask = mask.clone()
    while True:
        before = mask.clone()
        for last in (False, True):
            p = torch.nn.functional.pad(mask, (1, 1, 1, 1))
            H, W = mask.shape
            # From the right neighbour on against the clock.
            x = [p[1 + y : 1 + y + H, 1 + u : 1 + u + W] for y, u in _CIRCLE]
            crossings = sum((~x[2 * i] & (x[2 * i + 1] | x[(2 * i + 2) % 8])).int() for i in range(4))
            odd = sum((x[2 * i] | x[2 * i + 1]).int() for i in range(4))
            even = sum((x[2 * i + 1] | x[(2 * i + 2) % 8]).int() for i in range(4))
            fewest = torch.minimum(torch.as_tensor(odd), torch.as_tensor(even))
            open_side = (x[5] | x[6] | ~x[3]) & x[4] if last else (x[1] | x[2] | ~x[7]) & x[0]
            mask &= ~((torch.as_tensor(crossings) == 1) & (fewest >= 2) & (fewest <= 3) & ~open_side)
        if torch.equal(mask, before):
            return mask


_CIRCLE = ((0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1), (1, 0), (1, 1))


def match_boundaries(a: Tensor, b: Tensor, distance: float) -> tuple[Tensor, Tensor]:
    """As many pairs as possible of a pixel of ``a`` and one of ``b`` at most ``distance`` apart, each pixel once.

    Args:
        a, b: bool ``(H, W)``.
        distance: Euclidean, in pixels.

    Returns:
        Two bool ``(H, W)``: which pixels of ``a`` and of ``b`` are matched.
    """
    H, W = a.shape
    reach = int(distance)
    offsets = [
        (y, x) for y in range(-reach, reach + 1) for x in range(-reach, reach + 1) if math.hypot(y, x) <= distance
    ]
    offsets.sort(key=lambda o: (math.hypot(*o), o))
    # With a frame of `reach` pixels no step leaves the map.
    width = W + 2 * reach
    steps = np.array([y * width + x for y, x in offsets], dtype=np.int64)
    framed, there = (torch.nn.functional.pad(m.cpu(), (reach,) * 4).flatten().numpy() for m in (a, b))
    matched, partner = (np.full(len(there), -1) for _ in range(2))  # of pixels of a, and of b
    free, alone = there.copy(), framed.nonzero()[0]
    for step in steps:  # the nearest pairs first: few are left for the search below
        hit = free[alone + step]
        p = alone[hit]
        matched[p], partner[p + step], free[p + step] = p + step, p, False
        alone = alone[~hit]
    dead: set[int] = set()
    for p in alone[there[alone[:, None] + steps].any(1)].tolist():
        _augment(p, there, steps, matched, partner, dead)
    out = (torch.from_numpy(m >= 0).view(-1, width)[reach : reach + H, reach : reach + W] for m in (matched, partner))
    first, second = (m.to(a.device) for m in out)
    return first, second


def _augment(
    p: int, there: np.ndarray, steps: np.ndarray, matched: np.ndarray, partner: np.ndarray, dead: set[int]
) -> None:
    """Matches ``p`` too, if that can be done by matching others otherwise (breadth first).

    ``dead`` collects what a search in vain has seen: no later one gets on from there.
    """
    came_from: dict[int, int] = {}
    queue = [p]
    for one in queue:
        reachable = one + steps
        for q in reachable[there[reachable]].tolist():
            if q in came_from or q in dead:
                continue
            came_from[q] = one
            if (other := int(partner[q])) >= 0:
                queue.append(other)
                continue
            while True:  # back along the way, each takes the pixel of the next
                one = came_from[q]
                before = int(matched[one])
                matched[one], partner[q] = q, one
                if before < 0:
                    return
                q = before
    dead.update(came_from)


class BoundaryCounts(NamedTuple):
    """What boundary precision and recall are made of; counts of images add up."""

    matched_true: int
    true: int
    matched_pred: int
    pred: int

    @property
    def f(self) -> float:
        """Harmonic mean of precision and recall; 0 where either is."""
        recall = self.matched_true / self.true if self.true else 0.0
        precision = self.matched_pred / self.pred if self.pred else 0.0
        return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def boundary_counts(pred: Tensor, truths: Sequence[Tensor], distance: float = MATCH_DISTANCE) -> BoundaryCounts:
    """Boundary pixels of a label map matched one to one with those of every annotator.

    Recall counts the matched pixels of all annotators, precision the pixels of ``pred`` that any annotator matches.

    Args:
        pred: label map ``(H, W)``; its boundaries are thinned.
        truths: boundary maps, bool ``(H, W)``, or label maps, whose boundaries are taken and thinned.
        distance: how far apart matched pixels may lie, as a share of the diagonal.
    """
    found = thin(boundaries(pred).cpu())
    reach = distance * math.hypot(*pred.shape)
    any_match = torch.zeros_like(found)
    matched = total = 0
    for truth in truths:
        true = truth.cpu() if truth.dtype == torch.bool else thin(boundaries(truth).cpu())
        of_found, of_true = match_boundaries(found, true, reach)
        any_match |= of_found
        matched += int(of_true.sum())
        total += int(true.sum())
    return BoundaryCounts(matched, total, int(any_match.sum()), int(found.sum()))


class Scores(NamedTuple):
    """A score at the best scale of the data set, and with the best scale of every image."""

    ods: float
    ois: float


def ods_ois(values: Tensor, *, lower: bool = False) -> Scores:
    """ODS and OIS of a score that is averaged over images (Rand index, variation of information).

    Args:
        values: float ``(images, scales)``.
        lower: whether lower is better.
    """
    best = torch.amin if lower else torch.amax
    values = values.double()
    return Scores(float(best(values.mean(0), 0)), float(best(values, 1).mean()))


def covering_ods_ois(pairs: Sequence[Sequence[tuple[Tensor, Tensor]]]) -> tuple[Scores, float]:
    """ODS and OIS of the covering, and the covering by the best scale of every true region.

    Args:
        pairs: for each image and scale what :func:`best_overlaps` gives.
    """
    covered = torch.tensor([[float((best * area).sum()) for best, area in image] for image in pairs])
    total = sum(float(image[0][1].sum()) for image in pairs)
    best = sum(float((torch.stack([b for b, _ in image]).amax(0) * image[0][1]).sum()) for image in pairs)
    return Scores(float(covered.sum(0).max()) / total, float(covered.amax(1).sum()) / total), best / total


def boundary_ods_ois(counts: Sequence[Sequence[BoundaryCounts]]) -> Scores:
    """F at the best scale of the data set, and of the sums of every image's counts at its own best scale.

    Args:
        counts: for each image and scale what :func:`boundary_counts` gives.
    """

    def total(chosen: Sequence[BoundaryCounts]) -> float:
        return BoundaryCounts(*(sum(column) for column in zip(*chosen, strict=True))).f

    scales = list(zip(*counts, strict=True))
    return Scores(max(total(scale) for scale in scales), total([max(image, key=lambda c: c.f) for image in counts]))


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("region metrics: expected at least one true partition, got none")
    return sum(values) / len(values)
