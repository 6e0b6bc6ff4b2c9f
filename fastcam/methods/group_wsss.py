"""Group-WSSS: images that share classes explain each other, as nodes of a graph.

X. Li, T. Zhou, J. Li, Y. Zhou, Z. Zhang, "Group-Wise Semantic Mining for Weakly Supervised Semantic Segmentation", AAAI
2021 (arXiv 2012.05007). Authors' code: github.com/Lixy1997/Group-WSSS (no licence stated).

One image shows a classifier only what tells its classes apart; several images show different parts. The images of a
group pass through one network; each image's class scores are a node. For some rounds every node gets messages from all
others (:func:`co_attention`), updates itself by a convolutional GRU, and has its strongest responses weakened
(:func:`graph_dropout`). The first and the last state of every node are classified; their mean is the map. Maps of the
images as they pass by in training are kept (:func:`accumulate`), and become labels by a saliency map
(:func:`proxy_label`).

Deviations from the authors' code: groups of any size, several in a batch; nothing is dropped at inference; partners are
drawn from an index, without repeating an image where there are enough; more in ``docs/methods/group_wsss.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.nn import CamFusion, FusedCams, create_trunk, score_head
from fastcam.nn.optim import sgd_steps

AGGREGATES = ("concat", "mean")
IGNORE = 255


@dataclass(frozen=True)
class Config:
    """The values of the authors' VOC 2012 run.

    Attributes:
        backbone: timm name; ``vgg16`` gets the authors' layout.
        output_stride: of the last features; layers behind a removed stride are dilated.
        frozen_stages: first stages that do not learn.
        frozen_norm: the backbone's batch norm keeps its pre-trained statistics.
        head_layers: 3 x 3 convolutions between the backbone and the class scores.
        head_channels: their width.
        group_size: images a group, K; the paper's figure has 4, the authors' code 3.
        rounds: of messages, T.
        aggregate: messages of all others side by side (``concat``) or their ``mean``, which no order changes.
        attention_channels: of the projections that the co-attention compares; ``None``: half the number of classes.
        dropout_rate: probability of weakening the strongest responses, rather than all a little.
        dropout_threshold: share of the strongest response above which a pixel is weakened.
        initial_loss: factor of the loss of the first states.
        accumulate: keep the maps of training images (needs crops that show all of an image, not mirrored).
        accumulate_from: share of the training behind which maps are kept.
        accumulate_last: share of the training behind which a class without a map gets one even if it is not believed.
        least_probability: of a class whose map is kept.
        lr: of the backbone's weights; its biases learn twice as fast, all else ``head_lr_factor`` times.
        drops: shares of the training after which the learning rate falls to a tenth.
        grad_clip: largest norm of the gradient, or ``None``.
    """

    backbone: str = "vgg16"
    output_stride: int = 8
    frozen_stages: int = 0
    frozen_norm: bool = True
    head_layers: int = 3
    head_channels: int = 512
    group_size: int = 3
    rounds: int = 3
    aggregate: str = "concat"
    attention_channels: int | None = None
    dropout_rate: float = 0.8
    dropout_threshold: float = 0.7
    initial_loss: float = 0.4
    accumulate: bool = True
    accumulate_from: float = 1 / 15
    accumulate_last: float = 14 / 15
    least_probability: float = 0.1
    lr: float = 1e-3
    head_lr_factor: float = 10.0
    momentum: float = 0.9
    weight_decay: float = 5e-4
    drops: tuple[float, ...] = (5 / 15, 10 / 15)
    grad_clip: float | None = None


def co_attention(a: Tensor, b: Tensor, query: Tensor) -> Tensor:
    r"""What a node gets from another: at each of its pixels a mean of the other's states, weighted by likeness.

    .. math:: m_p = \sum_r \operatorname{softmax}_r(a_p \cdot b_r)\, q_r

    The matrix of all pairs of pixels is not kept where torch has a fused attention.

    Args:
        a: projection of the node that gets the message, ``(..., d, N)``.
        b: projection of the other one, ``(..., d, M)``.
        query: states of the other one, ``(..., C, M)``.

    Returns:
        ``(..., C, N)``.
    """
    wide = max(a.shape[-2], query.shape[-2])  # the fused attention wants one width; zeros change no product
    q, k, v = (F.pad(x.transpose(-2, -1), (0, wide - x.shape[-2])) for x in (a, b, query))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(-2, -1)[..., : query.shape[-2], :]


def gate(message: Tensor, weight: Tensor) -> Tensor:
    """A message ``(..., C, N)`` times how far each of its pixels is trusted: the sigmoid of ``weight (C,)`` on it."""
    return message * torch.sigmoid(torch.einsum("...cn,c->...n", message, weight)).unsqueeze(-2)


def graph_dropout(x: Tensor, draw: Tensor, rate: float = 0.8, threshold: float = 0.7) -> Tensor:
    """Weakens what a node responds to most: ``x (1 + sel) / 2``.

    With probability ``rate``, ``sel`` is 0 where the mean over channels reaches ``threshold`` of its maximum and 1
    elsewhere, so that the strongest pixels are halved; else it is the sigmoid of that mean. Where the mean is negative
    everywhere nothing reaches it.

    Args:
        x: ``(..., C, H, W)``.
        draw: uniform in [0, 1), ``(...)``: one number a map, the chance in it.
        rate: of the first case.
        threshold: share of the maximum.

    Returns:
        Like ``x``. The choice of pixels has no gradient, the sigmoid has.
    """
    mean = x.mean(dim=-3, keepdim=True)
    weak = (mean < threshold * mean.amax(dim=(-2, -1), keepdim=True)).to(x.dtype)
    drop = (draw + rate >= 1)[..., None, None, None]
    return x * (1 + torch.where(drop, weak, torch.sigmoid(mean))) / 2


class ConvGRU(nn.Module):
    """A gated recurrent unit whose three layers are convolutions of input and state, side by side.

    Args:
        channels: of input and state.
        kernel: of the convolutions.
    """

    def __init__(self, channels: int, kernel: int = 1) -> None:
        super().__init__()
        self.reset, self.update, self.out = (
            nn.Conv2d(2 * channels, channels, kernel, padding=kernel // 2) for _ in range(3)
        )

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        """Input and state ``(B, C, H, W)`` to the new state: between the old one and a candidate in (-1, 1)."""
        both = torch.cat([x, state], dim=1)
        update, reset = torch.sigmoid(self.update(both)), torch.sigmoid(self.reset(both))
        candidate = torch.tanh(self.out(torch.cat([x, state * reset], dim=1)))
        return state * (1 - update) + candidate * update


def group_loss(initial: Tensor, final: Tensor, tags: Tensor, initial_weight: float = 0.4) -> Tensor:
    """Multi-label soft margin losses of the first and last states' logits ``(B, C)``, weighted, over 2."""
    first, last = (F.multilabel_soft_margin_loss(logits, tags) for logits in (initial, final))
    return (initial_weight * first + last) / 2


