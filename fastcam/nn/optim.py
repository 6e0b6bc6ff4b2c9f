"""The training recipe that the classification-based methods share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn


class _Rates(Protocol):  # properties, because the methods' configurations are frozen
    @property
    def lr(self) -> float: ...
    @property
    def head_lr_factor(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def weight_decay(self) -> float: ...


class _SGDConfig(_Rates, Protocol):
    @property
    def poly_power(self) -> float: ...


class _StepConfig(_Rates, Protocol):
    @property
    def drops(self) -> tuple[float, ...]: ...


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


def sgd_steps(
    backbone: nn.Module, heads: Sequence[nn.Module], config: _StepConfig, total_steps: int
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LambdaLR]:
    """SGD with Nesterov momentum in four groups, as OAA, DRS and Group-WSSS train; the rates fall by ``config.drops``.

    Weights of the backbone learn at ``config.lr``, its biases twice as fast; those of the heads
    ``config.head_lr_factor`` times faster than these. Frozen parameters are left out. A parameter that belongs to a
    head and lies within the backbone counts as the head's.
    """
    ours = {id(p) for head in heads for p in head.parameters()}
    trunk = [(n, p) for n, p in backbone.named_parameters() if p.requires_grad and id(p) not in ours]
    new = [(n, p) for head in heads for n, p in head.named_parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = []
    for parameters, rate in ((trunk, config.lr), (new, config.lr * config.head_lr_factor)):
        for bias in (False, True):
            chosen = [p for n, p in parameters if (n.rsplit(".", 1)[-1] == "bias") == bias]
            groups.append({"params": chosen, "lr": rate * (2 if bias else 1)})
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.momentum > 0,
    )
    return optimizer, step_decay(optimizer, config.drops, total_steps)


def step_decay(
    optimizer: torch.optim.Optimizer, drops: Sequence[float], total_steps: int, factor: float = 0.1
) -> torch.optim.lr_scheduler.LambdaLR:
    """Learning rates that are multiplied by ``factor`` after each share of the training in ``drops``.

    The scheduler steps once a training step. Drops at 4/15 and 9/15 are those of 15 epochs, before the fifth and tenth.
    """
    at = [round(share * total_steps) for share in drops]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor ** sum(step >= drop for drop in at))


def cosine_schedule(step: int, total: int, base: float, final: float, *, warmup: int = 0, start: float = 0.0) -> float:
    """DINO's schedule at one step: a line from ``start`` to ``base``, then a cosine that has almost reached ``final``.

    Args:
        step: from 0; beyond the end it stays at ``final``.
        total: number of steps.
        base: value at the end of the line, where the cosine begins.
        final: value that the cosine would reach at step ``total``.
        warmup: steps of the line, which ends at ``base`` with the last of them.
        start: value at step 0 where there is a line.
    """
    if step < warmup:
        return start + (base - start) * step / max(1, warmup - 1)
    share = min(1.0, (step - warmup) / max(1, total - warmup))
    return final + 0.5 * (base - final) * (1 + math.cos(math.pi * share))
