"""AMDIM: pre-training on images alone, by agreement between the features of two views of an image at three scales.

P. Bachman, R. D. Hjelm, W. Buchwalter, "Learning Representations by Maximizing Mutual Information Across Views",
NeurIPS 2019, https://arxiv.org/abs/1906.00910 (code github.com/Philip-Bachman/amdim-public, MIT). First stage of
SSL-few-shot (D. Chen et al., ICASSP 2021, https://arxiv.org/abs/1911.06045), whose values are the defaults;
:mod:`fastcam.methods.ssl_few_shot` is the second.

Deviations from the authors' code:

- The scores are never stored: :func:`multilocation_nce` computes them block by block, and again for its gradient.
- With several processes every image of the whole batch is a negative of every other, as theirs; their first device is
  not left out.
- The tensors of the batch norms that their encoder never uses do not exist here.
- The classifiers that they train on the side, to look at, are off by default (``online_classifiers``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from fastcam.errors import FastcamError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SIDES = (7, 5, 1)  # of the maps that the encoder gives
CENTER = 146 / 128  # an image is resized to this multiple of the input before its centre is cut out


@dataclass(frozen=True)
class EncoderConfig:
    """The encoder of both stages: input side, width w, channels r of the last map, units a block."""

    size: int = 128
    width: int = 192
    rkhs: int = 1536
    depth: int = 8
    resize: float = CENTER  # 1: the image as a whole, for images without a margin


@dataclass(frozen=True)
class Config(EncoderConfig):
    """The values of the paper's pre-training."""

    clip: float = 20.0
    penalty: float = 0.05
    lr: float = 2e-4
    betas: tuple[float, float] = (0.8, 0.999)
    weight_decay: float = 1e-5
    warmup: int = 500  # steps
    drops: tuple[float, ...] = (30 / 50, 45 / 50)  # of the training; (250 / 300, 280 / 300) for small sets
    drop_factor: float = 0.2
    augment: str = "crop"  # or "shift", for images of 32 pixels
    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_ratio: tuple[float, float] = (0.7, 1.4)
    jitter: tuple[float, ...] = (0.4, 0.4, 0.4, 0.1)  # () for none
    grayscale: float = 0.25
    online_classifiers: bool = False
    grad_clip: float | None = None


class Maps(NamedTuple):
    """Features of a view where views are compared: ``(B, r, 1, 1)``, ``(B, r, 5, 5)``, ``(B, r, 7, 7)``."""

    r1: Tensor
    r5: Tensor
    r7: Tensor


