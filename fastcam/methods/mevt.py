"""MEVT: self-supervised pre-training of a hierarchical encoder and its decoder, for segmentation.

"Self-supervised vision transformers for semantic segmentation", Computer Vision and Image Understanding 251, 2025
(doi.org/10.1016/j.cviu.2024.104272 as far as we know; no public code or preprint). Only the abstract is certain: a
hierarchical encoder-decoder transformer that propagates global context to high-resolution features, trained by a dense
self-supervisory signal. **This is an instance designed from the abstract and from the published code of related work**,
and every structure below is theirs or our choice: PVTv2 (Apache-2.0) as the encoder; view and region tasks of EsViT
(MIT); clustering of aligned pixels of Leopart; DINO's heads, centres, teacher and recipe (Apache-2.0); iBOT's masked
tokens, PixPro's and DenseCL's contrast of pixels (MIT) as options. See ``docs/methods/mevt.md``.

A student sees two large and several small crops of an image, its teacher, a moving average of it, the two large ones.
The student must give every view the teacher's distribution over K learned clusters (view), every token that of the
teacher's most similar token (region), and every pixel of the decoder, where two crops show the same place, the
teacher's balanced assignment to prototypes (dense). No labels are used.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.data.multi_crop import GLOBALS, multi_crop_transform
from fastcam.errors import FastcamError
from fastcam.nn import Backbone, create_backbone
from fastcam.nn.optim import cosine_schedule
from fastcam.ops.pairwise_max import pairwise_max
from fastcam.ops.prototype_similarity import prototype_similarity

TRUNK = "backbone."  # where the trained encoder and decoder are
DENSE = ("assign", "pixpro", "densecl")
LEVELS = ("F", "E4")
TARGETS = ("sinkhorn", "centred")
COLORS = ("leopart", "dino")
BLOCK_RATIO = (0.3, 1 / 0.3)  # height to width of iBOT's masked blocks


@dataclass(frozen=True)
class Config:
    """The full instance: two crops of 224 and four of 96, batches of 512 images, 300 epochs (EsViT's).

    Attributes:
        backbone: the encoder, a timm network, and the decoder's kind and width, see
            :func:`fastcam.nn.create_backbone`. ``+topdown256`` leaves out the attention to the coarsest stage; without
            a decoder the dense term reads the encoder.
        drop_path: stochastic depth of the student.
        view_clusters: K of the view head; 0 for no view term.
        region_clusters: K of the region head; 0 for no region term.
        prototypes: K of the dense term.
        head_hidden: width of the heads' hidden layers.
        bottleneck: width of what the heads compare with clusters and prototypes.
        num_locals: number of small crops.
        local_size: their side.
        global_scale: smallest and largest area of a large crop as a share of the image's.
        local_scale: of a small crop.
        colors: ``"leopart"`` or ``"dino"``, see :func:`fastcam.data.multi_crop_transform`.
        color_strength: of the jitter.
        dense: ``"assign"`` (Leopart), ``"pixpro"`` or ``"densecl"``.
        dense_weight: of the dense term; 0 leaves it out.
        dense_level: ``"F"``, the finest output at half its resolution, or ``"E4"``, the encoder's last stage.
        dense_target: ``"sinkhorn"``, or ``"centred"``, a softmax of centred scores as in the other terms.
        dense_epoch: first epoch of the dense term.
        dense_grid: side of the grid on which two crops are compared.
        sinkhorn_eps: temperature of the teacher's assignment.
        sinkhorn_iterations: of its balancing.
        pixpro_radius: cells closer than this, in diagonals of the larger crop's cells, are the same place.
        queue: number of DenseCL's negatives.
        queue_temp: its temperature.
        mask_weight: of the masked-token term; 0 leaves it out.
        mask_ratio: share of an image's tokens that are masked.
        mask_chance: share of the images that are masked.
        mask_temp: teacher's temperature of this term, from the first to the second in ``mask_temp_epochs``.
        student_temp: temperature of the student.
        teacher_temp: temperature of the teacher, from the first to the second in ``teacher_temp_epochs``.
        centre_momentum: of the centres.
        teacher_momentum: of the teacher at the start; a cosine brings it to 1.
        lr: largest learning rate; 5e-4 * batch / 256.
        min_lr: last learning rate.
        warmup_epochs: of linear growth from 0.
        weight_decay: at the start and at the end of a cosine.
        clip: largest norm of the gradient of each parameter tensor by itself.
        freeze_last_epochs: epochs in which the clusters of the heads do not learn.
        epochs: over which the schedules run; the trainer's.
    """

    backbone: str = "pvt_v2_b2+context256"
    drop_path: float = 0.1
    view_clusters: int = 8192
    region_clusters: int = 8192
    prototypes: int = 300
    head_hidden: int = 2048
    bottleneck: int = 256
    num_locals: int = 4
    local_size: int = 96
    global_scale: tuple[float, float] = (0.25, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.25)
    colors: str = "leopart"
    color_strength: float = 0.5
    dense: str = "assign"
    dense_weight: float = 1.0
    dense_level: str = "F"
    dense_target: str = "sinkhorn"
    dense_epoch: int = 0
    dense_grid: int = 7
    sinkhorn_eps: float = 0.05
    sinkhorn_iterations: int = 3
    pixpro_radius: float = 0.7
    queue: int = 65536
    queue_temp: float = 0.2
    mask_weight: float = 0.0
    mask_ratio: float = 0.3
    mask_chance: float = 0.5
    mask_temp: tuple[float, float] = (0.04, 0.07)
    mask_temp_epochs: int = 30
    student_temp: float = 0.1
    teacher_temp: tuple[float, float] = (0.04, 0.04)
    teacher_temp_epochs: int = 0
    centre_momentum: float = 0.9
    teacher_momentum: float = 0.996
    lr: float = 0.001
    min_lr: float = 1e-6
    warmup_epochs: int = 10
    weight_decay: tuple[float, float] = (0.04, 0.4)
    clip: float = 3.0
    freeze_last_epochs: int = 1
    epochs: int = 300


def teacher_probabilities(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """DINO's sharpened, centred distribution ``softmax((logits - centre) / temperature)``, float32, without gradient.

    Args:
        logits: ``(..., K)``.
        centre: ``(K,)``.
        temperature: below that of the student.
    """
    return ((logits.detach().float() - centre) / temperature).softmax(-1)


def updated_centre(centre: Tensor, logits: Tensor, momentum: float) -> Tensor:
    """``momentum * centre + (1 - momentum) * mean of logits (..., K)`` over all but K, and over processes."""
    mean = logits.detach().float().flatten(0, -2).mean(0)
    if _processes() > 1:
        torch.distributed.all_reduce(mean)
        mean /= _processes()
    return momentum * centre + (1 - momentum) * mean


def soft_cross_entropy(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """``-sum_k target_k log softmax(logits / temperature)_k`` over the last dimension, float32: ``(...)``."""
    return -(target * (logits.float() / temperature).log_softmax(-1)).sum(-1)


def view_loss(student: Tensor, teacher: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of every view against every other global one (DINO).

    Cost: one product of ``(G, B K)`` and ``(B K, V)``.

    Args:
        student: logits ``(V, B, K)`` of all views, the global ones first.
        teacher: probabilities ``(G, B, K)`` of the global views.
        temperature: of the student.

    Returns:
        Mean over images and over the G (V - 1) pairs of different views.
    """
    log_p = (student.float() / temperature).log_softmax(-1)
    pairs = -(teacher.flatten(1) @ log_p.flatten(1).T) / student.shape[1]
    return (pairs.sum() - pairs.diagonal().sum()) / (len(teacher) * (len(student) - 1))


@torch.no_grad()
def region_match(student: Tensor, teacher: Tensor) -> Tensor:
    """Which of the teacher's tokens ``(B, M, D)`` is most similar to each of the student's ``(B, N, D)``: ``(B, N)``.

    The cosine similarity decides; of equal ones the first. Without gradient, and N x M is never stored.
    """
    return pairwise_max(student.detach().float().mT, teacher.float().mT)[1]


def region_pair_loss(student: Tensor, teacher: Tensor, match: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of every token of one view against the token of another that it matches.

    As the teacher's rows sum to 1, it is ``logsumexp(z) - <t, z>`` with ``z = logits / temperature``; the products of
    all pairs of an image are formed, N x M numbers, and the matching ones picked, so that rows of K are never copied.

    Args:
        student: logits ``(B, N, K)``.
        teacher: probabilities ``(B, M, K)``.
        match: int64 ``(B, N)``, see :func:`region_match`.
        temperature: of the student.

    Returns:
        Mean over tokens and images.
    """
    z = student.float() / temperature
    picked = (z @ teacher.mT).gather(2, match[..., None])[..., 0]
    return (z.logsumexp(-1) - picked).mean()


def region_loss(
    student: Sequence[Tensor],
    tokens: Sequence[Tensor],
    teacher: Tensor,
    teacher_tokens: Tensor,
    temperature: float = 0.1,
) -> Tensor:
    """Cross-entropy of the tokens of every view against those they match in every other global one (EsViT).

    Args:
        student: logits ``(B, N_v, K)`` of all V views, the global ones first.
        tokens: their features ``(B, N_v, D)`` in front of the head.
        teacher: probabilities ``(G, B, M, K)`` of the global views.
        teacher_tokens: their features ``(G, B, M, D)``.
        temperature: of the student.

    Returns:
        Mean over the G (V - 1) pairs of different views. EsViT's loss is half of this and half of :func:`view_loss`.
    """
    terms = [
        region_pair_loss(student[v], teacher[g], region_match(tokens[v], teacher_tokens[g]), temperature)
        for g in range(len(teacher))
        for v in range(len(student))
        if v != g
    ]
    return torch.stack(terms).mean()


@torch.no_grad()
def sinkhorn(scores: Tensor, eps: float = 0.05, iterations: int = 3) -> Tensor:
    """Balanced assignment of n pixels to K prototypes (SwAV, Leopart).

    ``exp(scores / eps)`` is scaled in turn so that every prototype has the same share of all pixels and every pixel a
    total of 1. It is done on logarithms: a constant added to all scores changes nothing, and nothing overflows.

    Cost: two passes over ``(n, K)`` an iteration; only the factors, n + K numbers, are rewritten.

    Args:
        scores: ``(n, K)``; with several processes each has pixels of its own.
        eps: temperature, positive.
        iterations: 0 gives a softmax.

    Returns:
        float32 ``(n, K)``, rows sum to 1.
    """
    logits = scores.float() / eps
    pixel = logits.new_zeros(len(logits), 1)
    prototype = logits.new_zeros(1, logits.shape[1])
    for _ in range(iterations):
        prototype = -_logsumexp_over_processes((logits + pixel).logsumexp(0, keepdim=True))
        pixel = -(logits + prototype).logsumexp(1, keepdim=True)
    return (logits + prototype).softmax(1)


def overlap_boxes(boxes: Tensor, others: Tensor, size: int) -> Tensor:
    """What crops share with other crops of the same image, in pixels of the first ones.

    Args:
        boxes: crops ``(B, 4)``: x1, y1, x2, y2 in the image.
        others: ``(B, 4)``, each overlapping its partner.
        size: side that the first crops were resized to.

    Returns:
        ``(B, 4)`` in ``[0, size]``.
    """
    corner, side = boxes[:, :2], boxes[:, 2:] - boxes[:, :2]
    low, high = torch.maximum(corner, others[:, :2]), torch.minimum(boxes[:, 2:], others[:, 2:])
    return torch.cat([(low - corner) / side, (high - corner) / side], 1) * size


def mirror_boxes(boxes: Tensor, flips: Tensor, size: int) -> Tensor:
    """Boxes ``(B, 4)`` of crops of side ``size`` as they lie in those that are mirrored, where ``flips`` ``(B,)``."""
    x1, y1, x2, y2 = boxes.unbind(1)
    return torch.where(flips[:, None], torch.stack([size - x2, y1, size - x1, y2], 1), boxes)


def aligned(maps: Tensor, boxes: Tensor, flips: Tensor, crop: int, grid: int) -> Tensor:
    """The part of each crop's map that a box covers, on a grid, un-mirrored (RoIAlign, half-pixel shift).

    Args:
        maps: float32 ``(B, K, h, w)`` of crops of ``crop`` pixels, some of them mirrored.
        boxes: ``(B, 4)`` in pixels of the crop before it was mirrored.
        flips: bool ``(B,)``, which crops are mirrored.
        crop: side of the crops.
        grid: S.

    Returns:
        ``(B, K, S, S)``.
    """
    from torchvision.ops import roi_align

    rows, cols = maps.shape[2:]
    scale = boxes.new_tensor([cols, rows, cols, rows]) / crop
    rois = mirror_boxes(boxes, flips, crop) * scale
    index = torch.arange(len(maps), device=maps.device, dtype=rois.dtype)[:, None]
    out = roi_align(maps, torch.cat([index, rois], 1).to(maps.dtype), grid, sampling_ratio=-1, aligned=True)
    return torch.where(flips[:, None, None, None], out.flip(3), out)


def dense_loss(student: Tensor, target: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of the student's scores on the grid against the teacher's assignment there (Leopart).

    Args:
        student: scores ``(B, K, S, S)``.
        target: distributions over K, ``(B, K, S, S)``.
        temperature: of the student.

    Returns:
        Mean over pixels and images.
    """
    return soft_cross_entropy(student.movedim(1, -1), target.movedim(1, -1), temperature).mean()


def cell_centres(boxes: Tensor, flips: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where the cells of crops' maps lie in the image.

    Args:
        boxes: crops ``(B, 4)`` in pixels of the image.
        flips: bool ``(B,)``, which crops are mirrored.
        grid: rows and columns of the maps.

    Returns:
        Centres x, y ``(B, rows cols, 2)``, row-major, and the diagonal of a cell ``(B,)``, in pixels of the image.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]) / boxes.new_tensor([grid[1], grid[0]])
    ys = torch.arange(grid[0], device=boxes.device) + 0.5
    xs = (torch.arange(grid[1], device=boxes.device) + 0.5).expand(len(boxes), -1)
    xs = torch.where(flips[:, None], xs.flip(1), xs)
    x = (boxes[:, :1] + xs * sides[:, :1])[:, None].expand(-1, grid[0], -1)
    y = (boxes[:, 1:2] + ys * sides[:, 1:])[:, :, None].expand(-1, -1, grid[1])
    return torch.stack([x, y], -1).flatten(1, 2), sides.norm(dim=1)


def pixpro_loss(
    query: Tensor, key: Tensor, query_cells: tuple[Tensor, Tensor], key_cells: tuple[Tensor, Tensor], radius: float
) -> Tensor:
    """Similarity of the cells of two crops that show the same place, from one crop to the other (PixPro).

    Args:
        query: features ``(B, D, N)``.
        key: features ``(B, D, M)``, without gradient.
        query_cells: see :func:`cell_centres`.
        key_cells: see :func:`cell_centres`.
        radius: cells closer than this, in diagonals of the larger crop's cells, are a pair.

    Returns:
        ``-2`` times the mean over images of the mean cosine of the pairs; an image without pairs counts 0.
    """
    cosine = F.normalize(query.float(), dim=1).mT @ F.normalize(key.detach().float(), dim=1)
    far = torch.cdist(query_cells[0], key_cells[0]) / torch.maximum(query_cells[1], key_cells[1])[:, None, None]
    pairs = (far < radius).float()
    return -2 * ((cosine * pairs).sum((1, 2)) / (pairs.sum((1, 2)) + 1e-6)).mean()


def densecl_loss(query: Tensor, key: Tensor, match: Tensor, queue: Tensor, temperature: float = 0.2) -> Tensor:
    """InfoNCE of every cell against the key cell that it matches, with a queue of negatives (DenseCL).

    Args:
        query: features ``(B, D, N)``.
        key: features ``(B, D, M)``, without gradient.
        match: int64 ``(B, N)``, :func:`region_match` of the features in front of the head.
        queue: normalised features ``(Q, D)`` of earlier images.
        temperature: of the softmax.

    Returns:
        Mean over cells and images.
    """
    query, key = F.normalize(query.float(), dim=1), F.normalize(key.detach().float(), dim=1)
    positive = (query * key.gather(2, match[:, None].expand(-1, key.shape[1], -1))).sum(1)
    logits = torch.cat([positive[..., None], query.mT @ queue.T], -1) / temperature
    return (logits.logsumexp(-1) - logits[..., 0]).mean()


def block_masks(count: int, grid: tuple[int, int], ratio: float, chance: float) -> Tensor:
    """Random masks of rectangular blocks (iBOT): ``(count, rows, cols)`` bool.

    A mask is empty but with ``chance``; then blocks of random shape are added until ``ratio`` of the tokens, rounded,
    are masked. Draws from torch's CPU generator.
    """
    rows, cols = grid
    masks = torch.zeros(count, rows, cols, dtype=torch.bool)
    wanted = round(ratio * rows * cols)
    low, high = (math.log(bound) for bound in BLOCK_RATIO)
    for mask in masks:
        if float(torch.rand(())) >= chance:
            continue
        while (left := wanted - int(mask.sum())) > 0:
            area, aspect, down, right = torch.rand(4).tolist()
            area, aspect = 1 + area * (left - 1), math.exp(low + aspect * (high - low))
            h = min(max(1, round(math.sqrt(area * aspect))), rows)
            w = min(max(1, round(math.sqrt(area / aspect))), cols)
            top, first = int(down * (rows - h + 1)), int(right * (cols - w + 1))
            block = torch.zeros_like(mask)
            block[top : top + h, first : first + w] = True
            if int((block & ~mask).sum()) <= left:
                mask |= block
    return masks


def masked_loss(student: Tensor, teacher: Tensor, masks: Tensor, temperature: float = 0.1) -> Tensor:
    """Cross-entropy of masked tokens against the teacher, which sees them (iBOT).

    Args:
        student: logits ``(B, N, K)``.
        teacher: probabilities ``(B, N, K)``.
        masks: bool ``(B, N)``.
        temperature: of the student.

    Returns:
        Mean over an image's masked tokens, then over images; an image without any counts 0.
    """
    losses = soft_cross_entropy(student, teacher, temperature) * masks
    return (losses.sum(1) / masks.sum(1).clamp(min=1)).mean()


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """``teacher <- momentum * teacher + (1 - momentum) * student`` for every parameter; buffers are copied."""
    own: list[Tensor] = list(teacher.parameters())
    other: list[Tensor] = list(student.parameters())
    torch._foreach_mul_(own, momentum)
    torch._foreach_add_(own, other, alpha=1 - momentum)
    for ours, theirs in zip(teacher.buffers(), student.buffers(), strict=True):
        ours.copy_(theirs)


def clip_each(parameters: Sequence[Tensor], largest: float) -> None:
    """Scales the gradient of every tensor by itself to a norm of at most ``largest``."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if gradients:
        norms = torch._foreach_norm(gradients)
        torch._foreach_mul_(gradients, [(largest / (norm + 1e-6)).clamp(max=1) for norm in norms])


def cluster_entropy(probabilities: Tensor) -> Tensor:
    """Entropy of the mean distribution ``(..., K)`` as a share of ``log K``: near 0 where training has collapsed."""
    mean = probabilities.flatten(0, -2).mean(0)
    return -torch.special.xlogy(mean, mean).sum() / math.log(max(len(mean), 2))


def _processes() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def _logsumexp_over_processes(x: Tensor) -> Tensor:
    if _processes() == 1:
        return x
    parts = [torch.empty_like(x) for _ in range(_processes())]
    torch.distributed.all_gather(parts, x)
    return torch.stack(parts).logsumexp(0)


def projector(channels: int, hidden: int, out: int) -> nn.Sequential:
    """DINO's three linear layers with GELU between them."""
    layers = nn.Sequential(
        nn.Linear(channels, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, out)
    )
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    return layers


class DINOHead(nn.Module):
    """Cosines of projected features with K clusters: DINO's weight-normalised last layer with its gain fixed to 1.

    Args:
        channels: D of the features.
        clusters: K.
        hidden: width of the hidden layers.
        bottleneck: width of the projection.
    """

    def __init__(self, channels: int, clusters: int, hidden: int, bottleneck: int) -> None:
        super().__init__()
        self.mlp = projector(channels, hidden, bottleneck)
        self.last = nn.Linear(bottleneck, clusters, bias=False)
        nn.init.trunc_normal_(self.last.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``(..., D)`` -> float32 ``(..., K)`` in [-1, 1]."""
        return self.cosines(self.mlp(x))

    def cosines(self, x: Tensor) -> Tensor:
        """The last layer: ``(..., E)`` of any length -> float32 ``(..., K)``."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.normalize(x.float(), dim=-1), F.normalize(self.last.weight.float(), dim=-1))


class PrototypeHead(nn.Module):
    """Cosines of projected pixels with K prototypes.

    Args:
        channels: D of the features.
        prototypes: K.
        hidden: width of the hidden layers.
        bottleneck: E, width of the projection.
    """

    def __init__(self, channels: int, prototypes: int, hidden: int, bottleneck: int) -> None:
        super().__init__()
        self.mlp = projector(channels, hidden, bottleneck)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(prototypes, bottleneck), dim=1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features ``(B, D, h, w)`` -> embedding ``(B, E, h, w)`` and scores ``(B, K, h, w)`` in [-1, 1], float32."""
        embedding = self.mlp(x.movedim(1, -1)).movedim(-1, 1).float()
        with torch.autocast(x.device.type, enabled=False):
            return embedding, prototype_similarity(embedding, self.prototypes.float())

    @torch.no_grad()
    def normalize(self) -> None:
        """Brings the prototypes to length 1."""
        self.prototypes.copy_(F.normalize(self.prototypes, dim=1))


class Outputs(NamedTuple):
    """What a network says of n crops of one size. Where the loss has no term for a head, its outputs are empty."""

    view: Tensor  # (n, K)
    region: Tensor  # (n, N, K), of the tokens of the last stage
    tokens: Tensor  # (n, N, D), in front of the head
    pixels: Tensor  # (n, D', h, w), in front of the head
    embedding: Tensor  # (n, E, h, w)
    scores: Tensor  # (n, K, h, w)


class Heads(nn.Module):
    """The heads of a student or a teacher, those that the loss has terms for.

    Args:
        config: the method's values.
        last: channels of the encoder's last stage.
        pixels: channels of the features that the dense term reads.
    """

    def __init__(self, config: Config, last: int, pixels: int) -> None:
        super().__init__()
        widths = (config.head_hidden, config.bottleneck)
        self.view = DINOHead(last, config.view_clusters, *widths) if config.view_clusters else None
        self.region = DINOHead(last, config.region_clusters, *widths) if config.region_clusters else None
        self.pixel = PrototypeHead(pixels, config.prototypes, *widths) if config.dense_weight else None

    def clusters(self) -> list[Tensor]:
        """The last layers of the DINO heads."""
        return [head.last.weight for head in (self.view, self.region) if head is not None]

    def forward(self, last: Tensor, pixels: Tensor) -> Outputs:
        """Of the encoder's last stage ``(n, D, h, w)`` and the features of the dense term ``(n, D', h', w')``."""
        tokens = last.flatten(2).mT
        none = tokens.new_empty(0)
        view = none if self.view is None else self.view(tokens.mean(1))
        region = none if self.region is None else self.region(tokens)
        embedding, scores = (none, none) if self.pixel is None else self.pixel(pixels)
        return Outputs(view, region, tokens, pixels, embedding, scores)


@contextmanager
def masked_patches(net: Any, masks: Tensor, token: Tensor) -> Iterator[None]:
    """Puts ``token`` in the place of masked patch embeddings ``(n, h, w, C)`` while it is open.

    Args:
        net: timm network with a ``patch_embed`` that keeps its map.
        masks: bool ``(n, rows, cols)``, enlarged to the map.
        token: ``(C,)``.
    """

    def replace(module: Any, args: Any, out: Tensor) -> Tensor:
        fine = F.interpolate(masks[:, None].float(), out.shape[1:3], mode="nearest")[:, 0] > 0
        return torch.where(fine[..., None], token.to(out.dtype), out)

    hook = net.patch_embed.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


class StudentAdamW(torch.optim.AdamW):
    """AdamW as DINO steps it: something is done when the gradients are there, and something behind the step.

    Args:
        groups: parameter groups.
        lr: learning rate.
        before: called with the optimiser in front of every step.
        after: called behind it.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        before: Callable[[torch.optim.Optimizer], None],
        after: Callable[[], None],
    ) -> None:
        super().__init__(groups, lr=lr)
        self.before, self.after = before, after

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; ``closure`` computes the gradients first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.before(self)
        super().step()
        self.after()
        return loss