def quantized_attention(maps: Tensor) -> Tensor:
    """Maps ``(..., H, W)`` of 0 or more, divided by their maximum, in 8 bits; a zero map stays zero."""
    return (255 * maps / (maps.amax(dim=(-2, -1), keepdim=True) + 1e-8)).round().to(torch.uint8)


def accumulate(
    kept: Tensor | None, attention: Tensor, probability: float, *, last: bool = False, least: float = 0.1
) -> Tensor | None:
    """The map of one class of one image after it was seen again: the maximum of all that were believed (OAA).

    Args:
        kept: uint8 ``(H, W)``, or ``None`` at the beginning.
        attention: the new one, uint8 ``(H, W)``.
        probability: that the classifier gives the class.
        last: a class that has no map yet gets this one, whatever its probability.
        least: probability below which a map is not believed.

    Returns:
        What to keep.
    """
    if probability < least and not (last and kept is None):
        return kept
    return attention if kept is None else torch.maximum(kept, attention)


def proxy_label(
    maps: Tensor,
    saliency: Tensor,
    *,
    conflict: float = 0.9,
    salient: float = 32 / 255,
    certain: float = 0.8,
    least_area: float = 0.01,
) -> Tensor:
    """Labels from attention maps and a saliency map.

    Each map is scaled to [0, 1]; the background scores 1 minus the saliency; the best wins, the background where scores
    are equal. Ignored are pixels where more than one score exceeds ``conflict``, and background pixels that are salient
    or that a map exceeds ``certain`` at. An image with hardly any foreground is ignored altogether.

    Args:
        maps: ``(n, H, W)``, one map a class of the image.
        saliency: ``(H, W)`` in [0, 1].
        conflict: score that at most one may exceed, the background's included.
        salient: a pixel is salient from this value on; the authors' 32 of 255.
        certain: a map above this contradicts the background.
        least_area: share of the image that must be foreground.

    Returns:
        uint8 ``(H, W)``: 0 background, ``i + 1`` for map ``i``, 255 ignored. A constant map counts as 0 everywhere.
    """
    if maps.ndim != 3 or saliency.shape != maps.shape[1:]:
        raise ValueError(
            f"proxy_label: expected maps (n, H, W) and saliency (H, W), got {tuple(maps.shape)}, "
            f"{tuple(saliency.shape)}"
        )
    low = maps.amin(dim=(1, 2), keepdim=True)
    scaled = (maps - low) / (maps.amax(dim=(1, 2), keepdim=True) - low + 1e-8)
    scores = torch.cat([1 - saliency[None], scaled])
    label = scores.argmax(dim=0)
    doubt = torch.maximum(saliency, (scaled > certain).any(dim=0).to(saliency.dtype)) >= salient
    label = label.masked_fill(((scores > conflict).sum(dim=0) > 1) | ((label == 0) & doubt), IGNORE)
    if ((label != 0) & (label != IGNORE)).float().mean() < least_area:
        label = torch.full_like(label, IGNORE)
    return label.to(torch.uint8)


