"""DSMF-Net: few-shot segmentation of aerial images by graph prototypes and a prior, fused in a pyramid.

X. Qi, Y. Zhang, L. Wang, Y. Wu, Y. Xin, Z. Chen, Y. Ge, "DSMF-Net: Dual Semantic Metric Learning Fusion Network for
Few-Shot Aerial Image Segmentation", IEEE JSTARS 18, 2025 (IEEE document 10746596). No authors' code is public. The
network builds on PFENet (Z. Tian et al., TPAMI 2020; github.com/dvlab-research/PFENet, MIT) and on GloRe (Y. Chen et
al., CVPR 2019; github.com/facebookresearch/GloRe).

A frozen trunk sees a query and K images in which the class is marked. How much a place of the query looks like the
class is told by maps: cosines with the class's mean features behind a graph unit, at several stages (graph prototype
metric learning); and the best cosine with any marked place, in the last stage, which nothing has to learn (prior).
A pyramid joins the maps with the query's features and the class's prototype.

Which values are the article's, which those of the code it builds on and which our choice: docs/methods/dsmf_net.md.
With ``maps="none", merge=False`` the network is PFENet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import tv_tensors
from torchvision.transforms import v2

from fastcam.data.few_shot import (
    PROTOCOLS,
    ClassSplit,
    MaskEpisodes,
    check_members,
    class_areas,
    members,
    split_classes,
)
from fastcam.data.transforms import RandomCrop, RandomResizeLong
from fastcam.errors import FastcamError
from fastcam.nn import create_backbone
from fastcam.nn.backbone import Backbone
from fastcam.nn.losses import cross_entropy, resize
from fastcam.ops.pairwise_max import pairwise_max

POOL_EPS = 5e-4  # of PFENet's pooling
EPS = 1e-7  # of its cosines and of the normalisation of its maps
CROP_TRIES, CROP_LOSS = 30, 0.15  # DMNet: a crop must keep 85 % of the object, or another is drawn


@dataclass(frozen=True)
class Config:
    """The article's values where it states them, those of PFENet, GloRe and DMNet elsewhere; see the docs page.

    Attributes:
        backbone: timm name, frozen whole. ``resnet50s`` is PFENet's ResNet-50 with a stem of three convolutions.
        output_stride: of its last two stages.
        final_features: the last stage ends behind the trunk's final 1 x 1 convolution, where it has one (MobileNetV2);
            its features are then not negative, as a ResNet's.
        stages: whose features the graph prototypes are made of, of 1 to 4.
        channels: of the reduced features, everywhere.
        graph_nodes: nodes of the graph unit; its states are twice as many.
        maps: ``"graph"`` prototypes, plain ``"convolution"`` prototypes without the graph unit, or ``"none"``.
        prior: whether the prior is among the maps.
        scales: sizes of the pyramid's levels as shares of the features' size, falling.
        merge: join neighbouring levels at sizes between them (semantic feature fusion); else PFENet's pyramid.
        aux_hidden: heads of the intermediate losses have a 3 x 3 convolution; else they are linear.
        feature_dropout: of whole channels of the reduced features.
        head_dropout: of whole channels before the last layers.
        aux_weight: of the mean of the intermediate losses.
        shots: K in training.
        protocol: ``isaid_5i_sdm``, ``isaid_5i_dmnet``, ``dlrsd_pcfnet``, ``dlrsd_sccnet``, ``pascal_5i``, or ``own``.
        fold: of the protocol, from 0.
        base: names of the classes that are learned from, instead of the protocol's.
        novel: names of the classes that are kept for the test, instead of the protocol's.
        novel_images: training images with novel classes are ``"background"`` there or ``"removed"``; ``None``: as the
            protocol says.
        min_pixels: pixels of a class below which an image does not stand for it; ``None``: as the protocol says.
        lr: falls as ``(1 - step / steps) ** poly_power``.
        grad_clip: largest norm of the gradient, or ``None``.
    """

    backbone: str = "resnet50s"
    output_stride: int = 8
    final_features: bool = True
    stages: tuple[int, ...] = (1, 2, 3)
    channels: int = 256
    graph_nodes: int = 64
    maps: Literal["graph", "convolution", "none"] = "graph"
    prior: bool = True
    scales: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125)
    merge: bool = True
    aux_hidden: bool = True
    feature_dropout: float = 0.5
    head_dropout: float = 0.1
    aux_weight: float = 1.0
    shots: int = 1
    protocol: str = "isaid_5i_dmnet"
    fold: int = 0
    base: tuple[str, ...] = ()
    novel: tuple[str, ...] = ()
    novel_images: Literal["background", "removed"] | None = None
    min_pixels: int | None = None
    lr: float = 0.005
    momentum: float = 0.9
    weight_decay: float = 1e-4
    poly_power: float = 0.9
    grad_clip: float | None = None


def masked_average_pool(features: Tensor, mask: Tensor) -> Tensor:
    """Mean feature of the marked places (PFENet's ``Weighted_GAP``): ``sum(f m) / (sum(m) + 0.0005)``.

    Args:
        features: ``(B, D, h, w)``.
        mask: weight of every place ``(B, 1, h, w)``, not negative; fractions at an object's border count as such.

    Returns:
        ``(B, D, 1, 1)``; 0 where nothing is marked.
    """
    return (features * mask).sum((2, 3), keepdim=True) / (mask.sum((2, 3), keepdim=True) + POOL_EPS)


def cosine_map(features: Tensor, prototype: Tensor) -> Tensor:
    """Cosine of every place with a prototype: ``f g / (|f| |g| + 1e-7)``.

    Args:
        features: ``(B, D, h, w)``.
        prototype: ``(B, D, 1, 1)``.

    Returns:
        ``(B, 1, h, w)``, float32 also of 16-bit features; 0, with no gradient, where a feature or the prototype is 0.
    """
    dtype = torch.promote_types(features.dtype, torch.float32)
    features, prototype = features.to(dtype), prototype.to(dtype)
    norm = features.norm(dim=1, keepdim=True) * prototype.norm(dim=1, keepdim=True)
    # Beside a zero the slope would be 1 / EPS; the product without a gradient takes it away.
    dot = (features * prototype).sum(1, keepdim=True).masked_fill(norm == 0, 0.0)
    return dot / (norm + EPS)


def minmax_map(values: Tensor, eps: float = EPS) -> Tensor:
    """Every map brought to [0, 1]: ``(v - min) / (max - min + eps)``; a constant one becomes 0.

    Args:
        values: ``(B, K, h, w)``, each of the B x K maps on its own.
    """
    low, high = values.amin((2, 3), keepdim=True), values.amax((2, 3), keepdim=True)
    return (values - low) / (high - low + eps)


def cosine_max_prior(query: Tensor, support: Tensor, mask: Tensor) -> Tensor:
    """PFENet's prior: the best cosine of every place of the query with any marked place of the support, in [0, 1].

    Args:
        query: ``(B, D, h, w)``.
        support: ``(B, D, y, x)``.
        mask: ``(B, 1, y, x)``; places above 0 take part, with their features times the mask.

    Returns:
        float32 ``(B, 1, h, w)``; 0 where nothing is marked.
    """
    marked = (support * mask).float().flatten(2)
    best, _ = pairwise_max(query.float().flatten(2), marked, mask=mask.flatten(1) > 0, eps=EPS)
    return minmax_map(best.view(len(query), 1, *query.shape[2:]))


def support_weights(masks: Tensor, size: Sequence[int]) -> Tensor:
    """Weights ``(N, 1, h, w)`` of a feature map's places, of masks ``(N, H, W)`` in which 1 is the class.

    Bilinear, with corners on corners; everything but 1 (255 too) is not the class.
    """
    return resize((masks == 1).float()[:, None], tuple(size), align_corners=True)


class GraphConvolution(nn.Module):
    """A graph whose edges are learned: ``W_s ReLU(V + A V)``, A acts on the nodes, W_s on the states."""

    def __init__(self, states: int, nodes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(nodes, nodes, 1)
        self.conv2 = nn.Conv1d(states, states, 1, bias=False)

    def forward(self, v: Tensor) -> Tensor:
        """``(B, states, nodes)`` -> the same."""
        return self.conv2(F.relu(v + self.conv1(v.mT).mT))


class GloReUnit(nn.Module):
    """Global reasoning: places are projected onto the nodes of a graph, and what it finds is added to them.

    The last normalisation begins at zero, so that an untrained unit gives back what it got. Names of layers are those
    of the authors' ``GloRe_Unit_2D``.

    Args:
        channels: of the features.
        nodes: N; states are 2 N.
        normalize: divide node features by the number of places, so that they do not grow with the image.
    """

    def __init__(self, channels: int, nodes: int, normalize: bool = True) -> None:
        super().__init__()
        self.normalize = normalize
        self.conv_state = nn.Conv2d(channels, 2 * nodes, 1)
        self.conv_proj = nn.Conv2d(channels, nodes, 1)
        self.gcn = GraphConvolution(2 * nodes, nodes)
        self.conv_extend = nn.Conv2d(2 * nodes, channels, 1, bias=False)
        self.blocker = nn.BatchNorm2d(channels, eps=1e-4)
        nn.init.zeros_(self.blocker.weight)

    def nodes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Node features ``(B, 2 N, N)`` of ``(B, channels, h, w)``, and the projection ``(B, N, h w)``."""
        projection = self.conv_proj(x).flatten(2)
        v = self.conv_state(x).flatten(2) @ projection.mT
        return (v / projection.shape[2] if self.normalize else v), projection

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, h, w)`` -> the same."""
        v, projection = self.nodes(x)
        y = self.gcn(v) @ projection
        return x + self.blocker(self.conv_extend(y.unflatten(2, x.shape[2:])))


def pyramid_sizes(size: Sequence[int], scales: Sequence[float]) -> list[tuple[int, int]]:
    """Sizes of the levels: shares of ``(h, w)``, rounded, at least 1."""
    h, w = size
    return [(max(1, round(h * scale)), max(1, round(w * scale))) for scale in scales]


def between(sizes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sizes between neighbouring levels, halves rounded up: ``(a + b + 1) // 2``."""
    return [((a[0] + b[0] + 1) // 2, (a[1] + b[1] + 1) // 2) for a, b in pairwise(sizes)]


def _conv(channels: int, out: int, kernel: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False), nn.ReLU(inplace=True)]


def _classifier(channels: int, hidden: bool, dropout: float) -> nn.Sequential:
    layers = [*_conv(channels, channels, 3), nn.Dropout2d(dropout)] if hidden else []
    return nn.Sequential(*layers, nn.Conv2d(channels, 2, 1))


class PyramidHead(nn.Module):
    """Features, prototype and maps joined at several scales, and brought together (semantic feature fusion).

    Without ``merge`` it is PFENet's feature enrichment module, whose names its layers have.

    Args:
        channels: of the query's features and of the prototype.
        maps: number of maps.
        scales: see :class:`Config`.
        merge: see :class:`Config`.
        aux_hidden: see :class:`Config`.
        dropout: before the last layers.
    """

    def __init__(
        self, channels: int, maps: int, scales: Sequence[float], merge: bool, aux_hidden: bool, dropout: float
    ) -> None:
        super().__init__()
        C, levels = channels, len(scales)
        outputs = levels - 1 if merge else levels
        self.scales = tuple(scales)
        self.init_merge = nn.ModuleList(nn.Sequential(*_conv(2 * C + maps, C)) for _ in range(levels))
        self.merges = nn.ModuleList(nn.Sequential(*_conv(2 * C, C)) for _ in range(outputs)) if merge else None
        self.alpha_conv = nn.ModuleList(nn.Sequential(*_conv(2 * C, C)) for _ in range(outputs - 1))
        self.beta_conv = nn.ModuleList(nn.Sequential(*_conv(C, C, 3), *_conv(C, C, 3)) for _ in range(outputs))
        self.inner_cls = nn.ModuleList(_classifier(C, aux_hidden, dropout) for _ in range(outputs))
        self.res1 = nn.Sequential(*_conv(outputs * C, C))
        self.res2 = nn.Sequential(*_conv(C, C, 3), *_conv(C, C, 3))
        self.cls = _classifier(C, True, dropout)

    def forward(self, features: Tensor, prototype: Tensor, maps: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits of background and class.

        Args:
            features: of the query ``(B, C, h, w)``.
            prototype: ``(B, C, 1, 1)``.
            maps: ``(B, M, h, w)``.

        Returns:
            ``(B, 2, h, w)``, and one ``(B, 2, ., .)`` a level for the intermediate losses.
        """
        size = features.shape[2:]
        sizes = pyramid_sizes(size, self.scales)
        levels = []
        for init, at in zip(self.init_merge, sizes, strict=True):
            pooled = F.adaptive_avg_pool2d(features, at)
            small = resize(maps, at, align_corners=True).to(pooled.dtype)
            levels.append(init(torch.cat([pooled, prototype.to(pooled.dtype).expand_as(pooled), small], 1)))
        if self.merges is not None:
            sizes = between(sizes)
            levels = [
                merge(torch.cat([F.adaptive_avg_pool2d(fine, at), resize(coarse, at, align_corners=True)], 1))
                for merge, fine, coarse, at in zip(self.merges, levels, levels[1:], sizes, strict=False)
            ]
        full: list[Tensor] = []
        inner = []
        for i, (x, at) in enumerate(zip(levels, sizes, strict=True)):
            if i > 0:  # from the finer level, by way of the full size as in PFENet
                x = x + self.alpha_conv[i - 1](torch.cat([x, resize(full[-1], at, align_corners=True)], 1))
            x = x + self.beta_conv[i](x)
            inner.append(self.inner_cls[i](x))
            full.append(resize(x, size, align_corners=True))
        x = self.res1(torch.cat(full, 1))
        return self.cls(x + self.res2(x)), inner


class EpisodeTransform:
    """PFENet's augmentation with DMNet's crops: size, turn, blur, mirror image, crop, each on image and mask alike.

    The longer side is brought to 0.9 to 1.1 of the crop's. A crop that loses more than 15 % of the object is drawn
    again, 30 times at most. What lies outside the image gets the mean colour and label 255.

    Args:
        crop: side of the result.
        mean: of the network's input.
        std: of the network's input.
        flip: mirror every other image.
    """

    def __init__(self, crop: int, mean: Sequence[float], std: Sequence[float], flip: bool = True) -> None:
        bilinear = v2.InterpolationMode.BILINEAR  # of images; torchvision turns masks by the nearest pixel
        fill = {tv_tensors.Image: [255 * value for value in mean], tv_tensors.Mask: 255}
        self.augment = v2.Compose(
            [
                RandomResizeLong(max(1, round(0.9 * crop)), round(1.1 * crop)),
                v2.RandomApply([v2.RandomRotation(10, interpolation=bilinear, fill=fill)], 0.5),
                v2.RandomApply([v2.GaussianBlur(5, 1.1)], 0.5),  # the width that OpenCV gives a window of 5
                *([v2.RandomHorizontalFlip()] if flip else []),
            ]
        )
        self.normalize = v2.Compose(
            [v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True), v2.Normalize([*mean], [*std])]
        )
        self.crop = RandomCrop(crop)

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        """`"image"` float32 `(3, S, S)` and `"mask"` int64 `(S, S)` of a `tv_tensors` image and mask."""
        item = self.normalize(self.augment(item))
        wanted = (1 - CROP_LOSS) * int((item["mask"] == 1).sum())
        for _ in range(CROP_TRIES):
            cropped = self.crop(item)
            if int((cropped["mask"] == 1).sum()) >= wanted:
                break
        return {"image": cropped["image"].as_subclass(Tensor), "mask": cropped["mask"].as_subclass(Tensor).long()}


class DSMFNet(nn.Module):
    """The network, its losses and its recipe.

    Args:
        num_classes: number of classes of the data, base and novel; the network itself knows none of them.
        config: its values.
        weights: local file with the backbone's pre-trained weights.

    Raises:
        FastcamError: values that do not fit together, or what :func:`fastcam.nn.create_backbone` refuses.
    """

    name = "dsmf_net"
    kind = "few-shot"
    learns_from_masks = True

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        _check(config)
        self.num_classes = num_classes
        self.config = config
        self.backbone = create_backbone(
            config.backbone, output_stride=config.output_stride, weights=weights, head=config.final_features
        )
        self.backbone.requires_grad_(False)
        self.normalize = self.backbone.normalize
        self._masked = _stage_end(self.backbone, 2, config.backbone)
        channels, C = self.backbone.channels, config.channels
        self.down_query = nn.Sequential(*_conv(channels[2] + channels[1], C), nn.Dropout2d(config.feature_dropout))
        self.down_supp = nn.Sequential(*_conv(channels[2] + channels[1], C), nn.Dropout2d(config.feature_dropout))
        self.stages = () if config.maps == "none" else config.stages
        self.reduce = nn.ModuleList(nn.Sequential(*_conv(channels[stage - 1], C)) for stage in self.stages)
        graph = config.maps == "graph"
        self.graph = nn.ModuleList(GloReUnit(C, config.graph_nodes) for _ in self.stages) if graph else None
        self.head = PyramidHead(
            C,
            len(self.stages) + config.prior,
            config.scales,
            config.merge,
            config.aux_hidden,
            config.head_dropout,
        )

    def split(self, classes: Sequence[str]) -> ClassSplit:
        """Base and novel classes among all of the data; see :func:`fastcam.data.few_shot.split_classes`."""
        c = self.config
        return split_classes(c.protocol, c.fold, classes, base=c.base, novel=c.novel)

    def test_pixels(self) -> int:
        """Pixels of a class that an image of a test episode must have."""
        given = self.config.min_pixels
        return PROTOCOLS[self.config.protocol].test_pixels if given is None else given

    def training_episodes(self, images: Any, crop: int, *, flip: bool = True) -> MaskEpisodes:
        """Episodes of the base classes; as many as there are pairs of an image and a base class in it.

        Cost: reads every mask once.

        Args:
            images: data set with masks, and the names of all classes in ``classes``.
            crop: side of the images.
            flip: mirror every other image.

        Raises:
            FastcamError: classes that do not fit the protocol, or a base class with too few images.
        """
        c, protocol = self.config, PROTOCOLS[self.config.protocol]
        split = self.split(images.classes)
        number = {name: k for k, name in enumerate(images.classes)}
        removed = [number[name] for name in split.novel if (c.novel_images or protocol.novel_images) == "removed"]
        least = protocol.train_pixels if c.min_pixels is None else c.min_pixels
        of_class = members(class_areas(images), [number[name] for name in split.base], least, removed)
        check_members({images.classes[k]: own for k, own in of_class.items()}, c.shots)
        mean, std = self.normalize
        return MaskEpisodes(images, of_class, c.shots, EpisodeTransform(crop, mean, std, flip))

    def train(self, mode: bool = True) -> DSMFNet:
        """Sets the mode of all but the backbone, which stays as it is in inference."""
        super().train(mode)
        self.backbone.eval()
        return self

    @torch.no_grad()
    def support_stages(self, images: Tensor, masks: Tensor) -> list[Tensor]:
        """Stages of support images in one pass, the last of them ``stage4(stage3 m) m``, with m the mask.

        Args:
            images: ``(N, 3, H, W)``.
            masks: ``(N, H, W)``; 1 is the class.
        """
        plain: list[Tensor] = []

        def keep_marked(_: Any, __: Any, output: Tensor) -> Tensor:
            plain.append(output)
            return output * support_weights(masks, output.shape[2:])

        hook = self.backbone.net.get_submodule(self._masked).register_forward_hook(keep_marked)
        try:
            stages = self.backbone(images)
        finally:
            hook.remove()
        last = stages[3] * support_weights(masks, stages[3].shape[2:])
        return [*stages[:2], plain[0], last]

    def metric_map(self, number: int, query: Tensor, support: Tensor, masks: Tensor) -> Tensor:
        """Graph prototype probability map of one stage, in [0, 1].

        Args:
            number: place of the stage in ``config.stages``.
            query: its features of the query ``(B, C, h, w)``.
            support: of the supports ``(B K, C, h, w)``.
            masks: ``(B K, H, W)``.

        Returns:
            float32 ``(B, 1, h, w)``.
        """
        reduce = self.reduce[number]
        graph = nn.Identity() if self.graph is None else self.graph[number]
        of_query, of_support = graph(reduce(query)), graph(reduce(support))
        prototypes = masked_average_pool(of_support.float(), support_weights(masks, of_support.shape[2:]))
        return minmax_map(cosine_map(of_query, _over_shots(prototypes, len(query))))

    def prior(self, query: Tensor, support: Tensor, masks: Tensor) -> Tensor:
        """Prior of last-stage features, mean over the shots: ``(B, 1, h, w)`` of ``(B, D, h, w)``, ``(B K, D, y, x)``
        and masks ``(B K, H, W)``."""
        K = len(support) // len(query)
        one = cosine_max_prior(query.repeat_interleave(K, 0), support, support_weights(masks, support.shape[2:]))
        return _over_shots(one, len(query))

    def forward(self, query: Tensor, support: Tensor, masks: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits at the resolution of the features.

        Args:
            query: ``(B, 3, H, W)``.
            support: ``(B, K, 3, H', W')``.
            masks: ``(B, K, H', W')``; 1 is the class, everything else (255 too) is not.

        Returns:
            ``(B, 2, h, w)``, and those of the intermediate losses.
        """
        _check_episode(query, support, masks)
        shots, masks = _flat(support), masks.flatten(0, 1)
        with torch.no_grad():
            q = self.backbone(query)
        s = self.support_stages(shots, masks)
        grid = q[2].shape[2:]
        features = self.down_query(_mid_level(q))
        of_support = self.down_supp(_mid_level(s)).float()
        pooled = masked_average_pool(of_support, support_weights(masks, of_support.shape[2:]))
        maps = [self.metric_map(i, q[stage - 1], s[stage - 1], masks) for i, stage in enumerate(self.stages)]
        if self.config.prior:
            maps.append(self.prior(q[3], s[3], masks))
        joined = torch.cat([resize(one, grid, align_corners=True) for one in maps], 1)
        return self.head(features, _over_shots(pooled, len(query)), joined)

    def predict(self, query: Tensor, support: Tensor, masks: Tensor) -> Tensor:
        """Logits of background and class at every pixel of the query, float32 ``(B, 2, H, W)``; arguments as
        :meth:`forward` takes them."""
        return resize(self(query, support, masks)[0].float(), query.shape[2:], align_corners=True)

    @torch.no_grad()
    def prototype_scores(self, query: Tensor, support: Tensor, masks: Tensor) -> Tensor:
        """The baseline without training: cosines with the mean feature of the background and of the class.

        Features are the trunk's mid-level ones, which :meth:`forward` reduces. Arguments and result as of
        :meth:`predict`.
        """
        _check_episode(query, support, masks)
        q, s = (_mid_level(self.backbone(x)).float() for x in (query, _flat(support)))
        marked = support_weights(masks.flatten(0, 1), s.shape[2:])
        sides = [_over_shots(masked_average_pool(s, weight), len(query)) for weight in (1 - marked, marked)]
        scores = torch.cat([cosine_map(q, prototype) for prototype in sides], 1)
        return resize(scores, query.shape[2:], align_corners=True)

    @torch.no_grad()
    def prior_scores(self, query: Tensor, support: Tensor, masks: Tensor, threshold: float = 0.5) -> Tensor:
        """The prior alone against a constant background; arguments and result as of :meth:`predict`."""
        _check_episode(query, support, masks)
        shots, marked = _flat(support), masks.flatten(0, 1)
        prior = self.prior(self.backbone(query)[3], self.support_stages(shots, marked)[3], marked)
        prior = resize(prior, query.shape[2:], align_corners=True)
        return torch.cat([torch.full_like(prior, threshold), prior], 1)

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cross-entropy of the last logits, and ``aux_weight`` times the mean one of the intermediate ones.

        Args:
            batch: items of :meth:`training_episodes`, collated.

        Returns:
            ``"loss"``; ``"main_loss"``, ``"aux_loss"``, ``"accuracy"``. All are 0 where no pixel is known.
        """
        mask = batch["mask"]
        logits, inner = self(batch["image"], batch["support"], batch["support_mask"])
        weights = torch.ones(2, device=mask.device)

        def loss(scores: Tensor) -> Tensor:
            return cross_entropy(resize(scores.float(), mask.shape[1:], align_corners=True), mask, weights)

        main, aux = loss(logits), torch.stack([loss(scores) for scores in inner]).mean()
        known = mask != 255
        found = resize(logits.detach().float(), mask.shape[1:], align_corners=True).argmax(1)
        accuracy = ((found == mask) & known).sum() / known.sum().clamp(min=1)
        total = main + self.config.aux_weight * aux
        return {"loss": total, "main_loss": main.detach(), "aux_loss": aux.detach(), "accuracy": accuracy}

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """SGD with a poly schedule over all but the backbone."""
        c = self.config
        learned = [p for p in self.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(learned, lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay)
        decay = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: max(0.0, 1 - step / total_steps) ** c.poly_power
        )
        return [(optimizer, decay)]

    def export_state_dict(self) -> dict[str, Tensor]:
        """What inference needs: all of the state, the backbone's too."""
        return self.state_dict()


def _mid_level(stages: list[Tensor]) -> Tensor:
    return torch.cat([stages[2], resize(stages[1], stages[2].shape[2:], align_corners=True)], 1)


def _flat(support: Tensor) -> Tensor:
    """`(B, K, 3, H, W)` -> `(B K, 3, H, W)`, channels last: convolutions run faster."""
    return support.flatten(0, 1).contiguous(memory_format=torch.channels_last)


def _over_shots(x: Tensor, batch: int) -> Tensor:
    """Mean over the shots of ``(B K, ...)``."""
    return x.unflatten(0, (batch, -1)).mean(1)


def _stage_end(backbone: Backbone, stage: int, name: str) -> str:
    """Name of the layer whose output is a stage's."""
    outputs: list[tuple[str, Any]] = []
    hooks = [
        layer.register_forward_hook(lambda _, __, output, path=path: outputs.append((path, output)))
        for path, layer in backbone.net.named_modules()
        if path
    ]
    with torch.no_grad():
        stages = backbone(torch.zeros(1, 3, 64, 64))
    for hook in hooks:
        hook.remove()
    ends = [path for path, output in outputs if output is stages[stage]]
    if not ends:
        raise FastcamError(
            f"dsmf_net: backbone '{name}' has no layer that ends its stage {stage + 1}; choose a ResNet or MobileNetV2"
        )
    return ends[-1]


def _check(config: Config) -> None:
    if config.maps not in ("graph", "convolution", "none"):
        raise FastcamError(f"dsmf_net: maps is {config.maps!r}, expected graph, convolution or none")
    if config.maps == "none" and not config.prior:
        raise FastcamError("dsmf_net: maps is none and prior false, but the network needs a map; set one of them")
    if config.maps != "none" and (not config.stages or any(stage not in (1, 2, 3, 4) for stage in config.stages)):
        raise FastcamError(f"dsmf_net: stages are {config.stages}, expected some of 1, 2, 3 and 4")
    if min(config.channels, config.graph_nodes, config.shots) < 1:
        raise FastcamError(
            f"dsmf_net: channels, graph_nodes and shots are {config.channels}, {config.graph_nodes} and "
            f"{config.shots}, expected at least 1"
        )
    falling = all(a > b for a, b in pairwise(config.scales))
    if not config.scales or not falling or not 0 < config.scales[-1] <= config.scales[0] <= 1:
        raise FastcamError(f"dsmf_net: scales are {config.scales}, expected falling numbers from 1 to above 0")
    if config.merge and len(config.scales) < 2:
        raise FastcamError("dsmf_net: merge joins neighbouring scales, got a single one; set merge false or add scales")
    if config.protocol not in PROTOCOLS:
        raise FastcamError(f"dsmf_net: protocol is {config.protocol!r}, expected {', '.join(PROTOCOLS)}")
    if config.novel_images not in (None, "background", "removed"):
        raise FastcamError(f"dsmf_net: novel_images is {config.novel_images!r}, expected background or removed")


def _check_episode(query: Tensor, support: Tensor, masks: Tensor) -> None:
    shape = tuple(support.shape[:2]), tuple(support.shape[3:])
    if query.ndim != 4 or support.ndim != 5 or masks.shape != (*shape[0], *shape[1]) or len(query) != len(support):
        raise ValueError(
            "dsmf_net: expected query (B, 3, H, W), support (B, K, 3, H', W') and masks (B, K, H', W'), got "
            f"{tuple(query.shape)}, {tuple(support.shape)} and {tuple(masks.shape)}"
        )
    if support.shape[1] < 1:
        raise ValueError("dsmf_net: expected at least one support image, got K = 0")
