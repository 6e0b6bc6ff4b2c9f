"""CTI: class tokens infusion.

S.-H. Yoon, H. Kwon, H. Kim, K.-J. Yoon, "Class Tokens Infusion for Weakly Supervised Semantic Segmentation", CVPR
2024, pp. 3595-3605. Authors' code: github.com/yoon307/CTI, built on MCTformer.

A vision transformer carries one token per class and one for the background. What a class token attends to, times the
map of a classifier on the patches, is the class's activation map; the attention among patches spreads it. Two losses
mix class tokens of another augmentation of the image (I-CTI) and of other images of the class (C-CTI) into the middle
of the network and ask for the same maps; a third makes the background token's map the complement of the foreground.

The paper describes C-CTI with a third image, its code with a memory of 30 tokens a class; this follows the code.
Deviations from the code: the infused pass of C-CTI waits until its loss counts (the code computes and drops it); the
final layer norm, whose output nothing reads, is left out; the augmentation is ours. See ``docs/methods/cti.md``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.nn import CamFusion, FusedCams
from fastcam.ops.attention_maps import attention_maps

MAPS = ("cam", "fused", "refined")
TRUNK = "backbone."  # where a trained method keeps its transformer
UNREAD = {"pos_embed", "norm.weight", "norm.bias"}  # tensors of a classifier that CTI has no use for


@dataclass(frozen=True)
class Config:
    """The values of the authors' VOC 2012 run."""

    backbone: str = "deit_small_patch16_224"
    image_size: int = 224  # side that the positions are learned for
    patch_size: int | None = None  # this and the next three: None for the backbone's own
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    drop_path: float = 0.1
    infusion_block: int = 3  # tokens leave behind this block, counted from 0, and are mixed in before the next
    cam_blocks: int = 6  # the last so many blocks' class attention makes the maps in training
    bg_loss: float = 0.1
    intra_loss: float = 1.0
    cross_loss: float = 1.0
    detach_foreground: bool = False  # of L_bg: no gradient to the foreground's maps but through the attention (COCO)
    start_epoch: int = 0  # first epoch of these three losses
    memory_size: int = 30
    maps: str = "refined"  # what inference gives: "cam", "fused" (times attention), "refined" (times affinity too)
    lr: float = 6.25e-5  # 5e-4 * batch / 512 at batch 64
    min_lr: float = 1e-5
    warmup_lr: float = 1e-6
    warmup_epochs: int = 5
    epochs: int = 60  # that the schedule divides the training into
    weight_decay: float = 0.05
    crop_scale: tuple[float, ...] = (0.3, 1.2)  # area of a crop, as a share of the image's
    grad_clip: float | None = None


def minmax_normalize(maps: Tensor, eps: float = 1e-5) -> Tensor:
    r"""Every map between its smallest and its largest value, into [0, 1).

    .. math:: \mathrm{norm}(m) = \frac{\mathrm{ReLU}(u - \min u - \epsilon)}{\max u - \min u + \epsilon}, \quad
              u = \mathrm{ReLU}(m)

    Args:
        maps: ``(..., H, W)``.
        eps: positive.

    Returns:
        The same shape; a constant map, or one without positive values, gives 0 everywhere. Of equal smallest or
        largest values one alone gets their gradient.

    Example:
        >>> minmax_normalize(torch.tensor([[1.0, 3.0], [2.0, 1.0]])).round(decimals=3)
        tensor([[0.0000, 1.0000],
                [0.5000, 0.0000]])
    """
    u = F.relu(maps).flatten(-2)
    low, high = u.min(dim=-1, keepdim=True).values, u.max(dim=-1, keepdim=True).values
    return (F.relu(u - low - eps) / (high - low + eps)).view(maps.shape)


def infuse(tokens: Tensor, sources: Tensor) -> Tensor:
    """Mean of tokens and what is infused into them.

    Args:
        tokens: ``(B, C + 1, D)``, the background's first.
        sources: ``(B, C + 1, D)``, or ``(B, C, D)`` to leave the background's token as it is.

    Returns:
        ``(B, C + 1, D)``.
    """
    kept = tokens.shape[1] - sources.shape[1]
    return torch.cat([tokens[:, :kept], (tokens[:, kept:] + sources) / 2], dim=1)