class GroupGraph(nn.Module):
    """The rounds of messages between the nodes of groups; one set of layers for all nodes, edges and rounds.

    Args:
        channels: of a node's state: the number of classes.
        config: its values.
    """

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        self.config = config
        d = config.attention_channels or max(1, channels // 2)
        neighbours = max(1, config.group_size - 1) if config.aggregate == "concat" else 1
        self.project_a = nn.Conv2d(channels, d, 1)
        self.project_b = nn.Conv2d(channels, d, 1)
        self.gate = nn.Parameter(torch.empty(channels))
        self.fuse = nn.Conv2d(neighbours * channels, channels, 3, padding=1)
        self.gru = ConvGRU(channels)
        for name, parameter in self.named_parameters():
            if not name.endswith("bias"):
                nn.init.normal_(parameter, std=0.01)

    def forward(self, nodes: Tensor, draws: Tensor | None = None) -> Tensor:
        """First states ``(G, K, C, h, w)`` of the nodes of groups to their last ones.

        All nodes of a round are updated from its old states. A group of one image has no messages and stays as it is.

        Args:
            nodes: first states.
            draws: uniform in [0, 1), ``(rounds, G, K)``; ``None``: nothing is dropped.
        """
        if nodes.shape[1] == 1:
            return nodes
        for t in range(self.config.rounds):
            messages = self.messages(nodes).flatten(0, 1)
            nodes = self.gru(self.fuse(messages), nodes.flatten(0, 1)).view_as(nodes)
            if draws is not None:
                nodes = graph_dropout(nodes, draws[t], self.config.dropout_rate, self.config.dropout_threshold)
        return nodes

    def messages(self, nodes: Tensor) -> Tensor:
        """What every node gets from the others, ``(G, K, (K - 1) C, h, w)`` in their order, or ``(G, K, C, h, w)``."""
        G, K, C, h, w = nodes.shape
        flat = nodes.flatten(0, 1)
        a, b = (project(flat).view(G, K, -1, h * w) for project in (self.project_a, self.project_b))
        ends = [(i, j) for i in range(K) for j in range(K) if i != j]
        to, source = torch.tensor(ends, device=nodes.device).T
        message = gate(co_attention(a[:, to], b[:, source], nodes.flatten(3)[:, source]), self.gate)
        message = message.reshape(G, K, K - 1, C, h, w)
        return message.mean(dim=2) if self.config.aggregate == "mean" else message.flatten(2, 3)


class GroupWSSS(nn.Module):
    """The network, its loss, and the maps it keeps.

    Args:
        num_classes: number of foreground classes C.
        config: its values.
        weights: local file with the backbone's pre-trained weights.

    Raises:
        FastcamError: values that do not fit together, or what :func:`fastcam.nn.create_backbone` refuses.
    """

    name = "group_wsss"
    kind = "cam"

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        if config.aggregate not in AGGREGATES:
            raise FastcamError(
                f"group_wsss: aggregate is '{config.aggregate}', expected one of {', '.join(AGGREGATES)}"
            )
        for name, least in (("group_size", 1), ("rounds", 1), ("head_layers", 0), ("head_channels", 1)):
            if getattr(config, name) < least:
                raise FastcamError(f"group_wsss: {name} is {getattr(config, name)}, expected at least {least}")
        if config.attention_channels is not None and config.attention_channels < 1:
            raise FastcamError(
                f"group_wsss: attention_channels is {config.attention_channels}, expected at least 1 or null"
            )
        for name in ("dropout_rate", "dropout_threshold", "accumulate_from", "accumulate_last", "least_probability"):
            if not 0 <= getattr(config, name) <= 1:
                raise FastcamError(f"group_wsss: {name} is {getattr(config, name)}, expected a number from 0 to 1")
        self.num_classes = num_classes
        self.config = config
        self.group_size = config.group_size
        self.backbone = create_trunk(
            config.backbone,
            output_stride=config.output_stride,
            weights=weights,
            frozen_stages=config.frozen_stages,
            frozen_norm=config.frozen_norm,
        )
        self.normalize = self.backbone.normalize
        self.head = score_head(
            self.backbone.channels[-1], num_classes, width=config.head_channels, layers=config.head_layers
        )
        for layer in self.head:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, std=0.01)
        self.graph = GroupGraph(num_classes, config)
        self.attention: dict[str, dict[int, Tensor]] = {}
        self.step = self.total_steps = 0

    def states(self, images: Tensor) -> Tensor:
        """First states of nodes: class scores at every pixel of the last feature map, ``(B, C, h, w)``."""
        return self.head(self.backbone(images)[-1]).float()

    def training_step(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Losses of the first and last states of groups.

        Args:
            batch: ``"image"`` ``(G K, 3, S, S)``, the images of a group behind each other; ``"tags"`` ``(G K, C)``; and
                ``"id"``, for the maps that are kept.
        """
        size = self.config.group_size
        if len(batch["image"]) % size:
            raise ValueError(
                f"group_wsss.training_step: expected a multiple of {size} images, got {len(batch['image'])}"
            )
        first = self.states(batch["image"])
        nodes = first.unflatten(0, (-1, size))
        draws = torch.rand(self.config.rounds, *nodes.shape[:2], device=first.device)
        last = self.graph(nodes, draws).flatten(0, 1)
        initial, final = first.mean(dim=(2, 3)), last.mean(dim=(2, 3))
        if self.config.accumulate and self.step >= self.config.accumulate_from * self.total_steps:
            self._keep(batch, F.relu((first + last).detach() / 2), final.detach().sigmoid())
        self.step += 1
        loss = group_loss(initial, final, batch["tags"], self.config.initial_loss)
        return {"loss": loss, "loss_initial": F.multilabel_soft_margin_loss(initial, batch["tags"])}

    def _keep(self, batch: dict[str, Any], maps: Tensor, probability: Tensor) -> None:
        attention, believed = quantized_attention(maps).cpu(), probability.tolist()
        last = self.step >= self.config.accumulate_last * self.total_steps
        for i, k in (batch["tags"] > 0).nonzero().tolist():
            kept = self.attention.setdefault(batch["id"][i], {})
            new = accumulate(
                kept.get(k),
                attention[i, k],
                believed[i][k],
                last=last,
                least=self.config.least_probability,
            )
            if new is not None:
                kept[k] = new

    def kept_maps(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Id, classes int64 ``(n,)`` and maps in [0, 1] ``(n, h, w)`` of every training image that has maps."""
        for image_id, kept in self.attention.items():
            if kept:
                keys = sorted(kept)
                yield image_id, torch.tensor(keys), torch.stack([kept[k] for k in keys]).float() / 255

    def get_extra_state(self) -> dict[str, Any]:
        """The kept maps and the number of steps, for exact resuming. Maps are no buffers: their number grows."""
        return {"attention": self.attention, "step": self.step}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores them."""
        self.attention, self.step = state["attention"], state["step"]

    def _mirror_group(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """First and last states of images in a group with their own mirror images, which fill it up."""
        first = self.states(torch.cat([images, images.flip(-1)])).unflatten(0, (2, -1)).transpose(0, 1)
        size = max(2, self.config.group_size) if self.config.aggregate == "concat" else 2
        if self.config.group_size == 1:
            return first, first
        order = torch.arange(size, device=images.device) % 2
        last = torch.stack([self.graph(first[:, order ^ side])[:, 0] for side in (0, 1)], dim=1)
        return first, last

    def tag_logits(self, images: Tensor) -> Tensor:
        """What the classifier thinks of the tags: ``(B, C)``, a probability after a sigmoid."""
        return self._mirror_group(images)[1].mean(dim=(1, 3, 4))

    def cams(self, images: Tensor, tags: Tensor | None = None) -> Tensor:
        """Maps ``(B, C, h, w)`` of one view, ReLU'd, not normalised; classes without a tag are 0.

        An image forms a group with its mirror image, as long as nothing else is known of the classes it has.
        """
        first, last = self._mirror_group(images)
        maps = F.relu((first[:, 0] + last[:, 0]) / 2)
        return maps if tags is None else maps * (tags > 0)[:, :, None, None]

    def fused_cams(
        self, views: Sequence[Tensor], size: tuple[int, int], tags: Tensor | None = None, keys: Tensor | None = None
    ) -> FusedCams:
        """Maps of several scales and their mirror images, added as IRN does: no background.

        ``keys`` ``(n,)``: only the maps of these classes.
        """
        if not views:
            raise ValueError("group_wsss.fused_cams: expected at least one view, got none")
        maps: list[Tensor] = []
        for view in views:
            first, last = self._mirror_group(view)
            both = F.relu((first + last) / 2)
            maps += [side if keys is None else side[:, keys] for side in both.unbind(1)]
        present = None if tags is None else (tags > 0) if keys is None else (tags > 0)[:, keys]
        return FusedCams(CamFusion("irn", multiple=1).fuse(maps, size, present))

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """SGD with Nesterov momentum in four groups of learning rates, which fall in steps."""
        self.total_steps = total_steps
        return [sgd_steps(self.backbone, [self.head, self.graph], self.config, total_steps)]

    def export_state_dict(self) -> dict[str, Tensor]:
        """The state without the kept maps and the number of steps, which only training needs."""
        return {k: v for k, v in self.state_dict().items() if not k.endswith("_extra_state")}
