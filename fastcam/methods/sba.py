"""SBA: an image as what its most changeable channels look at, one vector without training or labels.

J. Xu, C. Wang, C. Qi, C. Shi, B. Xiao, "Unsupervised Semantic-Based Aggregation of Deep Convolutional Features", IEEE
TIP 28(2), 2019 (arXiv 1804.01422), the journal version of PWA: J. Xu, C. Shi, C. Qi, C. Wang, B. Xiao, "Unsupervised
Part-Based Weighting Aggregation of Deep Convolutional Features for Image Retrieval", AAAI 2018 (arXiv 1705.01247).
Authors' code: github.com/XJhaoren/PWA (states no licence).

Channels of the last feature map whose sum differs most from image to image detect parts; each, normalised, is a soft
mask (``fastcam.region_pool``); the features under all masks, one after the other, are whitened by PCA. Constants are
those of the authors' program; deviations stand in ``docs/methods/sba.md``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.errors import FastcamError, optional_module
from fastcam.nn import create_backbone
from fastcam.ops.region_pool import region_pool

RANK_TOLERANCE = 1e-12  # of the largest eigenvalue: what lies below is rounding, not a direction of the data
BLOCK = 8192  # descriptors that are compared, or columns that are multiplied, at a time
ROWS = 1024  # queries that are compared at a time


@dataclass(frozen=True)
class Config:
    """The authors' values.

    Attributes:
        backbone: timm name.
        output_stride: of its last features.
        dilate: whether layers behind a removed stride are dilated.
        cut_stages: stages left out at the end. With VGG-16, 0 is its last pooling and 1 is conv5_3.
        aggregation: ``"pwa"``, the method; ``"mean"``, ``"max"`` or ``"gem"`` over all positions, its baselines.
        detectors: N, channels that become masks.
        statistic: what of a channel is compared between images: its ``"sum"`` or its ``"mean"``, which does not depend
            on the images' sizes.
        alpha: norm that a mask is divided by.
        beta: root that is drawn from it then.
        power: of the generalised mean, for ``"gem"``.
    """

    backbone: str = "vgg16"
    output_stride: int = 32
    dilate: bool = False
    cut_stages: int = 0
    aggregation: Literal["pwa", "mean", "max", "gem"] = "pwa"
    detectors: int = 25
    statistic: Literal["sum", "mean"] = "sum"
    alpha: float = 2.0
    beta: float = 2.0
    power: float = 3.0


def unit(x: Tensor) -> Tensor:
    """Vectors ``(..., P)`` divided by their Euclidean length; 0 stays 0."""
    length = x.norm(dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1)


def channel_statistics(x: Tensor, pooling: str = "sum") -> Tensor:
    """Sum or mean over the positions of every channel: ``(B, C, H, W)`` to float64 ``(B, C)``."""
    if x.ndim != 4 or pooling not in ("sum", "mean"):
        raise ValueError(
            "channel_statistics: expected x (B, C, H, W) and pooling 'sum' or 'mean', "
            f"got {tuple(x.shape)} and {pooling!r}"
        )
    return x.flatten(2).sum(dim=2, dtype=torch.float64) / (x[0, 0].numel() if pooling == "mean" else 1)


def select_detectors(statistics: Tensor, n: int = 25) -> tuple[Tensor, Tensor]:
    """The channels that differ most between images (section "detector selection" of both papers).

    Cost: two passes over the statistics, in float64, and a stable sort of C numbers.

    Args:
        statistics: of D images, ``(D, C)``, as :func:`channel_statistics` gives them.
        n: channels to take.

    Returns:
        Their indices int64 ``(n,)``, increasing, which is the order of their blocks in a descriptor; and the variances
        float64 ``(C,)`` of all channels. Of equal variances the first channel is taken.

    Raises:
        ValueError: fewer than two images, whose variance would say nothing, NaN, or n outside [1, C].
    """
    if statistics.ndim != 2 or len(statistics) < 2 or not 1 <= n <= statistics.shape[1]:
        raise ValueError(
            "select_detectors: expected statistics (D, C) of two or more images and 1 <= n <= C, "
            f"got {tuple(statistics.shape)} and n = {n}"
        )
    if not bool(statistics.isfinite().all()):
        raise ValueError("select_detectors: expected finite statistics, got NaN or infinity")
    variances = statistics.double().var(dim=0, correction=0)
    order = variances.argsort(descending=True, stable=True)
    return order[:n].sort().values, variances


def soft_proposals(
    x: Tensor, indices: Tensor, alpha: float = 2.0, beta: float = 2.0, eps: float = 0.0, clamp: bool = False
) -> Tensor:
    r"""Masks from chosen channels (PWA's "probabilistic proposals", SBA's "soft region proposals").

    .. math:: w_n(p) = \left( \frac{X_n(p)}{(\sum_q X_n(q)^\alpha)^{1 / \alpha}} \right)^{1 / \beta}

    A channel is divided by its maximum first, so that no scale of the features under- or overflows.

    Args:
        x: features ``(B, C, H, W)``, not negative. Positions that are 0 in all channels, such as padding, get no
            weight.
        indices: channels, int64 ``(N,)``.
        alpha: larger than 0.
        beta: larger than 0.
        eps: for masks that learn: added to the norm, and to the ratio, whose root has no finite gradient at 0. A 0 then
            weighs ``eps ** (1 / beta)``.
        clamp: whether negative features count as 0.

    Returns:
        ``(B, N, H, W)``, float32 or float64. A channel that is 0 everywhere gives 0; NaN gives NaN.

    Raises:
        ValueError: negative features, no exponent above 0, or shapes that do not fit.
    """
    if x.ndim != 4 or indices.ndim != 1 or not (alpha > 0 and beta > 0 and eps >= 0):
        raise ValueError(
            "soft_proposals: expected x (B, C, H, W), indices (N,), alpha and beta > 0 and eps >= 0, "
            f"got {tuple(x.shape)}, {tuple(indices.shape)}, {alpha}, {beta}, {eps}"
        )
    planes = x[:, indices].to(torch.promote_types(x.dtype, torch.float32))
    if clamp:
        planes = planes.clamp(min=0)
    elif bool((planes < 0).any()):
        raise ValueError("soft_proposals: expected features of 0 or more, got negative ones; use clamp or a ReLU")
    flat = planes.flatten(2)
    peak = flat.detach().amax(dim=2, keepdim=True) if flat.shape[2] else flat.new_zeros(*flat.shape[:2], 1)
    peak = torch.where(peak == 0, 1, peak)
    total = (flat / peak).pow(alpha).sum(dim=2, keepdim=True)
    norm = peak * torch.where(total == 0, 1, total).pow(1 / alpha)
    return (flat / (norm + eps) + eps).pow(1 / beta).view_as(planes)


def aggregate_masks(x: Tensor, masks: Tensor) -> Tensor:
    r"""Features summed under soft masks, one mask after the other: :math:`\Psi_n = \sum_p w_n(p) X(p)`.

    Masks may be channels (:func:`soft_proposals`), class activation maps, attention, labels.

    Args:
        x: features ``(B, C, H, W)``.
        masks: ``(B, N, H, W)``.

    Returns:
        ``(B, N C)``, float32 or float64, not normalised; differentiable in both.
    """
    work = torch.promote_types(x.dtype, torch.float32)  # sums over the positions of an image overflow float16
    return region_pool(x.to(work), masks.to(work), normalize=None).flatten(1)


def aggregate_pwa(x: Tensor, indices: Tensor, alpha: float = 2.0, beta: float = 2.0, normalize: bool = True) -> Tensor:
    """The descriptor of PWA and SBA in front of whitening: ``(B, C, H, W)`` to ``(B, N C)``.

    Cost: one read of ``x``, 2 B N C H W operations. Maps of several sizes may be padded with 0 to one.

    Args:
        x: features, not negative.
        indices: the detectors, as :func:`select_detectors` gives them.
        alpha: of :func:`soft_proposals`.
        beta: of the same.
        normalize: to length 1; 0 stays 0.
    """
    vectors = aggregate_masks(x, soft_proposals(x, indices, alpha, beta))
    return unit(vectors) if normalize else vectors


def pool_baseline(x: Tensor, kind: str, power: float = 3.0) -> Tensor:
    """Mean, maximum or generalised mean (GeM) of every channel ``(B, C)``, not normalised.

    GeM: F. Radenovic, G. Tolias, O. Chum, "Fine-tuning CNN image retrieval with no human annotation", PAMI 2019.
    """
    flat = x.to(torch.promote_types(x.dtype, torch.float32)).flatten(2)
    if kind == "mean":
        return flat.mean(dim=2)
    if kind == "max":
        return flat.amax(dim=2)
    if kind != "gem":
        raise ValueError(f"pool_baseline: expected 'mean', 'max' or 'gem', got {kind!r}")
    return flat.clamp(min=0).pow(power).mean(dim=2).pow(1 / power)


@dataclass(frozen=True, eq=False)
class Whitening:
    """Principal directions of descriptors, each brought to variance 1.

    Attributes:
        mean: ``(P,)``.
        components: orthonormal rows ``(D, P)``, the direction of largest variance first.
        eigenvalues: variances along them, divisor n - 1, ``(D,)``.
    """

    mean: Tensor
    components: Tensor
    eigenvalues: Tensor

    def transform(self, vectors: Tensor, normalize: bool = True) -> Tensor:
        """Descriptors ``(n, P)`` to ``(n, D)``: length 1, minus the mean, along the directions, length 1 again.

        Args:
            vectors: of any length.
            normalize: the last step.

        Raises:
            ValueError: another P.
        """
        if vectors.ndim != 2 or vectors.shape[1] != len(self.mean):
            raise ValueError(f"Whitening: expected vectors (n, {len(self.mean)}), got {tuple(vectors.shape)}")
        vectors = vectors.to(self.components.dtype)
        whitened = (unit(vectors) - self.mean) @ self.components.T / self.eigenvalues.sqrt()
        return unit(whitened) if normalize else whitened


def fit_whitening(vectors: Tensor, dim: int) -> Whitening:
    """Learns the whitening of descriptors, best those of another data set.

    A full decomposition in float64, of the covariance (P x P) or, for fewer descriptors than numbers in each, of their
    products (n x n). Fitted on the very images that are searched, D close to their number makes all of them equally
    far from each other.

    Cost: 2 n P min(n, P) operations and those of the eigenvalues of a matrix of side min(n, P).

    Args:
        vectors: ``(n, P)``, brought to length 1 first.
        dim: D.

    Returns:
        In float32, or float64 for such vectors.

    Raises:
        ValueError: NaN, or more dimensions than the descriptors have (at most n - 1, less where they depend on each
            other).
    """
    if vectors.ndim != 2 or dim < 1 or dim > min(len(vectors) - 1, vectors.shape[1]):
        raise ValueError(
            "fit_whitening: expected vectors (n, P) and 1 <= dim <= min(n - 1, P), "
            f"got {tuple(vectors.shape)} and dim = {dim}"
        )
    if not bool(vectors.isfinite().all()):
        raise ValueError("fit_whitening: expected finite vectors, got NaN or infinity")
    n, width = vectors.shape
    x = unit(vectors)
    mean = x.mean(dim=0, dtype=torch.float64)

    def centred(columns: slice) -> Tensor:
        return x[:, columns].double() - mean[columns]

    blocks = [slice(start, min(start + BLOCK, width)) for start in range(0, width, BLOCK)]
    gram = width > n
    if gram:
        matrix = torch.zeros(n, n, dtype=torch.float64, device=x.device)
        for columns in blocks:
            part = centred(columns)
            matrix.addmm_(part, part.T)
    else:
        part = centred(slice(None))
        matrix = part.T @ part
    values, rows = torch.linalg.eigh(matrix)  # increasing
    values, rows = values.flip(0), rows.flip(1).T
    rank = int((values > RANK_TOLERANCE * values[0].clamp(min=0)).sum())
    if dim > rank:
        raise ValueError(f"fit_whitening: expected dim of at most {rank}, the rank of the vectors, got {dim}")
    rows, values = rows[:dim], values[:dim]
    if gram:
        rows = torch.cat([rows @ centred(columns) for columns in blocks], dim=1) / values.sqrt()[:, None]
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    return Whitening(mean.to(dtype), rows.to(dtype), (values / (n - 1)).to(dtype))


def rank(queries: Tensor, database: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
    """The nearest descriptors by squared Euclidean distance, exactly.

    For unit vectors this is the order of the dot products. The matrix of all distances is never stored: ``ROWS``
    queries are compared with ``BLOCK`` descriptors at a time.

    Cost: 2 Q N P operations.

    Args:
        queries: ``(Q, P)``.
        database: ``(N, P)``, N at least 1.
        k: neighbours of each; ``None``, or more than there are: all.

    Returns:
        Squared distances ``(Q, k)``, increasing, and indices int64 ``(Q, k)``; of equal distances the first index comes
        first.

    Raises:
        ValueError: shapes that do not fit, an empty database, NaN, k below 1.
    """
    _check_search("rank", queries, database, k)
    k = min(k or len(database), len(database))
    found = [_rank_rows(rows, database, k) for rows in queries.split(ROWS)]
    distances, indices = zip(*found, strict=True)
    return torch.cat(distances), torch.cat(indices)


def _rank_rows(queries: Tensor, database: Tensor, k: int) -> tuple[Tensor, Tensor]:
    best = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    length = queries.square().sum(dim=1, keepdim=True)
    for start in range(0, len(database), BLOCK):
        part = database[start : start + BLOCK]
        distance = (length + part.square().sum(dim=1) - 2 * (queries @ part.T)).clamp(min=0)
        number = torch.arange(start, start + len(part), device=index.device).expand(len(queries), -1)
        best, order = torch.cat([best, distance], dim=1).sort(dim=1, stable=True)
        best, index = best[:, :k], torch.cat([index, number], dim=1).gather(1, order[:, :k])
    return best, index


def faiss_index(database: Tensor, kind: str = "Flat") -> Any:
    """An index of faiss over descriptors, for sets that an exact search takes too long for.

    Args:
        database: ``(N, P)``, which the index is also trained on.
        kind: as ``faiss.index_factory`` takes it: ``"Flat"`` (exact), ``"HNSW32"``, ``"IVF1024,PQ64"``.

    Raises:
        FastcamError: faiss is not installed, or refuses the index.
        ValueError: an empty database, or NaN.
    """
    _check_search("faiss_index", database, database, None)
    faiss: Any = optional_module("faiss", f"index {kind!r}", "retrieval")
    vectors = database.float().cpu().contiguous().numpy()
    try:
        index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_L2)
        index.train(vectors)
        index.add(vectors)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise FastcamError(f"index {kind!r}: faiss refuses it for vectors {vectors.shape}: {reason}") from None
    return index


def rank_faiss(queries: Tensor, index: Any, k: int) -> tuple[Tensor, Tensor]:
    """As :func:`rank`, by an index that :func:`faiss_index` made, on the CPU.

    Where the index found fewer than k, the distance is infinite and the number -1.
    """
    distance, found = index.search(queries.float().cpu().contiguous().numpy(), min(k, index.ntotal))
    best, indices = torch.from_numpy(distance), torch.from_numpy(found)
    return best.masked_fill(indices < 0, torch.inf), indices


def expand_query(queries: Tensor, database: Tensor, neighbours: Tensor, k: int = 10) -> Tensor:
    """Average query expansion, one round: the query plus its first ``k`` images, at length 1.

    Args:
        queries: ``(Q, P)``.
        database: ``(N, P)``.
        neighbours: indices ``(Q, m)`` from :func:`rank`, m at least k; -1 counts for nothing.
        k: 0 leaves the queries as they are.

    Returns:
        New queries ``(Q, P)``.
    """
    if k == 0:
        return queries
    if not 0 < k <= neighbours.shape[1]:
        raise ValueError(f"expand_query: expected k from 0 to the {neighbours.shape[1]} neighbours, got {k}")
    near = neighbours[:, :k]
    return unit(queries + (database[near.clamp(min=0)] * (near >= 0)[..., None]).sum(dim=1))


def _check_search(name: str, queries: Tensor, database: Tensor, k: int | None) -> None:
    if queries.ndim != 2 or database.ndim != 2 or queries.shape[1] != database.shape[1] or len(database) == 0:
        raise ValueError(
            f"{name}: expected queries (Q, P) and a database (N, P) of at least one vector, "
            f"got {tuple(queries.shape)} and {tuple(database.shape)}"
        )
    if k is not None and k < 1:
        raise ValueError(f"{name}: expected k >= 1, got {k}")
    if not bool(queries.isfinite().all() and database.isfinite().all()):
        raise ValueError(f"{name}: expected finite vectors, got NaN or infinity")


class SBA(nn.Module):
    """A network and the channels of it that detect parts. Nothing is trained.

    Args:
        num_classes: taken as every method takes it; there are no classes here.
        config: its values.
        weights: local file with the backbone's pre-trained weights.

    Raises:
        FastcamError: values that do not fit together, or what :func:`fastcam.nn.create_backbone` refuses.
    """

    name = "sba"
    kind = "retrieval"

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        _check(config)
        self.num_classes = num_classes
        self.config = config
        self.backbone = create_backbone(
            config.backbone,
            output_stride=config.output_stride,
            dilate=config.dilate,
            weights=weights,
            head=True,
            cut_stages=config.cut_stages,
        ).requires_grad_(False)
        self.normalize = self.backbone.normalize
        channels = self.backbone.channels[-1]
        if config.aggregation == "pwa" and config.detectors > channels:
            raise FastcamError(
                f"sba: detectors is {config.detectors}, but {config.backbone} has {channels} channels; take fewer"
            )
        self.detectors: Tensor  # -1 until they are chosen
        self.register_buffer("detectors", torch.full((config.detectors,), -1))
        self.eval()

    @property
    def width(self) -> int:
        """Length P of a descriptor."""
        channels = self.backbone.channels[-1]
        return channels * self.config.detectors if self.config.aggregation == "pwa" else channels

    def features(self, images: Tensor) -> Tensor:
        """The last feature map of normalised images ``(B, 3, H, W)``, negative values 0: ``(B, C, h, w)``."""
        return F.relu(self.backbone(images)[-1])

    def statistics(self, views: Tensor | Sequence[Tensor]) -> Tensor:
        """Channel statistics float64 ``(B, C)`` of images; those of several scales are summed."""
        scales = [views] if isinstance(views, Tensor) else views
        return torch.stack([channel_statistics(self.features(v), self.config.statistic) for v in scales]).sum(dim=0)

    def set_detectors(self, indices: Tensor) -> None:
        """Takes the channels that :func:`select_detectors` gave.

        Raises:
            FastcamError: another number than the configuration's, or no channels of this network.
        """
        channels = self.backbone.channels[-1]
        wanted, came = self.config.detectors, indices.tolist()
        if len(came) != wanted or sorted(set(came)) != came or came[0] < 0 or came[-1] >= channels:
            raise FastcamError(
                f"sba: detectors are {came}, expected {wanted} increasing channels from 0 to {channels - 1}; "
                "choose them again with these settings"
            )
        self.detectors.copy_(indices)

    def describe(self, views: Tensor | Sequence[Tensor]) -> Tensor:
        """Descriptors in front of whitening, of length 1.

        Args:
            views: normalised images ``(B, 3, H, W)``, or a list of them, one a scale, whose descriptors are summed
                before they are brought to length 1 (several scales are no part of the paper).

        Returns:
            ``(B, width)``. An image without any response gives 0.

        Raises:
            FastcamError: no detectors have been set.
        """
        if self.config.aggregation == "pwa" and int(self.detectors[0]) < 0:
            raise FastcamError("sba: no detectors are chosen; call set_detectors first, or let `fastcam retrieve` run")
        scales = [views] if isinstance(views, Tensor) else views
        return unit(torch.stack([self._aggregate(self.features(view)) for view in scales]).sum(dim=0))

    def _aggregate(self, x: Tensor) -> Tensor:
        config = self.config
        if config.aggregation == "pwa":
            return aggregate_pwa(x, self.detectors, config.alpha, config.beta, normalize=False)
        return pool_baseline(x, config.aggregation, config.power)

    def export_state_dict(self) -> dict[str, Tensor]:
        """What inference needs: all of the state."""
        return self.state_dict()


def _check(config: Config) -> None:
    if config.aggregation not in ("pwa", "mean", "max", "gem"):
        raise FastcamError(f"sba: aggregation is '{config.aggregation}', expected pwa, mean, max or gem")
    if config.statistic not in ("sum", "mean"):
        raise FastcamError(f"sba: statistic is '{config.statistic}', expected sum or mean")
    if config.detectors < 1:
        raise FastcamError(f"sba: detectors is {config.detectors}, expected at least 1")
    for name in ("alpha", "beta", "power"):
        if not getattr(config, name) > 0:
            raise FastcamError(f"sba: {name} is {getattr(config, name)}, expected a number above 0")