def cross_sources(tokens: Tensor, memory: Tensor, tags: Tensor) -> Tensor:
    """What C-CTI infuses: the memory's mean for classes that the image has, the image's own tokens for others.

    Args:
        tokens: class tokens ``(B, C, D)`` without the background's.
        memory: ``(C, D)``.
        tags: ``(B, C)``.

    Returns:
        ``(B, C, D)``, without gradient.
    """
    present = tags[:, :, None]
    return ((1 - present) * tokens + present * memory).detach()


def refine_cams(affinity: Tensor, maps: Tensor) -> Tensor:
    """Maps ``(B, K, h, w)`` spread along the affinity of patches ``(B, h w, h w)``, rows first: ``P f``."""
    return (affinity @ maps.flatten(2).mT).mT.reshape(maps.shape)


def background_loss(
    cams: Tensor, class_maps: Tensor, affinity: Tensor, tags: Tensor, *, detach_foreground: bool = False
) -> Tensor:
    r"""L_bg before its factor: foreground and background are complements.

    .. math:: \operatorname{mean} |1 - \mathrm{norm}(P F) - \mathrm{norm}(P G)|, \quad F = \max_{c : y_c = 1} M_c\,
              \mathrm{cam}_c, \quad G = M_0\, \mathrm{cam}_0

    Args:
        cams: ReLU'd maps ``(B, C + 1, h, w)``, background first.
        class_maps: M, attention of the class tokens to the patches, of the same shape.
        affinity: P, attention among the patches, ``(B, h w, h w)``.
        tags: ``(B, C)``; absent classes give 0.
        detach_foreground: stop the gradient to ``cams`` inside F.

    Returns:
        A scalar in the dtype of ``cams``; products and norms are taken in float64.
    """
    foreground = (cams.detach() if detach_foreground else cams)[:, 1:] * class_maps[:, 1:]
    foreground = (foreground * tags[:, :, None, None]).max(dim=1, keepdim=True).values
    pair = torch.cat([foreground, cams[:, :1] * class_maps[:, :1]], dim=1)
    refined = minmax_normalize(refine_cams(affinity.double(), pair.double()))
    return (1 - refined.sum(dim=1)).abs().mean().to(cams.dtype)


def consistency_loss(clean: Tensor, infused: Tensor) -> Tensor:
    """L_intra and L_cross before their factors: mean distance of normalised maps ``(B, K, h, w)``."""
    return (minmax_normalize(clean) - minmax_normalize(infused)).abs().mean()


class ClassTokenMemory(nn.Module):
    """The newest tokens of every class, layer-normalised: C-CTI's source of other images.

    Its buffers belong to checkpoints, for exact resuming, and not to trained weights. In distributed training every
    process goes on from the first one's memory.

    Args:
        num_classes: C.
        size: tokens kept for each class.
        dim: D.
    """

    tokens: Tensor
    count: Tensor

    def __init__(self, num_classes: int, size: int, dim: int) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("tokens", torch.zeros(num_classes, size, dim))  # a ring for each class
        self.register_buffer("count", torch.zeros(num_classes, dtype=torch.int64))  # ever stored

    @torch.no_grad()
    def append(self, tokens: Tensor, tags: Tensor) -> None:
        """Stores the tokens ``(B, C, D)`` of the classes that images have, by ``tags (B, C)``, in their order."""
        present = tags > 0
        order = present.cumsum(0) - 1
        image, k = (present & (order >= present.sum(0) - self.size)).nonzero(as_tuple=True)
        normalized = F.layer_norm(tokens[image, k].float(), tokens.shape[-1:])
        self.tokens[k, (self.count + order)[image, k] % self.size] = normalized
        self.count += present.sum(0)

    def mean(self) -> Tensor:
        """Mean of what every class has stored, ``(C, D)``; 0 for a class without tokens."""
        return self.tokens.sum(dim=1) / self.count.clamp(1, self.size)[:, None]

    def full(self) -> bool:
        """Whether every class has as many tokens as it may keep."""
        return bool((self.count >= self.size).all())


