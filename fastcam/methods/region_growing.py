"""Region growing: superpixels of an image merged into a tree, the most similar neighbours first. Nothing is trained.

After M. S. Chaibou, P.-H. Conze, K. Kalti, B. Solaiman, M. A. Mahjoub, "Adaptive strategy for superpixel-based
region-growing image segmentation", Journal of Electronic Imaging 26(6), 061605, 2017 (arXiv 1803.06541). No code of the
authors is public.

Regions are compared at two scales: as wholes, and along their common border by the superpixels that meet there. They
merge in rounds under a threshold that falls where too few pairs pass it and rises after a merge, so that the best pairs
always come first.

Inspired by the paper, not a replication: the rounds follow its abstract and a derived public program; the descriptors
and constants are our own. Without training it is no module of :func:`fastcam.create_method` but a function.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fastcam.errors import FastcamError
from fastcam.nn.regions import gradient_contour
from fastcam.nn.waterpixels import waterpixels
from fastcam.ops.region_merge import MergeTree, region_merge
from fastcam.ops.region_reduce import region_reduce
from fastcam.ops.superpixel_slic import superpixel_slic

IGNORE = 255
MOST_SUPERPIXELS = 16000  # no piece is smaller than a quarter of the average: all numbers fit into 16 bits


@dataclass(frozen=True)
class Config:
    """How an image is cut into superpixels, and how these grow together.

    Args:
        superpixels: how many to start from, about.
        producer: slic (k-means), or waterpixels (watershed, a third of a second an image).
        compactness: of slic; larger is rounder, smaller is closer to the edges.
        regularity: of waterpixels; larger is rounder, 0 follows the gradient alone.
        contour: of slic: what crossing a full step of lightness costs, in units of CIE Lab; 0 asks colours alone.
        similarity: content_border (whole regions, and what meets along their border), content, or mean_color.
        criterion: adaptive (rounds under a threshold that falls and rises), or best_first (one pair at a time).
        stop: threshold or similarity at which merging ends. 0 goes as far as it can, and the tree can be cut anywhere.
        start: the first threshold, and the largest.
        factor: by which the threshold falls at first.
        min_fraction: a round with fewer pairs than this fraction of the regions merges none, and the threshold falls.
        penalty: factor on the similarity of a pair where one of the two prefers another.
        texture: compare local binary patterns too.
    """

    superpixels: int = 400
    producer: Literal["slic", "waterpixels"] = "slic"
    compactness: float = 10.0
    regularity: float = 8.0
    contour: float = 0.0
    similarity: Literal["content_border", "content", "mean_color"] = "content_border"
    criterion: Literal["adaptive", "best_first"] = "adaptive"
    stop: float = 0.0
    start: float = 2.0
    factor: float = 1.05
    min_fraction: float = 0.01
    penalty: float = 0.9
    texture: bool = False

    def check(self) -> None:
        """Raises FastcamError where a value is out of range."""
        inf = float("inf")
        for name, fits, expected in (
            ("superpixels", 1 <= self.superpixels <= MOST_SUPERPIXELS, f"a number from 1 to {MOST_SUPERPIXELS}"),
            ("compactness", 0 < self.compactness < inf, "a number above 0"),
            ("regularity", 0 <= self.regularity < inf, "a number of 0 or more"),
            ("contour", 0 <= self.contour < inf, "a number of 0 or more"),
            ("stop", 0 <= self.stop < inf, "a number of 0 or more"),
            ("start", 0 < self.start < inf, "a number above 0"),
            ("factor", 1 < self.factor < inf, "a number above 1"),
            ("min_fraction", 0 <= self.min_fraction <= 1, "a fraction from 0 to 1"),
            ("penalty", 0 < self.penalty <= 1, "a number above 0 and at most 1"),
        ):
            if not fits:
                raise FastcamError(f"growing.{name} is {getattr(self, name)}, expected {expected}")


def superpixels(images: Tensor, config: Config = Config()) -> Tensor:
    """What regions grow from: int32 :math:`(B, H, W)`, by the producer that the configuration names.

    Args:
        images: RGB :math:`(B, 3, H, W)` in 0..255, uint8 or floating.
        config: how.

    Raises:
        ValueError, TypeError: images as the producer refuses them.
    """
    if config.producer == "waterpixels":
        return waterpixels(images, config.superpixels, regularity=config.regularity)
    contour = gradient_contour(images) if config.contour else None
    return superpixel_slic(
        images, config.superpixels, compactness=config.compactness, contour=contour, contour_weight=config.contour
    )


def grow_regions(images: Tensor, config: Config = Config()) -> list[MergeTree]:
    """The tree of regions of every image: :func:`superpixels`, then :func:`fastcam.region_merge`.

    Cost: about 10 ms for 500 x 375 pixels on one CPU core.

    Args:
        images: RGB :math:`(B, 3, H, W)` in 0..255, uint8 or floating.
        config: how.

    Returns:
        One :class:`~fastcam.ops.region_merge.MergeTree` an image, the same as if it came alone.

    Raises:
        FastcamError: a setting out of range.
        ValueError, TypeError: images as :func:`superpixels` refuses them.

    Example:
        >>> image = torch.zeros(1, 3, 8, 16)
        >>> image[..., 8:] = 255
        >>> tree = grow_regions(image, Config(superpixels=8))[0]
        >>> tree.cut(count=2)[0].tolist()
        [0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    """
    config.check()
    labels = superpixels(images, config)
    return region_merge(
        labels,
        images,
        weight=config.similarity,
        criterion=config.criterion,
        stop=config.stop,
        start=config.start,
        factor=config.factor,
        min_fraction=config.min_fraction,
        penalty=config.penalty,
        texture=config.texture,
    )


def region_scores(scores: Tensor, cuts: Sequence[Tensor]) -> Tensor:
    r"""Scores of the pixels averaged over the region they lie in, and over several cuts of a tree.

    .. math:: \bar s_k(x) = \frac{1}{|T|} \sum_{t \in T} \frac{1}{|R_t(x)|} \sum_{y \in R_t(x)} s_k(y)

    With one cut it is idempotent, and scores that are constant on the regions stay as they are. The scores of a pixel
    keep their sum.

    Args:
        scores: of K labels, floating :math:`(K, H, W)`: CAMs behind a background, or a network's probabilities.
        cuts: T regions, integers :math:`(H, W)`, as :meth:`MergeTree.cut` gives them.

    Returns:
        :math:`(K, H, W)` in the dtype of the scores.

    Raises:
        ValueError: no cut, or shapes that do not fit.
    """
    if not cuts or scores.ndim != 3 or any(cut.shape != scores.shape[1:] for cut in cuts):
        shapes = [tuple(cut.shape) for cut in cuts]
        raise ValueError(
            f"region_scores: expected scores (K, H, W) and cuts (H, W), got {tuple(scores.shape)} and {shapes}"
        )
    means = [region_reduce(scores[None], cut[None])[0].T[:, cut.long()] for cut in cuts]
    return means[0] if len(means) == 1 else torch.stack(means).mean(0)


def best_labels(scores: Tensor, margin: float = 0.0) -> Tensor:
    """The label with the best score at every pixel, 255 where the second best is nearer than ``margin``.

    Args:
        scores: :math:`(K, H, W)`, K at least 1. Of equal scores the first label wins.
        margin: 0 decides everywhere.

    Returns:
        int64 :math:`(H, W)`.

    Example:
        >>> best_labels(torch.tensor([[[0.6, 0.5]], [[0.4, 0.45]]]), margin=0.1)
        tensor([[  0, 255]])
    """
    if len(scores) == 1:
        return torch.zeros(scores.shape[1:], dtype=torch.int64, device=scores.device)
    best = scores.topk(2, dim=0).values
    return scores.argmax(0).masked_fill(best[0] - best[1] < margin, IGNORE)


def vote_labels(labels: Tensor, cuts: Sequence[Tensor], margin: float = 0.0) -> Tensor:
    """Label maps, of a network for example, decided anew by the vote of every region.

    Args:
        labels: integers :math:`(H, W)` from 0 to 255; 255 does not vote.
        cuts: as for :func:`region_scores`: the shares of the votes are averaged over them.
        margin: in shares of a region, by which the winner has to lead.

    Returns:
        uint8 :math:`(H, W)`: 255 where nobody votes, or nobody leads by ``margin``. Ties go to the lower label.
    """
    names = labels[labels != IGNORE].unique()
    if len(names) == 0:
        return labels.to(torch.uint8)
    shares = region_scores((labels == names[:, None, None]).float(), cuts)
    won = best_labels(shares, margin)
    voted = names[won.clamp(max=len(names) - 1)].masked_fill(won == IGNORE, IGNORE)
    return voted.masked_fill(shares.sum(0) == 0, IGNORE).to(torch.uint8)
