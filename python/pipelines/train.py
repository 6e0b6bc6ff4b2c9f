"""The train pass: images and tags to the weights of a method."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from fastcam.data import train_transform
from fastcam.errors import FastcamError
from fastcam.io import open_pass
from fastcam.methods import create_method
from fastcam.pipelines._data import Data, open_data
from fastcam.pipelines._settings import WEIGHTS, TrainerConfig, trainer_record


def train(data: Data, method: dict[str, Any], trainer: TrainerConfig, out: Path) -> Path:
    """Trains a method on images and their tags.

    Writes weights.safetensors at the end, and on the way last.ckpt, metrics.csv and TensorBoard's files. A training
    that was stopped goes on where last.ckpt was written when the same command is run again, and ends in the same
    weights; a finished one is left alone.

    Args:
        data: the training images.
        method: name (sfc, cam, ...), and where wanted backbone (a timm name), weights (local file for the backbone) and
            any field of the method's configuration, as in --method.name sfc --method.lr 0.05.
        trainer: epochs, batches, precision, devices.
        out: output folder.

    Returns:
        The path of the weights.
    """
    if "name" not in method:
        raise FastcamError("method.name is missing; give the name of a method, such as sfc or cam")
    record = {"pass": "train", "data": dataclasses.asdict(data), "method": method, "trainer": trainer_record(trainer)}
    dataset = open_data(data)
    record["classes"] = list(dataset.classes)
    if (out / WEIGHTS).is_file():
        open_pass(out, record)
        return out / WEIGHTS
    from fastcam.pipelines._fit import fit, seeded_init

    with seeded_init(trainer.seed):
        network: Any = create_method(num_classes=len(dataset.classes), **method)
    if network.kind != "cam":
        command = {"refiner": "refine", "regions": "mcof"}.get(network.kind, "segment")
        raise FastcamError(
            f"method {network.name} is a {network.kind}, which does not learn from tags; use fastcam {command}"
        )
    tags = dataset.tags
    if tags is None:
        raise FastcamError(f"the images in {data.images} have no tags; give data.tags")
    if hasattr(network, "set_tag_counts"):
        network.set_tag_counts(tags.sum(0))
    mean, std = network.normalize
    dataset.transform = train_transform(
        trainer.crop, resize_long=trainer.resize_long, flip=trainer.flip, mean=mean, std=std
    )
    return fit(network, dataset, dataset.classes, trainer, out, record)