class Output(NamedTuple):
    """What the transformer computes for a batch.

    ``class_logits`` and ``patch_logits`` ``(B, C)``; ``cams`` ``(B, C + 1, h, w)``, the patch classifier's maps after
    a ReLU, background first; ``tokens`` ``(B, C + 1, D)`` behind the infusion block; ``attention``: for every first
    block asked for, the head-mean attention to the patches summed from there on, ``(B, rows, h w)``.
    """

    class_logits: Tensor
    patch_logits: Tensor
    cams: Tensor
    tokens: Tensor
    attention: dict[int, Tensor]

    def class_maps(self, first: int) -> Tensor:
        """Attention of the class tokens to the patches from block ``first`` on, ``(B, C + 1, h, w)``."""
        return self.attention[first][:, : self.cams.shape[1]].reshape(self.cams.shape)

    def affinity(self, first: int) -> Tensor:
        """Attention among the patches from block ``first`` on, ``(B, h w, h w)``."""
        return self.attention[first][:, self.cams.shape[1] :]


class MultiTokenViT(nn.Module):
    """A timm vision transformer with a token for every class and for the background, and a classifier on its patches.

    Parameters have the names of the authors' checkpoints.

    Args:
        num_classes: number of foreground classes C.
        config: of the method.
        weights: as for :class:`CTI`.

    Raises:
        FastcamError: a network that timm does not know, or no plain vision transformer; weights that do not fit.
    """

    def __init__(self, num_classes: int, config: Config, weights: str | Path | None = None) -> None:
        super().__init__()
        net = _create_vit(config)
        depth, dim, extra = len(net.blocks), net.embed_dim, num_classes + 1
        if not 0 <= config.infusion_block <= depth - 2:
            raise FastcamError(f"cti: infusion_block is {config.infusion_block}, expected 0 to {depth - 2}")
        if not 1 <= config.cam_blocks <= depth:
            raise FastcamError(f"cti: cam_blocks is {config.cam_blocks}, expected 1 to {depth}")
        self.normalize = (tuple(net.default_cfg["mean"]), tuple(net.default_cfg["std"]))
        self.grid_size = tuple(net.patch_embed.grid_size)
        self.infusion_block = config.infusion_block
        self.patch_embed = net.patch_embed
        self.blocks = net.blocks
        self.cls_token = net.cls_token
        self.bg_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed_cls = nn.Parameter(net.pos_embed.detach()[:, :1].repeat(1, extra, 1))
        self.pos_embed_pat = nn.Parameter(net.pos_embed.detach()[:, 1:].clone())
        self.tokenizer = nn.Sequential(nn.Linear(dim, 5 * dim), nn.ReLU(), nn.Linear(5 * dim, extra * dim))
        self.head = nn.Conv2d(dim, extra, 3, padding=1)
        if weights is not None:
            self._load(Path(weights), config.backbone)

    def class_tokens(self) -> Tensor:
        """The tokens before the first block, the same for all images: ``(1, C + 1, D)``."""
        own = self.tokenizer(self.cls_token).view(1, -1, self.cls_token.shape[-1])
        shared = self.cls_token.expand(-1, own.shape[1] - 1, -1)
        return own + torch.cat([self.bg_token, shared], dim=1) + self.pos_embed_cls

    def position(self, grid: tuple[int, int]) -> Tensor:
        """Positions of the patches on another grid, bicubic: ``(1, h w, D)``."""
        if grid == self.grid_size:
            return self.pos_embed_pat
        learned = self.pos_embed_pat.mT.unflatten(2, self.grid_size)
        return F.interpolate(learned, grid, mode="bicubic", align_corners=False).flatten(2).mT

    def forward(
        self, images: Tensor, sources: Tensor | None = None, *, since: Sequence[int] = (), affinity: bool = True
    ) -> Output:
        """Logits, maps and attention of images.

        Args:
            images: ``(B, 3, H, W)``; what is left of their sides beyond whole patches is cut.
            sources: tokens to infuse (:func:`infuse`) behind the infusion block.
            since: blocks from which on attention is summed. Where none is, blocks run timm's fused attention.
            affinity: whether the patches' rows are summed too.
        """
        side = self.patch_embed.patch_size
        if images.ndim != 4 or images.shape[2] < side[0] or images.shape[3] < side[1]:
            raise ValueError(
                f"cti: expected images (B, 3, H, W) of at least {side[0]} x {side[1]} pixels, got {tuple(images.shape)}"
            )
        patches = self.patch_embed.proj(images)
        grid = (patches.shape[2], patches.shape[3])
        tokens = self.class_tokens()
        T = tokens.shape[1]
        x = torch.cat([tokens.expand(len(images), -1, -1), patches.flatten(2).mT + self.position(grid)], dim=1)
        sums: dict[int, Tensor | None] = {}
        for i, block in enumerate(self.blocks):
            if i == self.infusion_block + 1:
                infusible = x[:, :T]
                if sources is not None:
                    x = torch.cat([infuse(infusible, sources), x[:, T:]], dim=1)
            if i in since:
                sums[i] = None
            if sums:
                last = next(reversed(sums))
                x, sums[last] = attend(block, x, sums[last], None if affinity else T, T)
            else:
                x = block(x)
        logits = self.head(x[:, T:].mT.unflatten(2, grid)).float()
        attention: dict[int, Tensor] = {}
        for i in reversed(sums):  # those of later blocks are part of those of earlier ones
            own = sums[i]
            assert own is not None
            attention[i] = own + next(reversed(attention.values())) if attention else own
        return Output(x[:, 1:T].float().mean(2), logits[:, 1:].mean((2, 3)), F.relu(logits), infusible, attention)

    def _load(self, path: Path, name: str) -> None:
        from fastcam.io import load_weights

        state, saved = load_weights(path)
        if "method" in saved:
            state = {k.removeprefix(TRUNK): v for k, v in state.items() if k.startswith(TRUNK)}
        if "pos_embed_pat" not in state and "pos_embed" in state:  # an image classifier: its trunk, our new parts
            new = ("bg_token", "tokenizer.", "head.")
            state = {k: v for k, v in state.items() if not k.startswith(new)}
            state |= {k: v for k, v in self.state_dict().items() if k.startswith(new)}
            position = state["pos_embed"]
            state["pos_embed_cls"] = position[:, :1].expand(-1, self.pos_embed_cls.shape[1], -1)
            state["pos_embed_pat"] = self._regrid(position[:, 1:])
        ours = {k: v.shape for k, v in self.state_dict().items()}
        wrong = sorted(k for k, shape in ours.items() if k not in state or state[k].shape != shape)
        wrong += sorted(state.keys() - ours.keys() - UNREAD)
        if wrong:
            raise FastcamError(
                f"weights '{path}': {wrong[0]} and {len(wrong) - 1} more are missing, not expected or of another "
                f"shape; give those of '{name}' in timm's names, or of a network of CTI with as many classes"
            )
        self.load_state_dict({k: state[k].float() for k in ours})

    def _regrid(self, position: Tensor) -> Tensor:
        """Positions of the patches of a square image ``(1, N, D)`` on our grid."""
        side = math.isqrt(position.shape[1])
        if side * side != position.shape[1] or (side, side) == self.grid_size:
            return position
        square = position.float().mT.unflatten(2, (side, side))
        return F.interpolate(square, self.grid_size, mode="bicubic", align_corners=False).flatten(2).mT


