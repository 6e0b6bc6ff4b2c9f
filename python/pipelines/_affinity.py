"""The refine pass's networks of affinities (IRN, PSA): trained on labels made of CAMs, then walked on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcam.data import multi_scale
from fastcam.errors import FastcamError
from fastcam.io import CamSet, Instances, load_cams, open_pass, save_cams, save_instances, write_label_png
from fastcam.methods import create_method
from fastcam.pipelines._data import (
    Data,
    Images,
    file_fingerprint,
    input_record,
    load_image,
    load_trained,
    open_data,
    training_transform,
)
from fastcam.pipelines._parallel import PassResult, ordered_map, run_pass
from fastcam.pipelines._settings import WEIGHTS, TrainerConfig, trainer_record
from fastcam.pipelines.label import to_labels, two_threshold_label
from fastcam.pipelines.make_cam import pick_device
from fastcam.pipelines.refine import Crf, Seeds, crf_scores, own_background
from fastcam.pipelines.segment import Labelled

STRIDE = 4  # pixels between two stored values of a walked map, which is that smooth
INSTANCE_BACKGROUND = 0.25  # of IRN, where the CAMs' own background decides otherwise


def seed_label(cams: CamSet, image: Tensor, seeds: Seeds, crf: Crf) -> Tensor:
    """Labels of the pixels that CAMs are sure of.

    Args:
        cams: of one image.
        image: uint8 `(3, H, W)`.
        seeds: the two backgrounds.
        crf: refines both decisions.

    Returns:
        uint8 `(H, W)`: class k + 1 where a class beats the high background, 0 where none beats the low one, else 255.
    """
    certain, loose = (
        to_labels(crf_scores(cams.scores(background), image, crf).max(0).indices, cams.keys)
        for background in seeds.backgrounds()
    )
    return two_threshold_label(certain, loose)


def write_seeds(
    dataset: Images, cams: Path, out: Path, record: dict[str, Any], seeds: Seeds, crf: Crf, workers: int
) -> None:
    """A pass of its own: one label PNG an image."""
    open_pass(out, {"pass": "seeds", **record})

    def one(image_id: str) -> None:
        camset = load_cams(cams / f"{image_id}.npz")
        write_label_png(
            out / f"{image_id}.png", seed_label(camset, load_image(dataset, image_id, camset.size), seeds, crf)
        )

    def work(ids: Iterable[str]) -> Iterator[None]:
        return ordered_map(one, ids, workers)

    run_pass("seeds", out, ".png", dataset.ids, work)


def train_network(
    data: Data,
    cams: Path,
    out: Path,
    method: dict[str, Any],
    seeds: Seeds,
    crf: Crf,
    trainer: TrainerConfig,
    background: float | None,
    power: float | None,
    device: str,
    workers: int,
) -> Path:
    """Trains a network of affinities on what CAMs are sure of; goes on where it was stopped, as the train pass does.

    Args:
        data: the training images.
        cams: their CamSets.
        out: folder for weights.safetensors, last.ckpt, metrics.csv, and the labels, in labels/.
        method: name, backbone, weights and fields of the method's configuration.
        seeds: which pixels are sure.
        crf: of the labels.
        trainer: epochs, batches, precision, devices.
        background: of the walk that follows; tried on one image, so that a missing one shows before the training.
        power: likewise.
        device: for IRN's mean displacement, behind the training.
        workers: threads that write the labels.

    Returns:
        The path of the weights.
    """
    source = input_record(cams, "make-cam")
    labels = {"seeds": dataclasses.asdict(seeds), "crf": crf.resolved(), **source}
    images = open_data(data, source["classes"], need_tags=False)
    record = {"pass": "refine-train", "data": dataclasses.asdict(data), "method": method, **labels}
    record |= {"trainer": trainer_record(trainer), "classes": list(images.classes)}
    if (out / WEIGHTS).is_file():
        open_pass(out, record)
        return out / WEIGHTS
    from fastcam.pipelines._fit import fit, seeded_init

    with seeded_init(trainer.seed):
        network: Any = create_method(num_classes=len(images.classes), **method)
    own_background(load_cams(cams / f"{images.ids[0]}.npz"), images.ids[0], background, power)
    write_seeds(images, cams, out / "labels", labels, seeds, crf, workers)
    mean, std = network.normalize
    transform = training_transform(trainer, network.normalize)

    def calibrate(trained: Any) -> None:
        target = pick_device(device)
        views = (
            multi_scale(images[i]["image"].as_subclass(Tensor), (1.0,), mean=mean, std=std) for i in range(len(images))
        )
        trained.to(target).calibrate(view[None].to(target) for (view,) in views)

    finish = calibrate if hasattr(network, "calibrate") else None
    return fit(network, Labelled(images, out / "labels", transform), images.classes, trainer, out, record, finish)


@torch.inference_mode()
def walked_cams(
    network: Any, view: Tensor, cams: CamSet, image_id: str, background: float | None, power: float | None
) -> CamSet:
    """CAMs of one image, walked along the network's affinities.

    Args:
        network: trained, on its device.
        view: the image, normalised, `(3, H, W)`.
        cams: its CAMs.
        image_id: for messages.
        background: constant score of the background.
        power: the background is (1 - largest CAM)^power. Neither: the CAMs' own.

    Returns:
        With background, a value every `STRIDE` pixels, on the CPU. Without classes there is nothing to decide: ones.
    """
    small = tuple(-(-side // STRIDE) for side in cams.size)
    if len(cams.keys) == 0:
        return CamSet(cams.keys, torch.zeros(0, *small), torch.ones(small), cams.size)
    maps = cams.maps if background is not None else own_background(cams, image_id, background, power)
    target = next(network.parameters()).device
    scores = network.refine(view[None].to(target), maps[None].to(target), background)
    scores = F.interpolate(scores, small, mode="bilinear", align_corners=False)[0].clamp(0, 1).cpu()
    return CamSet(cams.keys, scores[1:], scores[0], cams.size)


@torch.inference_mode()
def find_instances(network: Any, view: Tensor, cams: CamSet, background: float) -> Instances:
    """Objects of one image; the arguments as in `walked_cams`."""
    target = next(network.parameters()).device
    masks, index, scores = network.instances(view.to(target), cams.maps.to(target), background)
    return Instances(masks, cams.keys[index], scores)


def walk(
    data: Data,
    cams: Path,
    out: Path,
    how: str,
    weights: Path,
    background: float | None,
    power: float | None,
    instances: Path | None,
    device: str,
    workers: int,
) -> PassResult:
    """Writes the walked CAMs, and objects, of a trained network; see `refine`."""
    network, classes = load_trained(weights, "refiner")
    if network.name != how:
        raise FastcamError(f"weights {weights} are of {network.name}, expected {how}; give other weights or --how")
    source = input_record(cams, "make-cam")
    dataset = open_data(data, source["classes"] or classes, need_tags=False)
    record = {"pass": "refine", "how": how, "weights": file_fingerprint(weights), "background": background}
    record |= {"power": power, "instances": instances is not None, **source}
    network.to(pick_device(device), memory_format=torch.channels_last)
    open_pass(out, record)
    mean, std = network.normalize

    def read(image_id: str) -> tuple[str, Tensor, CamSet]:
        camset = load_cams(cams / f"{image_id}.npz")
        image = load_image(dataset, image_id, camset.size)
        return image_id, multi_scale(image, (1.0,), mean=mean, std=std)[0], camset

    def compute(job: tuple[str, Tensor, CamSet]) -> tuple[str, CamSet, Instances | None]:
        image_id, view, camset = job
        walked = walked_cams(network, view, camset, image_id, background, power)
        threshold = INSTANCE_BACKGROUND if background is None else background
        return image_id, walked, None if instances is None else find_instances(network, view, camset, threshold)

    def write(done: tuple[str, CamSet, Instances | None]) -> None:
        image_id, camset, objects = done
        if instances is not None and objects is not None:
            save_instances(instances / f"{image_id}.json", image_id, objects)
        save_cams(out / f"{image_id}.npz", camset)  # last: an image with CAMs is finished

    def work(ids: Iterable[str]) -> Iterator[None]:
        return ordered_map(write, map(compute, ordered_map(read, ids, workers)), workers)

    return run_pass("refine", out, ".npz", dataset.ids, work)
