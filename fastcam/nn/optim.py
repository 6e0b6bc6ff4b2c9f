"""The training recipe that the classification-based methods share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

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


def weight_and_bias_groups(
    backbone: nn.Module, heads: Sequence[nn.Module], lr: float, head_lr_factor: float
) -> list[dict[str, Any]]:
    """Four groups of parameters with learning rates of their own, as OAA, DRS and Group-WSSS train.

    Weights of the backbone learn at ``lr``, its biases twice as fast; those of the heads ``head_lr_factor`` times
    faster than these. Frozen parameters are left out. A parameter that belongs to a head and lies within the backbone
    counts as the head's.
    """
    ours = {id(p) for head in heads for p in head.parameters()}
    trunk = [(n, p) for n, p in backbone.named_parameters() if p.requires_grad and id(p) not in ours]
    new = [(n, p) for head in heads for n, p in head.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for parameters, rate in ((trunk, lr), (new, lr * head_lr_factor)):
        for bias in (False, True):
            chosen = [p for n, p in parameters if (n.rsplit(".", 1)[-1] == "bias") == bias]
            groups.append({"params": chosen, "lr": rate * (2 if bias else 1)})
    return [group for group in groups if group["params"]]


def step_decay(
    optimizer: torch.optim.Optimizer, drops: Sequence[float], total_steps: int, factor: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rates that are multiplied by ``factor`` after each share of the training in ``drops``.

    The scheduler steps once a training step. Drops at 4/15 and 9/15 are those of 15 epochs, before the fifth and tenth.
    """
    at = [round(share * total_steps) for share in drops]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor ** sum(step >= drop for drop in at))