def attend(block: Any, x: Tensor, total: Tensor | None, rows: int | None, skip: int) -> tuple[Tensor, Tensor]:
    """A timm transformer block on tokens ``(B, T, D)`` whose attention is summed up, see :func:`attention_maps`.

    Returns:
        The block's output ``(B, T, D)``, and ``total`` plus its head-mean attention ``(B, rows, T - skip)``.
    """
    attn = block.attn
    q, k, v = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    with torch.autocast(x.device.type, enabled=False):  # sums of probabilities stay in float32
        out, total = attention_maps(q, k, v, total, rows=rows, skip=skip, scale=attn.scale)
    x = x + block.drop_path1(block.ls1(attn.proj_drop(attn.proj(out.transpose(1, 2).flatten(2)))))
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x)))), total


def _create_vit(config: Config) -> Any:
    """The plain vision transformer that the configuration names."""
    import difflib

    import timm
    from timm.models.vision_transformer import Attention, Block, VisionTransformer

    name = config.backbone
    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3))
        raise FastcamError(f"backbone '{name}': timm has no such network" + (f"; near it: {near}" if near else ""))
    sizes = {key: getattr(config, key) for key in ("patch_size", "embed_dim", "depth", "num_heads")}
    sizes = {key: value for key, value in sizes.items() if value is not None}
    try:
        net: Any = timm.create_model(
            name, num_classes=0, img_size=config.image_size, drop_path_rate=config.drop_path, **sizes
        )
    except (TypeError, AssertionError, ZeroDivisionError, RuntimeError) as error:
        reason = str(error).split("\n", 1)[0]
        raise FastcamError(
            f"backbone '{name}': cannot be built: {reason}; change its sizes or choose another"
        ) from None
    plain = (
        type(net) is VisionTransformer
        and net.num_prefix_tokens == 1
        and net.pos_embed is not None
        and not net.no_embed_class
        and all(type(block) is Block and type(block.attn) is Attention for block in net.blocks)
    )
    # Layers that some networks have between those that the forward pass here goes through.
    between = [net.norm_pre, net.patch_embed.norm] if plain else []
    between += [getattr(block.attn, name, None) for block in net.blocks for name in ("norm", "gate")] if plain else []
    if not plain or any(not isinstance(layer, (nn.Identity, type(None))) for layer in between):
        raise FastcamError(
            f"backbone '{name}': expected a plain vision transformer with one class token and learned positions; "
            "choose one such as 'deit_small_patch16_224'"
        )
    return net


