"""The decoder that carries global context down a hierarchical encoder (MEVT)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

MLP_RATIO = 4
NORM_EPS = 1e-6


class Attention(nn.Module):
    """Multi-head attention of tokens ``(B, N, D)`` to a context ``(B, M, D)``, with biases."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """``(B, N, D)``, ``(B, M, D)`` -> ``(B, N, D)``."""
        q = self.q(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(context).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class ConvMLP(nn.Module):
    """PVTv2's MLP: linear, depthwise 3 x 3 convolution on the map, GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.dwconv = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Tokens ``(B, h w, D)`` of a map of ``size`` -> the same shape."""
        grid = self.fc1(x).mT.unflatten(2, size)
        return self.fc2(F.gelu(self.dwconv(grid)).flatten(2).mT)


class ContextBlock(nn.Module):
    """Pre-norm transformer block: attention to itself or to a context, then :class:`ConvMLP`.

    Args:
        width: D.
        heads: of the attention.
        attend: ``"self"``; ``"context"``, whose tokens get a norm of their own; ``None`` for the MLP alone.
        drop_path: probability that an image skips a branch in training.
    """

    def __init__(self, width: int, heads: int, attend: str | None, drop_path: float) -> None:
        super().__init__()
        from timm.layers import DropPath

        self.drop_path = DropPath(drop_path)
        if attend is not None:
            self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
            self.attn = Attention(width, heads)
        if attend == "context":
            self.norm_context = nn.LayerNorm(width, eps=NORM_EPS)
        self.attend = attend
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = ConvMLP(width, MLP_RATIO * width)

    def forward(self, x: Tensor, size: tuple[int, int], context: Tensor | None = None) -> Tensor:
        """Tokens ``(B, h w, D)`` of a map of ``size`` and a context ``(B, M, D)`` -> the same shape as the tokens."""
        if self.attend is not None:
            q = self.norm1(x)
            kv = self.norm_context(context) if self.attend == "context" else q
            x = x + self.drop_path(self.attn(q, kv))
        return x + self.drop_path(self.mlp(self.norm2(x), size))


class ContextDecoder(nn.Module):
    """From the coarsest stage of an encoder to the finest, every token in sight of the coarsest ones.

    The coarsest stage passes through a transformer block. Each finer stage is brought to the decoder's width, gets what
    comes from the stage above it, bilinearly enlarged, and attends to all tokens of the coarsest stage: context comes
    both step by step and at once. The finest output is layer-normalised.

    Cost: N_i (10 D^2 + (C_i + 2 N) D) multiply-adds at a stage of N_i tokens and C_i channels; N in the coarsest.

    Args:
        channels: of the encoder's stages, finest first.
        width: D, channels of all outputs; a multiple of ``heads``.
        heads: of the attention.
        cross: whether stages attend to the coarsest one; without, context comes step by step alone.
        drop_path: stochastic depth of all blocks.
    """

    def __init__(
        self, channels: Sequence[int], width: int, *, heads: int = 8, cross: bool = True, drop_path: float = 0.0
    ) -> None:
        super().__init__()
        if width < 1 or width % heads:
            raise ValueError(f"ContextDecoder: expected a width that is a multiple of {heads} heads, got {width}")
        attend = ["context" if cross else None] * (len(channels) - 1) + ["self"]
        self.lateral = nn.ModuleList(nn.Linear(c, width) for c in channels)
        self.blocks = nn.ModuleList(ContextBlock(width, heads, a, drop_path) for a in attend)
        self.norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.apply(_init)

    def forward(self, stages: Sequence[Tensor]) -> list[Tensor]:
        """Stage outputs ``(B, channels[i], h_i, w_i)``, finest first -> ``(B, D, h_i, w_i)``, as many."""
        outputs: list[Tensor] = []
        context: Tensor | None = None
        for stage, lateral, block in zip(reversed(stages), reversed(self.lateral), reversed(self.blocks), strict=True):
            size = (stage.shape[2], stage.shape[3])
            x = lateral(stage.flatten(2).mT)
            if outputs:
                x = x + F.interpolate(outputs[-1], size, mode="bilinear", align_corners=False).flatten(2).mT
            x = block(x, size, context)
            context = x if context is None else context
            outputs.append(x.mT.unflatten(2, size))
        finest = outputs.pop()
        outputs.append(self.norm(finest.flatten(2).mT).mT.unflatten(2, tuple(finest.shape[2:])))
        return outputs[::-1]


def _init(module: Any) -> None:
    """PVTv2's initial weights."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
        assert module.bias is not None
        nn.init.zeros_(module.bias)
