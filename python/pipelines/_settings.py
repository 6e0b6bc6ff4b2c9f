"""Settings that several commands share; their docstrings are the command line's help."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

WEIGHTS = "weights.safetensors"  # what a finished training leaves in its folder


@dataclass(frozen=True)
class TrainerConfig:
    """How and on what machine a network is trained; the learning rates are the method's.

    Args:
        epochs: passes over the images.
        steps_per_epoch: steps that count as an epoch, whatever the number of images; null for a pass.
        batch_size: images a step, over all devices together.
        crop: side of the square training crops, in pixels.
        resize_long: smallest and largest length that the longer side of an image is brought to before cropping.
        square: bring the shorter side to that length too, whatever the image's shape.
        flip: mirror half of the images.
        color_jitter: largest random changes of brightness, contrast, saturation and hue; null for none.
        precision: 32, bf16-mixed or 16-mixed.
        accelerator: auto, cpu or gpu.
        devices: number of devices, each with a process of its own; their gradients are averaged (DDP).
        strategy: Lightning's name of the way to use several devices; auto is DDP.
        workers: processes that decode images, for each device; 0 decodes between the steps.
        seed: of the order, the augmentation and all else that is drawn.
        checkpoint_every: write last.ckpt every so many steps; it is written at the end of every epoch anyway.
        log_every: steps between two lines of metrics.csv.
    """

    epochs: int = 6
    steps_per_epoch: int | None = None
    batch_size: int = 16
    crop: int = 512
    resize_long: tuple[int, int] = (320, 640)
    square: bool = False
    flip: bool = True
    color_jitter: tuple[float, float, float, float] | None = None
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    devices: int = 1
    strategy: str = "auto"
    workers: int = 2
    seed: int = 0
    checkpoint_every: int = 500
    log_every: int = 10


def trainer_record(config: TrainerConfig) -> dict[str, Any]:
    """The settings that the trained weights depend on; the others may change between two runs of one training."""
    free = {"accelerator", "devices", "strategy", "workers", "checkpoint_every", "log_every"}
    free |= {"steps_per_epoch"} if config.steps_per_epoch is None else set()  # records from before it stay valid
    return {key: value for key, value in dataclasses.asdict(config).items() if key not in free}