class MEVT(nn.Module):
    """Student, teacher, their heads and losses.

    The teacher's encoder and decoder are what is kept: ``backbone``.

    Args:
        num_classes: of the data set, whose classes are kept beside the weights; there are no labels.
        config: its values.
        weights: local file to start encoder (and decoder) from, see :func:`fastcam.nn.create_backbone`.

    Raises:
        FastcamError: values that do not fit together, or what :func:`fastcam.nn.create_backbone` refuses.
    """

    name = "mevt"
    kind = "pretraining"
    step: Tensor
    queue: Tensor
    queue_at: Tensor

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        _check(config)
        self.num_classes = num_classes
        self.config = config
        self.student_backbone = create_backbone(
            config.backbone, output_stride=32, weights=weights, frozen_norm=False, drop_path=config.drop_path
        )
        self.normalize = self.student_backbone.normalize
        with torch.no_grad():
            stages = self.student_backbone.eval().stages(torch.zeros(1, 3, 64, 64))
        last = stages[-1].shape[1]
        pixels = self.student_backbone.channels[0] if config.dense_level == "F" else last
        self.student_heads = Heads(config, last, pixels)
        self.backbone = copy.deepcopy(self.student_backbone).requires_grad_(False)
        self.heads = copy.deepcopy(self.student_heads).requires_grad_(False)
        if config.mask_weight:
            if not hasattr(self.student_backbone.net, "patch_embed"):
                raise FastcamError(
                    f"mevt: mask_weight is {config.mask_weight}, but backbone '{config.backbone}' has no patch "
                    "embedding to mask; use one such as pvt_v2_b2, or 0"
                )
            self.mask_token = nn.Parameter(torch.zeros(stages[0].shape[1]))
        clusters = {"view": config.view_clusters, "region": config.region_clusters, "mask": config.region_clusters}
        for name, size in {**clusters, "pixel": config.prototypes}.items():
            self.register_buffer(f"{name}_centre", torch.zeros(size))
        if config.dense == "densecl":
            self.register_buffer("queue", F.normalize(torch.randn(config.queue, config.bottleneck), dim=1))
            self.register_buffer("queue_at", torch.zeros((), dtype=torch.int64))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.total_steps = config.epochs
        self.train()

    def train(self, mode: bool = True) -> MEVT:
        """Sets the student's mode; the teacher stays as it is at inference."""
        super().train(mode)
        self.backbone.eval()
        self.heads.eval()
        return self

    def train_transform(
        self, crop: int, *, resize_long: Any, flip: bool, mean: Sequence[float], std: Sequence[float]
    ) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """Two large crops of side ``crop`` and the small ones; ``resize_long`` plays no part."""
        c = self.config
        return multi_crop_transform(
            crop,
            c.local_size,
            c.num_locals,
            global_scale=c.global_scale,
            local_scale=c.local_scale,
            flip=flip,
            colors=c.colors,  # type: ignore[arg-type]
            strength=c.color_strength,
            mean=mean,
            std=std,
        )

    def features(self, images: Tensor) -> list[Tensor]:
        """The teacher's pyramid of images ``(B, 3, H, W)``, finest first.

        Returns:
            With a decoder F and Y2 to Y4, ``(B, width, H / 4, W / 4)`` to ``(B, width, H / 32, W / 32)``, sides rounded
            up; without one the encoder's stages.
        """
        return self.backbone(images)

    def outputs(self, backbone: Backbone, heads: Heads, images: Tensor) -> Outputs:
        """What a network says of crops ``(n, 3, S, S)``."""
        stages = backbone.stages(images)
        if self.config.dense_level == "E4" or not self.config.dense_weight:
            return heads(stages[-1], stages[-1])
        finest = stages[0] if backbone.decoder is None else backbone.decoder(stages)[0]
        return heads(stages[-1], F.avg_pool2d(finest, 2, ceil_mode=True, count_include_pad=False))

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """View, region, dense and masked-token terms.

        Args:
            batch: ``"globals"`` ``(B, 2, 3, S, S)``, ``"locals"`` ``(B, L, 3, s, s)``, ``"boxes"`` ``(B, 2 + L, 4)``
                and ``"flips"`` ``(B, 2 + L)``, see :func:`fastcam.data.multi_crop_transform`.

        Returns:
            ``"loss"``, its terms as they count, and ``"entropy"``, see :func:`cluster_entropy`.
        """
        missing = {"globals", "locals", "boxes", "flips"} - batch.keys()
        if missing:
            raise ValueError(f"mevt.training_step: batch has no '{min(missing)}'; see MEVT.train_transform")
        c, images = self.config, len(batch["globals"])
        for heads in (self.heads, self.student_heads):
            if heads.pixel is not None:
                heads.pixel.normalize()
        large = batch["globals"].transpose(0, 1).flatten(0, 1)  # view by view, then image by image
        small = batch["locals"].transpose(0, 1).flatten(0, 1)
        with torch.no_grad():
            teacher = self.outputs(self.backbone, self.heads, large)
        masks = self._masks(large) if c.mask_weight else None
        with nullcontext() if masks is None else masked_patches(self.student_backbone.net, masks, self.mask_token):
            student = [self.outputs(self.student_backbone, self.student_heads, large)]
        if len(small):
            student.append(self.outputs(self.student_backbone, self.student_heads, small))
        half = 0.5 if c.view_clusters and c.region_clusters else 1.0
        terms: dict[str, Tensor] = {}
        entropy = large.new_zeros((), dtype=torch.float32)
        with torch.autocast(large.device.type, enabled=False):
            if c.region_clusters:
                t = self._probabilities(teacher.region, "region", c.teacher_temp, c.teacher_temp_epochs)
                terms["loss_region"] = half * self._region(student, teacher, t, images)
                entropy = cluster_entropy(t)
            if c.view_clusters:
                t = self._probabilities(teacher.view, "view", c.teacher_temp, c.teacher_temp_epochs)
                views = torch.cat([part.view for part in student]).unflatten(0, (-1, images))
                terms["loss_view"] = half * view_loss(views, t.unflatten(0, (-1, images)), c.student_temp)
                entropy = cluster_entropy(t)
            if c.dense_weight:
                terms["loss_dense"] = c.dense_weight * self._dense(student, teacher, batch)
            if masks is not None:
                t = self._probabilities(teacher.region, "mask", c.mask_temp, c.mask_temp_epochs)
                masked = masked_loss(student[0].region, t, masks.flatten(1), c.student_temp)
                terms["loss_mask"] = c.mask_weight * masked
        self.step += 1
        return {"loss": torch.stack(list(terms.values())).sum(), **terms, "entropy": entropy}

    def _probabilities(self, logits: Tensor, centre: str, temp: tuple[float, float], epochs: int) -> Tensor:
        """The teacher's probabilities at this step; the centre of that name takes the logits in behind them."""
        epoch = int(self.step) * self.config.epochs // self.total_steps
        share = min(1.0, epoch / (epochs - 1)) if epochs > 1 else 1.0
        values = self.get_buffer(f"{centre}_centre")
        probabilities = teacher_probabilities(logits, values, temp[0] + share * (temp[1] - temp[0]))
        values.copy_(updated_centre(values, logits, self.config.centre_momentum))
        return probabilities

    def _region(self, student: list[Outputs], teacher: Outputs, probabilities: Tensor, images: int) -> Tensor:
        logits = [x for part in student for x in part.region.split(images)]
        tokens = [x for part in student for x in part.tokens.split(images)]
        shown = probabilities.unflatten(0, (-1, images))
        return region_loss(logits, tokens, shown, teacher.tokens.unflatten(0, (-1, images)), self.config.student_temp)

    def _dense(self, student: list[Outputs], teacher: Outputs, batch: dict[str, Tensor]) -> Tensor:
        c = self.config
        if int(self.step) < _step_of(c.dense_epoch, self.total_steps, c.epochs):
            return teacher.tokens.new_zeros((), dtype=torch.float32)
        boxes, flips = batch["boxes"].unbind(1), batch["flips"].unbind(1)
        if c.dense == "pixpro":
            return self._pixpro(student[0], teacher, boxes, flips)
        if c.dense == "densecl":
            return self._densecl(student[0], teacher, len(boxes[0]))
        targets = self._targets(teacher.scores, len(boxes[0]))
        scores = [x for part in student for x in part.scores.split(len(boxes[0]))]
        sizes = [batch["globals"].shape[-1]] * GLOBALS + [batch["locals"].shape[-1]] * (len(scores) - GLOBALS)
        terms = []
        for g, v in ((g, v) for g in range(GLOBALS) for v in range(len(scores)) if v != g):
            here, there = overlap_boxes(boxes[g], boxes[v], sizes[g]), overlap_boxes(boxes[v], boxes[g], sizes[v])
            target = aligned(targets[g], here, flips[g], sizes[g], c.dense_grid)
            own = aligned(scores[v], there, flips[v], sizes[v], c.dense_grid)
            terms.append(dense_loss(own, target, c.student_temp))
        return torch.stack(terms).mean()

    def _targets(self, scores: Tensor, images: int) -> list[Tensor]:
        """The teacher's distributions over prototypes ``(B, K, h, w)`` of each global crop, from its scores."""
        c, rows = self.config, scores.movedim(1, -1)
        if c.dense_target == "sinkhorn":
            crops = [sinkhorn(x.flatten(0, 2), c.sinkhorn_eps, c.sinkhorn_iterations) for x in rows.split(images)]
            shown = torch.cat(crops).view(rows.shape)
        else:
            shown = self._probabilities(rows, "pixel", c.teacher_temp, c.teacher_temp_epochs)
        return list(shown.movedim(-1, 1).split(images))

    def _pixpro(self, student: Outputs, teacher: Outputs, boxes: Sequence[Tensor], flips: Sequence[Tensor]) -> Tensor:
        grid = (student.embedding.shape[2], student.embedding.shape[3])
        queries, keys = (part.embedding.flatten(2).split(len(boxes[0])) for part in (student, teacher))
        cells = [cell_centres(boxes[g], flips[g], grid) for g in range(GLOBALS)]
        terms = [
            pixpro_loss(queries[g], keys[1 - g], cells[g], cells[1 - g], self.config.pixpro_radius)
            for g in range(GLOBALS)
        ]
        return torch.stack(terms).mean()

    def _densecl(self, student: Outputs, teacher: Outputs, images: int) -> Tensor:
        queries, keys = (part.embedding.flatten(2).split(images) for part in (student, teacher))
        fronts, backs = (part.pixels.flatten(2).mT.split(images) for part in (student, teacher))
        terms = []
        for g in range(GLOBALS):
            match = region_match(fronts[g], backs[1 - g])
            terms.append(densecl_loss(queries[g], keys[1 - g], match, self.queue, self.config.queue_temp))
        means = F.normalize(F.normalize(torch.cat(keys), dim=1).mean(2), dim=1)[: len(self.queue)]
        slots = (self.queue_at + torch.arange(len(means), device=means.device)) % len(self.queue)
        self.queue = self.queue.index_copy(0, slots, means)  # a new tensor: the gradient still needs the old one
        self.queue_at.copy_((self.queue_at + len(means)) % len(self.queue))
        return torch.stack(terms).mean()

    def _masks(self, large: Tensor) -> Tensor:
        """Masks ``(n, rows, cols)`` of the large crops on the grid of the last stage."""
        grid = (-(-large.shape[2] // 32), -(-large.shape[3] // 32))
        return block_masks(len(large), grid, self.config.mask_ratio, self.config.mask_chance).to(large.device)

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """DINO's recipe: AdamW with a warm-up and a cosine, growing weight decay, gradients clipped one by one.

        Biases and other vectors are not decayed. Behind every step the teacher follows the student.
        """
        c = self.config
        self.total_steps = total_steps
        named = [(name, p) for name, p in self.named_parameters() if p.requires_grad]
        free = [p for name, p in named if p.ndim == 1 or name.endswith(".bias")]
        decayed = [p for name, p in named if not (p.ndim == 1 or name.endswith(".bias"))]
        frozen = self.student_heads.clusters()
        thaw = _step_of(c.freeze_last_epochs, total_steps, c.epochs)
        warmup = _step_of(c.warmup_epochs, total_steps, c.epochs)

        def before(optimizer: torch.optim.Optimizer) -> None:
            at = int(self.step) - 1  # the loss of this step has been computed
            optimizer.param_groups[0]["weight_decay"] = cosine_schedule(at, total_steps, *c.weight_decay)
            clip_each([*decayed, *free], c.clip)
            if at < thaw:
                for p in frozen:
                    p.grad = None

        def after() -> None:
            momentum = cosine_schedule(int(self.step) - 1, total_steps, c.teacher_momentum, 1.0)
            update_teacher(self.backbone, self.student_backbone, momentum)
            update_teacher(self.heads, self.student_heads, momentum)

        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
        optimizer = StudentAdamW(groups, c.lr, before, after)

        def factor(step: int) -> float:
            return cosine_schedule(step, total_steps, c.lr, c.min_lr, warmup=warmup) / c.lr

        return [(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor))]

    def export_state_dict(self) -> dict[str, Tensor]:
        """The teacher's encoder and decoder."""
        return {k: v for k, v in self.state_dict().items() if k.startswith(TRUNK)}


def _step_of(epoch: int, total_steps: int, epochs: int) -> int:
    """The first step of an epoch."""
    return -(-epoch * total_steps // epochs)


def _check(c: Config) -> None:
    """Refuses values by name."""
    choices = {"dense": DENSE, "dense_level": LEVELS, "dense_target": TARGETS, "colors": COLORS}
    for name, allowed in choices.items():
        if getattr(c, name) not in allowed:
            raise FastcamError(f"mevt: {name} is '{getattr(c, name)}', expected one of {', '.join(allowed)}")
    for name in ("global_scale", "local_scale"):
        scale = getattr(c, name)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise FastcamError(f"mevt: {name} is {scale}, expected the smallest and the largest area in 0..1")
    for name in ("teacher_temp", "mask_temp", "weight_decay"):
        values = getattr(c, name)
        if len(values) != 2 or min(values) < 0 or (name != "weight_decay" and min(values) == 0):
            raise FastcamError(f"mevt: {name} is {values}, expected two numbers above 0, of the start and the end")
    positive = ("student_temp", "sinkhorn_eps", "queue_temp", "lr", "clip", "epochs")
    sizes = ("dense_grid", "prototypes", "queue", "head_hidden", "bottleneck", "local_size")
    for name in positive + sizes:
        if not getattr(c, name) > 0:
            raise FastcamError(f"mevt: {name} is {getattr(c, name)}, expected a positive number")
    counts = ("view_clusters", "region_clusters", "num_locals", "warmup_epochs", "sinkhorn_iterations")
    for name in (*counts, "dense_weight", "mask_weight", "color_strength"):
        if getattr(c, name) < 0:
            raise FastcamError(f"mevt: {name} is {getattr(c, name)}, expected 0 or more")
    for name in ("mask_ratio", "mask_chance", "centre_momentum", "teacher_momentum", "drop_path"):
        if not 0 <= getattr(c, name) <= 1:
            raise FastcamError(f"mevt: {name} is {getattr(c, name)}, expected 0 to 1")
    if not (c.view_clusters or c.region_clusters or c.dense_weight):
        raise FastcamError("mevt: view_clusters, region_clusters and dense_weight are all 0; there is nothing to learn")
    if c.mask_weight and not c.region_clusters:
        raise FastcamError("mevt: mask_weight needs the region head; set region_clusters, or mask_weight to 0")