def _scores(source: Tensor, target: Tensor, clip: float, block: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """Raw and clipped scores ``(n, m, L)`` of m images at a time, with the first image's number and its features."""
    count, places, channels = target.shape
    images = max(1, block // max(1, len(source) * places))
    for first in range(0, count, images):
        rows = target[first : first + images].reshape(-1, channels)
        raw = (source @ rows.T).div_(math.sqrt(channels)).unflatten(1, (-1, places))
        yield first, rows, raw, (raw / clip).tanh_().mul_(clip)


def _own(scores: Tensor, first: int, offset: int) -> tuple[slice, Tensor]:
    """Which sources have their own image in a block, and a view ``(L, rows)`` of their scores there."""
    low = max(first, offset)
    high = max(low, min(first + scores.shape[1], offset + len(scores)))
    rows = slice(low - offset, high - offset)
    return rows, scores[rows, low - first : high - first].diagonal()


class _NCE(torch.autograd.Function):
    """Keeps the positives and one logsumexp a row; computes the blocks of scores again in backward."""

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, target: Tensor, clip: float, offset: int, block: int
    ) -> tuple[Tensor, Tensor]:
        positives = source.new_empty(len(source), target.shape[1])
        others = source.new_full((len(source),), -math.inf)
        squares = source.new_zeros(())
        for first, _, raw, scores in _scores(source, target, clip, block):
            squares += raw.square_().sum()
            rows, own = _own(scores, first, offset)
            positives[rows] = own.T
            own.fill_(-math.inf)
            others = torch.logaddexp(others, scores.flatten(1).logsumexp(1))
        ctx.save_for_backward(source, target, positives, others)
        ctx.constants = clip, offset, block
        loss = (torch.logaddexp(positives, others[:, None]) - positives).mean()
        return loss, squares / (len(source) * target.shape[0] * target.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_square: Tensor) -> tuple[Tensor | None, ...]:
        source, target, positives, others = ctx.saved_tensors
        clip, offset, block = ctx.constants
        weight = grad_loss / positives.numel()
        log_z = torch.logaddexp(positives, others[:, None])
        grad_positive = weight * (positives - log_z).expm1_()
        # every negative has a part in the L sums of its row: e^s sum_l 1 / Z_l, without leaving the range of floats
        pull = weight * (others[:, None] - log_z).exp_().sum(1)
        spread = 2 * grad_square / (len(source) * target.shape[0] * target.shape[1])
        grad_source, grad_target = torch.zeros_like(source), torch.empty_like(target)
        for first, features, raw, scores in _scores(source, target, clip, block):
            grad = (scores - others[:, None, None]).exp_().mul_(pull[:, None, None])
            rows, own = _own(grad, first, offset)
            own.copy_(grad_positive[rows].T)
            grad.mul_(1 - (scores / clip).square_()).add_(raw.mul_(spread))
            flat = grad.div_(math.sqrt(source.shape[1])).flatten(1)
            grad_source.addmm_(flat, features)
            grad_target[first : first + raw.shape[1]] = (flat.T @ source).unflatten(0, (-1, target.shape[1]))
        return grad_source, grad_target, None, None, None


def multilocation_nce(
    source: Tensor, target: Tensor, *, clip: float = 20.0, offset: int = 0, block: int = 2**20
) -> tuple[Tensor, Tensor]:
    r"""Tells the places of an image's other view from the places of other images.

    .. math:: L = -\frac{1}{n L} \sum_{i,l} \Big( p_{il} - \log\big(e^{p_{il}} + \sum_{j \ne i} \sum_m e^{s_{ijm}}
              \big) \Big), \quad s_{ijm} = c \tanh \frac{f_i \cdot g_{jm}}{c \sqrt{r}}, \quad p_{il} = s_{iil}

    Other places of the same image are neither positive nor negative. AMDIM's loss of one pair of scales; float32 sums
    (float64 for float64) also under autocast. Differentiable once, in both.

    Cost: ``n B L r`` multiply-adds, four times that with the gradient. Memory: blocks of scores, not all ``n B L``;
    for the gradient ``n (L + 1)`` numbers besides the features.

    Args:
        source: f, ``(n, r)``: images ``offset`` to ``offset + n`` of the targets.
        target: g, ``(B, r, h, w)``; L = h w.
        clip: c.
        offset: number of the first source's image, where the targets of several processes are compared.
        block: scores held at a time; one image's ``n L`` at least.

    Returns:
        The loss, 0 to ``log(1 + (B - 1) L exp(2 c))``, 0 for a single image; and the mean of ``(f g)^2 / r`` over all
        i, j, l, unclipped, which AMDIM adds with weight 0.05.

    Raises:
        ValueError: other shapes, sources that are not among the targets, no image, or a clip that is not positive.
        TypeError: other than floats of one dtype.

    Example:
        >>> loss, square = multilocation_nce(torch.zeros(3, 8), torch.zeros(3, 8, 5, 5))
        >>> round(loss.exp().item())  # equal scores: 1 + 2 x 25
        51
    """
    name = "multilocation_nce"
    if source.ndim != 2 or target.ndim != 4 or source.shape[1] != target.shape[1]:
        raise ValueError(
            f"{name}: expected source (n, r), target (B, r, h, w), got {tuple(source.shape)}, {tuple(target.shape)}"
        )
    if source.numel() == 0 or target.numel() == 0 or offset < 0 or offset + len(source) > len(target):
        raise ValueError(
            f"{name}: expected 1 or more images of which sources are {offset} to {offset + len(source)}, got "
            f"{len(target)} targets of shape {tuple(target.shape[1:])}"
        )
    if clip <= 0 or block < 1:
        raise ValueError(f"{name}: expected clip above 0 and block of 1 or more, got {clip}, {block}")
    if not (source.is_floating_point() and source.dtype == target.dtype):
        raise TypeError(f"{name}: expected floats of one dtype, got {source.dtype}, {target.dtype}")
    dtype = torch.promote_types(source.dtype, torch.float32)
    with torch.autocast(source.device.type, enabled=False):
        places = target.to(dtype).flatten(2).transpose(1, 2)
        loss, square = _NCE.apply(source.to(dtype), places, clip, offset, block)
    return loss, square


class _Gather(torch.autograd.Function):
    """The tensors of all processes in turn; the gradient of an image sums what all processes know of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(parts, x)
        return torch.cat(parts)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous()
        torch.distributed.all_reduce(grad)
        return grad[torch.distributed.get_rank() * ctx.rows :][: ctx.rows]


def amdim_losses(
    first: Maps, second: Maps, places: tuple[Tensor, Tensor], *, clip: float = 20.0, penalty: float = 0.05
) -> dict[str, Tensor]:
    """AMDIM's objective for two views of the same images: 1 to 5, 1 to 7 and 5 to 5, each in both directions.

    Where torch's processes are connected, the images of all of them are negatives; all must bring equally many.

    Args:
        first: the maps of a view.
        second: those of the other view.
        places: int64 ``(B,)`` of 0 to 24 for each view: where the source of 5 to 5 lies in its r5.
        clip: bound of the scores.
        penalty: weight of the mean squared score.

    Returns:
        ``"loss"``, the sum of the further entries ``"loss_1t5"``, ``"loss_1t7"``, ``"loss_5t5"`` and ``"loss_reg"``.
    """
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    offset = torch.distributed.get_rank() * len(first.r1) if several else 0
    parts = dict.fromkeys(("loss_1t5", "loss_1t7", "loss_5t5", "loss_reg"), first.r1.new_zeros((), dtype=torch.float32))
    for source, target, place in ((first, second, places[0]), (second, first, places[1])):
        r5, r7 = (_Gather.apply(x.contiguous()) if several else x for x in (target.r5, target.r7))
        one = source.r1.flatten(1)
        five = source.r5.flatten(2)[torch.arange(len(one), device=one.device), :, place]
        for name, f, g in (("loss_1t5", one, r5), ("loss_1t7", one, r7), ("loss_5t5", five, r5)):
            loss, square = multilocation_nce(f, g, clip=clip, offset=offset)
            parts[name] = parts[name] + 0.5 * loss
            parts["loss_reg"] = parts["loss_reg"] + 0.5 * penalty * square
    return {"loss": torch.stack(list(parts.values())).sum(), **parts}


class ResidualUnit(nn.Module):
    """``conv2(ReLU(conv1 x))`` plus the average-pooled input, whose missing channels are 0; starts as that skip path.

    Args:
        channels: of the input.
        out: of the output, not fewer.
        kernel: of conv1 and of the pooling, without padding; conv2 is 1 x 1.
        stride: of both.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, kernel, stride, bias=False)
        self.conv2 = nn.Conv2d(out, out, 1, bias=False)
        self.kernel, self.stride = kernel, stride
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, h, w)`` -> ``(B, out, h', w')``."""
        y = self.conv2(F.relu(self.conv1(x)))
        skip = x if self.kernel == self.stride == 1 else F.avg_pool2d(x, self.kernel, self.stride)
        if skip.shape == y.shape:
            return y.add_(skip)
        y[:, : skip.shape[1]] += skip
        return y


def residual_block(channels: int, out: int, kernel: int, stride: int, depth: int) -> nn.Sequential:
    """A unit of the given kernel and ``depth - 1`` of 1 x 1."""
    units = [ResidualUnit(channels, out, kernel, stride)]
    return nn.Sequential(*units, *(ResidualUnit(out, out, 1, 1) for _ in range(depth - 1)))


_BLOCKS = {  # side of the input: blocks between the first layers and the last unit, as (multiple of w, kernel, stride)
    32: ((2, 4, 2), (4, 2, 2), (4, 3, 1), (4, 3, 1)),
    64: ((2, 4, 2), (4, 4, 2), (8, 2, 2), (8, 3, 1), (8, 3, 1)),
    128: ((2, 4, 2), (4, 4, 2), (8, 2, 2), (8, 3, 1), (8, 3, 1)),
}


class Encoder(nn.Module):
    """AMDIM's network for images of 32, 64 or 128 pixels; every unit starts as its skip path.

    No batch norm but the last layer, and no ReLU behind a sum. With the defaults 194.2 million parameters and 11.4
    billion multiply-adds an image.

    Args:
        config: side, width, channels and depth.

    Raises:
        FastcamError: a side that AMDIM has no encoder for, or fewer channels behind a layer than before it.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        size, w, r = config.size, config.width, config.rkhs
        if size not in _BLOCKS:
            raise FastcamError(f"amdim: size is {size}, expected 32, 64 or 128; there are no other encoders")
        wide = _BLOCKS[size][-1][0] * w
        if w < 1 or config.depth < 1 or r < wide:
            raise FastcamError(
                f"amdim: width is {w}, depth {config.depth} and rkhs {r}, expected width and depth of at least 1 and "
                f"rkhs of at least {wide}, the channels before it"
            )
        layers: list[nn.Module] = {
            32: lambda: [nn.Conv2d(3, w, 3), nn.ReLU(), ResidualUnit(w, w, 1, 1)],
            64: lambda: [nn.Conv2d(3, w, 3), nn.ReLU()],
            128: lambda: [
                nn.Conv2d(3, w, 5, 2, padding=2, padding_mode="reflect"),
                nn.ReLU(),
                nn.Conv2d(w, w, 3),
                nn.ReLU(),
            ],
        }[size]()
        channels = w
        for multiple, kernel, stride in _BLOCKS[size]:
            layers.append(residual_block(channels, multiple * w, kernel, stride, config.depth))
            channels = multiple * w
        self.layers = nn.Sequential(*layers, ResidualUnit(channels, r, 3, 1), nn.BatchNorm2d(r))
        self.size = size
        self.channels = (channels, channels, r)

    def forward(self, images: Tensor) -> list[Tensor]:
        """``(B, 3, S, S)`` -> maps of 7, 5 and 1 pixels: ``(B, 8 w, 7, 7)``, ``(B, 8 w, 5, 5)``, ``(B, r, 1, 1)``.

        (4 w channels for images of 32 pixels.) Of several layers of one size the last counts.

        Raises:
            ValueError: images of another shape.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != (3, self.size, self.size):
            raise ValueError(
                f"amdim: expected images (B, 3, {self.size}, {self.size}), got {tuple(images.shape)}; resize them"
            )
        maps: dict[int, Tensor] = {}
        x = images
        for layer in self.layers:
            x = layer(x)
            if x.shape[-1] in SIDES:
                maps[x.shape[-1]] = x
        return [maps[side] for side in SIDES]


class RKHSHead(nn.Module):
    """Brings a map to the r channels of the comparison: a 1 x 1 network beside a nearly plain copy, batch norm."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, out, 1)
        self.norm = nn.BatchNorm2d(out)
        nn.init.zeros_(self.conv2.weight)
        with torch.no_grad():
            self.shortcut.weight.uniform_(-0.01, 0.01)
            self.shortcut.weight[:, :, 0, 0].fill_diagonal_(1)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, channels, h, w)`` -> ``(B, out, h, w)``."""
        return self.norm(self.conv2(F.relu(self.conv1(x))) + self.shortcut(x))


class OnlineClassifiers(nn.Module):
    """A linear and a hidden-layer classifier of the embedding, to look at while the encoder trains without labels.

    Args:
        channels: r.
        num_classes: K.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, num_classes)
        hidden = nn.Linear(channels, 1024, bias=False)
        self.mlp = nn.Sequential(hidden, nn.BatchNorm1d(1024), nn.ReLU(), nn.Dropout(0.2), nn.Linear(1024, num_classes))

    def forward(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``(B, K)`` of both; no gradient reaches the ``(B, r)`` embedding."""
        x = embedding.detach()
        return self.linear(x), self.mlp(x)


def classifier_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of logits softly bounded to -10 .. 10, and 1e-3 of their mean square; labels -1 do not count."""
    bounded = 10 * (logits / 10).tanh()
    known = (labels >= 0).sum().clamp(min=1)
    return F.cross_entropy(bounded, labels, ignore_index=-1, reduction="sum") / known + 1e-3 * logits.square().mean()


def embedding_transform(config: EncoderConfig, *, flip: bool = False) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The encoder's input from an image of any size: shorter side to ``resize * size`` (bicubic), its centre, norm.

    Items get ``"image"`` float32 ``(3, size, size)``.
    """
    from fastcam.data.transforms import center_transform

    resized = round(config.resize * config.size)
    return center_transform(config.size, resize=resized, flip=flip, mean=IMAGENET[0], std=IMAGENET[1])


def check_side(name: str, crop: int, config: EncoderConfig) -> None:
    """Refuses crops of another size than the encoder's.

    Raises:
        FastcamError: they differ, or ``resize`` is below 1.
    """
    if crop != config.size:
        raise FastcamError(
            f"{name}: trainer.crop is {crop}, but the encoder sees {config.size} pixels; make them equal"
        )
    if config.resize < 1:
        raise FastcamError(f"{name}: resize is {config.resize}, expected 1 or more")


class AMDIM(nn.Module):
    """The encoder, its heads and its recipe.

    Args:
        num_classes: of the online classifiers; nothing else depends on it.
        config: its values.
        weights: those of a trained AMDIM or SSL-few-shot, whose encoder is taken.

    Raises:
        FastcamError: values that do not fit together, or weights that do not fit.
    """

    name = "amdim"
    kind = "pretraining"
    normalize = IMAGENET

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        if config.augment not in ("crop", "shift"):
            raise FastcamError(f"amdim: augment is '{config.augment}', expected crop or shift")
        if len(config.jitter) not in (0, 4):
            raise FastcamError(
                f"amdim: jitter has {len(config.jitter)} numbers, expected brightness, contrast, saturation and hue, "
                "or none"
            )
        if config.clip <= 0:
            raise FastcamError(f"amdim: clip is {config.clip}, expected more than 0")
        self.config = config
        self.encoder = Encoder(config)
        self.head7, self.head5 = (RKHSHead(channels, config.rkhs) for channels in self.encoder.channels[:2])
        self.classifiers = OnlineClassifiers(config.rkhs, num_classes) if config.online_classifiers else None
        if weights is not None:
            load_encoder(self.encoder, config, weights)

    def features(self, images: Tensor) -> list[Tensor]:
        """The encoder's maps, finest first: 7 x 7, 5 x 5 and 1 x 1 pixels, see :class:`Encoder`."""
        return self.encoder(images)

    def embed(self, images: Tensor) -> Tensor:
        """``(B, 3, S, S)`` -> ``(B, r)``: the last map."""
        return self.encoder(images)[-1].flatten(1)

    def maps(self, images: Tensor) -> Maps:
        """What views are compared by."""
        map7, map5, map1 = self.encoder(images)
        return Maps(map1, self.head5(map5), self.head7(map7))

    def train_transform(
        self, crop: int, *, resize_long: Any, flip: bool, mean: Sequence[float], std: Sequence[float]
    ) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """Two views of every image, mirrored alike; ``resize_long`` plays no part."""
        from fastcam.data.transforms import twin_transform

        c = self.config
        check_side(self.name, crop, c)
        jitter = c.jitter if c.jitter else None
        box = {"scale": c.crop_scale, "ratio": c.crop_ratio} if c.augment == "crop" else {"shift": 4}
        return twin_transform(crop, **box, jitter=jitter, grayscale=c.grayscale, flip=flip, mean=mean, std=std)

    def test_transform(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """Of items that are embedded."""
        return embedding_transform(self.config)

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The objective of a batch.

        Args:
            batch: ``"image"`` and ``"second"``, two views ``(B, 3, S, S)`` of every image; for the online classifiers
                ``"tags"`` ``(B, C)``, one an image; images without a tag do not count there.

        Returns:
            As :func:`amdim_losses`; with online classifiers also ``"loss_classifiers"``, part of ``"loss"``, and the
            shares of right answers ``"accuracy_linear"`` and ``"accuracy_mlp"``.
        """
        if "second" not in batch:
            raise ValueError("amdim.training_step: expected a second view batch['second']; see AMDIM.train_transform")
        images = len(batch["image"])
        if images < 2 and self.training:
            raise FastcamError("amdim: one image a step has no negatives and no batch norm; raise trainer.batch_size")
        first, second = self.maps(batch["image"]), self.maps(batch["second"])
        places = torch.randint(25, (2, images)).to(first.r1.device)
        scalars = amdim_losses(
            first, second, (places[0], places[1]), clip=self.config.clip, penalty=self.config.penalty
        )
        if self.classifiers is None:
            return scalars
        if "tags" not in batch:
            raise FastcamError("amdim: online_classifiers need the images' tags; give data.tags, or set it false")
        tags = batch["tags"].repeat(2, 1)
        labels = tags.argmax(1).masked_fill(tags.amax(1) <= 0, -1)
        both = self.classifiers(torch.cat([first.r1, second.r1]).flatten(1))
        loss = torch.stack([classifier_loss(logits, labels) for logits in both]).sum()
        right = [(logits.argmax(1) == labels).sum() / (labels >= 0).sum().clamp(min=1) for logits in both]
        named = {"loss_classifiers": loss, "accuracy_linear": right[0], "accuracy_mlp": right[1]}
        return {**scalars, "loss": scalars["loss"] + loss, **named}

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """Adam, whose rate rises over the first steps and falls at ``drops``."""
        c = self.config
        optimizer = torch.optim.Adam(self.parameters(), c.lr, c.betas, weight_decay=c.weight_decay)
        at = [round(share * total_steps) for share in c.drops]

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / max(1, c.warmup)) * c.drop_factor ** sum(step >= drop for drop in at)

        return [(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate))]

    def export_state_dict(self) -> dict[str, Tensor]:
        """All of the state but the classifiers, which only look on."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("classifiers.")}


def load_encoder(encoder: Encoder, config: EncoderConfig, path: str | Path) -> None:
    """Fills an encoder from the weights of a trained AMDIM or SSL-few-shot.

    Raises:
        FastcamError: other weights, or an encoder of another size, width, depth or number of channels.
    """
    from fastcam.io import load_weights

    state, saved = load_weights(path)
    if saved.get("method") not in ("amdim", "ssl_few_shot"):
        raise FastcamError(
            f"weights '{path}': are of {saved.get('method', 'an unknown network')}, expected those that fastcam train "
            "wrote for amdim or ssl_few_shot"
        )
    for field in ("size", "width", "rkhs", "depth"):
        if saved["config"][field] != getattr(config, field):
            raise FastcamError(
                f"weights '{path}': {field} is {saved['config'][field]}, but method.{field} is "
                f"{getattr(config, field)}; make them equal"
            )
    encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in state.items() if k.startswith("encoder.")})