class CTI(nn.Module):
    """The transformer, its memory and its losses.

    Args:
        num_classes: number of foreground classes C.
        config: its values.
        weights: local file to start from: the backbone's in timm's names (DeiT, whose class token and position start
            all of ours; positions of another grid are resized), or a trained network of CTI, ours or in the
            authors' names.

    Raises:
        FastcamError: a value that is refused, a backbone that is no plain vision transformer, weights that do not fit.
    """

    name = "cti"
    kind = "cam"
    step: Tensor

    def __init__(self, num_classes: int, config: Config = Config(), *, weights: str | Path | None = None) -> None:
        super().__init__()
        if config.maps not in MAPS:
            raise FastcamError(f"cti: maps is '{config.maps}', expected one of {', '.join(MAPS)}")
        if config.memory_size < 1 or config.epochs < 1:
            raise FastcamError(
                f"cti: memory_size is {config.memory_size} and epochs {config.epochs}, expected at least 1"
            )
        if len(config.crop_scale) != 2:
            raise FastcamError(
                f"cti: crop_scale has {len(config.crop_scale)} numbers, expected 2, smallest and largest"
            )
        self.num_classes = num_classes
        self.config = config
        self.backbone = MultiTokenViT(num_classes, config, weights)
        self.normalize = self.backbone.normalize
        self.memory = ClassTokenMemory(num_classes, config.memory_size, self.backbone.cls_token.shape[-1])
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.start_step = 0

    def train_transform(
        self, crop: int, *, resize_long: Any, flip: bool, mean: Sequence[float], std: Sequence[float]
    ) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """Two random crops of every image, the second with strong augmentation; ``resize_long`` plays no part."""
        from fastcam.data.transforms import two_view_transform

        low, high = self.config.crop_scale
        return two_view_transform(crop, scale=(low, high), flip=flip, mean=mean, std=std)

    def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """L_cls + L_bg + L_intra + L_cross.

        Args:
            batch: ``"image"`` and ``"strong"``, two views ``(B, 3, S, S)`` of every image, and ``"tags"`` ``(B, C)``.

        Returns:
            ``"loss"`` and its four parts; parts that do not count yet are 0.
        """
        if "strong" not in batch:
            raise ValueError("cti.training_step: expected a second view batch['strong']; see CTI.train_transform")
        c, tags = self.config, batch["tags"]
        infused, late = c.infusion_block + 1, len(self.backbone.blocks) - c.cam_blocks
        active = int(self.step) >= self.start_step
        self.step += 1
        with_maps = (infused, late) if active and c.bg_loss > 0 else ()
        weak = self.backbone(batch["image"], since=with_maps)
        strong = self.backbone(batch["strong"])
        logits = (weak.class_logits, weak.patch_logits, strong.class_logits, strong.patch_logits)
        loss_cls = torch.stack([F.multilabel_soft_margin_loss(x, tags) for x in logits]).sum()
        loss_bg, loss_intra, loss_cross = loss_cls.new_zeros(3).unbind()
        self.memory.append(weak.tokens[:, 1:].detach(), tags)
        if with_maps:
            loss_bg = c.bg_loss * background_loss(
                weak.cams, weak.class_maps(late), weak.affinity(infused), tags, detach_foreground=c.detach_foreground
            )
        if active and c.intra_loss > 0:
            loss_intra = c.intra_loss * consistency_loss(weak.cams, self.backbone(batch["image"], strong.tokens).cams)
        if active and c.cross_loss > 0 and self.memory.full():
            sources = cross_sources(weak.tokens[:, 1:], self.memory.mean(), tags)
            cross = self.backbone(batch["image"], sources, since=(infused,), affinity=False)
            maps = cross.cams * cross.class_maps(infused)
            loss_cross = c.cross_loss * consistency_loss(weak.cams[:, 1:], maps[:, 1:])
        loss = loss_cls + loss_bg + loss_intra + loss_cross
        parts = {"loss_cls": loss_cls, "loss_bg": loss_bg, "loss_intra": loss_intra, "loss_cross": loss_cross}
        return {"loss": loss, **parts}

    def tag_logits(self, images: Tensor) -> Tensor:
        """What the network thinks of the tags: ``(B, C)``, mean of the class tokens' and the patches' logits."""
        out = self.backbone(images)
        return (out.class_logits + out.patch_logits) / 2

    def cams(self, images: Tensor, tags: Tensor | None = None) -> Tensor:
        """Maps ``(B, C, h, w)`` of one view as ``config.maps`` says, not normalised; classes without a tag are 0."""
        how = self.config.maps
        out = self.backbone(images, since=() if how == "cam" else (0,), affinity=how == "refined")
        maps = out.cams
        if how != "cam":
            maps = maps * out.class_maps(0)
        if how == "refined":
            maps = refine_cams(out.affinity(0), maps)
        return maps[:, 1:] if tags is None else maps[:, 1:] * (tags > 0)[:, :, None, None]

    def fused_cams(
        self, views: Sequence[Tensor], size: tuple[int, int], tags: Tensor | None = None, keys: Tensor | None = None
    ) -> FusedCams:
        """Maps of an image and its mirror image, resized, added and normalised; no background.

        The authors use the image at its own size alone; further views are added. ``keys`` ``(n,)``: only the maps of
        these classes.
        """
        fused = CamFusion("mctformer", normalize=None)(self.cams, views, size, tags, keys)
        return FusedCams(minmax_normalize(fused.maps))

    def optimizers(self, total_steps: int) -> list[tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]]:
        """AdamW; the rate rises linearly, then falls by a cosine, and changes once an epoch.

        Biases, norms and the shared class token are not decayed; the background's token and the positions are.
        """
        c = self.config
        self.start_step = -(-c.start_epoch * total_steps // c.epochs)
        named = list(self.named_parameters())
        free = [p for name, p in named if p.ndim == 1 or name.endswith("cls_token")]
        decayed = [p for name, p in named if p.ndim > 1 and not name.endswith("cls_token")]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": free, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=c.lr, weight_decay=c.weight_decay)

        def factor(step: int) -> float:
            return learning_rate(step * c.epochs // total_steps, c) / c.lr

        return [(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor))]

    def export_state_dict(self) -> dict[str, Tensor]:
        """The state without the memory and the number of steps, which only training needs."""
        return {k: v for k, v in self.state_dict().items() if k.startswith(TRUNK)}


def learning_rate(epoch: int, config: Config) -> float:
    """The rate of an epoch: linear up to ``warmup_epochs``, then the cosine whose clock began at epoch 0."""
    if epoch < config.warmup_epochs:
        return config.warmup_lr + epoch * (config.lr - config.warmup_lr) / config.warmup_epochs
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * epoch / config.epochs)) / 2
