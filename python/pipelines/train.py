"""The train pass: images and tags to the weights of a method."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torchvision import tv_tensors

from fastcam.data import GroupSampler, multi_scale
from fastcam.errors import FastcamError
from fastcam.io import CamSet, finished_ids, load_cams, open_pass, save_cams
from fastcam.methods import create_method, method_class
from fastcam.nn import max_normalize
from fastcam.pipelines._data import (
    Data,
    Images,
    Transform,
    input_record,
    method_transform,
    open_data,
    training_transform,
)
from fastcam.pipelines._settings import WEIGHTS, TrainerConfig, trainer_record

LEARNS = ("cam", "few-shot", "pretraining")  # kinds of methods that this pass trains
ATTENTION = "attention"  # folder of the maps that a method kept in training, below its weights


class Mapped(torch.utils.data.Dataset[dict[str, Any]]):
    """Images with the CAMs of a pass: items have `"maps"` float `(C, ., .)`, 0 for absent classes.

    Args:
        images: the images.
        cams: folder of their CamSets.
        transform: of the items; changes image and maps together.
    """

    def __init__(self, images: Images, cams: Path, transform: Transform) -> None:
        self.images = images
        self.cams = cams
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.images[index]
        camset = load_cams(self.cams / f"{item['id']}.npz")
        if camset.size != tuple(item["image"].shape[1:]):
            came, size = (f"{w} x {h}" for h, w in (camset.size, item["image"].shape[1:]))
            raise FastcamError(
                f"CAMs of {item['id']} are of an image of {came} pixels, but it is {size}; make them again"
            )
        known = camset.scores(0.0)[1:]
        item["maps"] = tv_tensors.Mask(known if len(known) else torch.zeros(1, *camset.size))
        item = self.transform(item)
        maps = item["maps"]
        item["maps"] = maps.new_zeros(len(self.images.classes), *maps.shape[1:])
        item["maps"][camset.keys] = maps[: len(camset.keys)]
        return item


def keeps_maps(network: Any) -> bool:
    """Whether a method keeps the maps of training images as they pass by (Group-WSSS)."""
    return hasattr(network, "kept_maps") and network.config.accumulate


@torch.inference_mode()
def write_kept(network: Any, dataset: Images, side: int, out: Path, record: dict[str, Any]) -> None:
    """The maps that a method kept in training as CamSets; an image that never came by gets those of now.

    Args:
        network: trained.
        dataset: the training images, without a transform.
        side: of the square in which they were seen.
        out: folder of a pass of its own.
        record: all that the training depended on.
    """
    open_pass(out, {"pass": "attention", "train": record, "classes": record["classes"]})
    network.eval()
    kept = {image_id: (keys, maps) for image_id, keys, maps in network.kept_maps()}
    like = next(network.parameters())
    for image_id in dataset.ids:
        item = dataset.by_id(image_id)
        image = item["image"].as_subclass(torch.Tensor)
        if image_id in kept:
            keys, maps = kept[image_id]
        else:
            (view,) = multi_scale(image, (1.0,), mean=network.normalize[0], std=network.normalize[1])
            view = functional.interpolate(view[None].to(like), (side, side), mode="bilinear", antialias=True)
            keys = item["tags"].nonzero().flatten()
            maps = max_normalize(network.cams(view)[0, keys.to(like.device)]).cpu()
        save_cams(out / f"{image_id}.npz", CamSet(keys, maps, None, (image.shape[1], image.shape[2])))


def train(data: Data, method: dict[str, Any], trainer: TrainerConfig, out: Path, cams: Path | None = None) -> Path:
    """Trains a method on images and their tags, on CAMs of theirs, on images alone (pre-training) or on episodes.

    Writes weights.safetensors at the end, and on the way last.ckpt, metrics.csv and TensorBoard's files; of methods
    that keep the maps of the images they see (group_wsss) also these, as CamSets in attention/. A training
    that was stopped goes on where last.ckpt was written when the same command is run again, and ends in the same
    weights; a finished one is left alone.

    Args:
        data: the training images; with masks for methods that learn to segment from a few.
        method: name (sfc, cam, ...), and where wanted backbone (a timm name), weights (local file for the backbone) and
            any field of the method's configuration, as in --method.name sfc --method.lr 0.05.
        trainer: epochs, batches, precision, devices.
        out: output folder.
        cams: folder of CamSets that make-cam wrote, for methods that learn from maps (drs_refine).

    Returns:
        The path of the weights.
    """
    if "name" not in method:
        raise FastcamError("method.name is missing; give the name of a method, such as sfc or cam")
    record = {"pass": "train", "data": dataclasses.asdict(data), "method": method, "trainer": trainer_record(trainer)}
    kind = method_class(method["name"]).kind
    if kind not in LEARNS:
        command = {"refiner": "refine", "regions": "mcof", "retrieval": "retrieve"}.get(kind, "segment")
        raise FastcamError(
            f"method {method['name']} is a {kind}, which does not learn from tags; use fastcam {command}"
        )
    source = {} if cams is None else input_record(cams, "make-cam")
    masks = getattr(method_class(method["name"]), "learns_from_masks", False)
    dataset = open_data(data, source.pop("classes", None), masks=masks, need_tags=kind != "pretraining")
    record |= {"cams": source} if source else {}
    record["classes"] = list(dataset.classes)
    if (out / WEIGHTS).is_file():
        open_pass(out, record)
        return out / WEIGHTS
    from fastcam.pipelines._fit import fit, seeded_init

    with seeded_init(trainer.seed):
        network: Any = create_method(num_classes=len(dataset.classes), **method)
    if getattr(network, "learns_from_maps", False) != (cams is not None):
        wanted = "leave cams out" if cams is not None else "give cams, a folder that make-cam wrote"
        learns = "from tags alone" if cams is not None else "from maps"
        raise FastcamError(f"method {network.name} learns {learns}; {wanted}")
    if cams is not None:
        missing = sorted(set(dataset.ids) - finished_ids(cams, ".npz"))
        if missing:
            count = f"{len(missing)} of {len(dataset)} images"
            raise FastcamError(f"{cams} has no CAMs for {count}, e.g. {missing[0]}; finish the make-cam pass first")
        transform = training_transform(trainer, network.normalize)
        return fit(network, Mapped(dataset, cams, transform), dataset.classes, trainer, out, record)
    if kind == "few-shot":
        episodes = network.training_episodes(dataset, trainer.crop, flip=trainer.flip)
        return fit(network, episodes, dataset.classes, trainer, out, record)
    tags = dataset.tags
    if tags is None and kind == "cam":
        raise FastcamError(f"the images in {data.images} have no tags; give data.tags")
    if tags is not None and hasattr(network, "set_tag_counts"):
        network.set_tag_counts(tags.sum(0))
    dataset.transform = method_transform(trainer, network)
    size = getattr(network, "group_size", 1)
    groups = GroupSampler(tags, size) if tags is not None and size > 1 else None
    if not keeps_maps(network):
        return fit(network, dataset, dataset.classes, trainer, out, record, groups=groups)
    if not (trainer.square and trainer.resize_long == (trainer.crop, trainer.crop) and not trainer.flip):
        raise FastcamError(
            f"method {network.name} keeps the maps of training images, so that each must be seen as a whole; set "
            f"trainer.square true, resize_long [{trainer.crop}, {trainer.crop}] and flip false, or method.accumulate "
            "false"
        )

    def finish(trained: Any) -> None:
        dataset.transform = None
        write_kept(trained, dataset, trainer.crop, out / ATTENTION, record)

    return fit(network, dataset, dataset.classes, trainer, out, record, finish, groups)
