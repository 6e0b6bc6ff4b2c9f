"""The training recipe that the classification-based methods share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn


class _SGDConfig(Protocol):  # properties, because the methods' configurations are frozen
    @property
    def lr(self) -> float: ...
    @property
    def head_lr_factor(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...
    @property
    def poly_power(self) -> float: ...


def sgd_poly(
    backbone: nn.Module, heads: Sequence[nn.Module], config: _SGDConfig, total_steps: int
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LambdaLR]:
    """SGD whose learning rate falls as ``(1 - step / total_steps) ** config.poly_power``.

    The heads learn ``config.head_lr_factor`` times faster than the backbone; frozen parameters are left out. The
    scheduler steps once a training step.
    """
    groups = [
        {"params": [p for p in backbone.parameters() if p.requires_grad], "lr": config.lr},
        {"params": [p for head in heads for p in head.parameters()], "lr": config.lr * config.head_lr_factor},
    ]
    optimizer = torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: max(0.0, 1 - step / total_steps) ** config.poly_power
    )
    return optimizer, decay
