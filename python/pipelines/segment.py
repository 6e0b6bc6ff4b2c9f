"""The segment pass: images and label PNGs to a segmentation network, and the network to masks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors

from fastcam.data import multi_scale
from fastcam.errors import FastcamError
from fastcam.io import open_pass, read_label_png, write_label_png
from fastcam.methods import create_method
from fastcam.pipelines._data import (
    Data,
    Images,
    Transform,
    file_fingerprint,
    input_record,
    load_trained,
    open_data,
    training_transform,
)
from fastcam.pipelines._parallel import PassResult, ordered_map, run_pass
from fastcam.pipelines._settings import WEIGHTS, TrainerConfig, trainer_record
from fastcam.pipelines.make_cam import pick_device
from fastcam.pipelines.refine import Crf, crf_scores


class Labelled(torch.utils.data.Dataset[dict[str, Any]]):
    """Images with the label PNGs of a pass in the place of true masks.

    Args:
        images: the images; their own masks are not used.
        labels: folder of `<id>.png`.
        transform: of the items.
    """

    def __init__(self, images: Images, labels: Path, transform: Transform) -> None:
        self.images = images
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.images[index]
        path = self.labels / f"{item['id']}.png"
        label = read_label_png(path)
        if label.shape != item["image"].shape[1:]:
            size = f"{item['image'].shape[2]} x {item['image'].shape[1]}"
            raise FastcamError(
                f"label {path} is {label.shape[1]} x {label.shape[0]} pixels, but its image is {size}; make it again"
            )
        known = len(self.images.classes)
        beyond = label[(label > known) & (label != 255)]
        if len(beyond):
            raise FastcamError(
                f"label {path} has value {int(beyond[0])}, expected 0 to {known} or 255; check data.classes"
            )
        item["mask"] = tv_tensors.Mask(label)
        return self.transform(item)


@torch.inference_mode()
def image_probabilities(network: Any, views: list[Tensor], size: Sequence[int], flip: bool) -> Tensor:
    """Probabilities of the labels `(C + 1, H, W)`: the mean over the views and their mirror images, on the CPU.

    Args:
        network: a trained segmenter, on its device.
        views: the image at several scales, normalised, `(3, h_s, w_s)` each.
        size: `(H, W)` of the image.
        flip: use mirror images too.
    """
    device = next(network.parameters()).device
    total: Tensor | None = None
    for view in views:
        batch = view[None].to(device, non_blocking=True)
        logits = network.logits(torch.cat([batch, batch.flip(-1)]) if flip else batch).float()
        p = F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False).softmax(1)
        p = p[0] + p[1].flip(-1) if flip else p[0]
        total = p if total is None else total + p
    assert total is not None
    return (total / (len(views) * (2 if flip else 1))).cpu()


def train_segmenter(data: Data, labels: Path, method: dict[str, Any], trainer: TrainerConfig, out: Path) -> Path:
    """Trains a segmentation network on label PNGs; see `segment`."""
    record = {"pass": "segment", "data": dataclasses.asdict(data), "method": method, "trainer": trainer_record(trainer)}
    source = input_record(labels, "label")
    images = open_data(data, source["classes"])
    missing = [image_id for image_id in images.ids if not (labels / f"{image_id}.png").is_file()]
    if missing:
        count = f"{len(missing)} of {len(images)} images"
        raise FastcamError(f"{labels} has no label for {count}, e.g. {missing[0]}; finish the label pass first")
    record |= {**source, "classes": list(images.classes)}
    if (out / WEIGHTS).is_file():
        open_pass(out, record)
        return out / WEIGHTS
    from fastcam.pipelines._fit import fit, seeded_init

    with seeded_init(trainer.seed):
        network: Any = create_method(num_classes=len(images.classes), **method)
    if network.kind != "segmenter":
        raise FastcamError(f"method {network.name} is a {network.kind}, expected a segmenter such as deeplab")
    transform = training_transform(trainer, network.normalize)
    return fit(network, Labelled(images, labels, transform), images.classes, trainer, out, record)


def predict_masks(
    data: Data,
    weights: Path,
    out: Path,
    scales: tuple[float, ...],
    flip: bool,
    known_tags: bool,
    crf: Crf | None,
    device: str,
    workers: int,
) -> PassResult:
    """Writes the masks of a trained segmenter; see `segment`."""
    if not scales or min(scales) <= 0:
        raise FastcamError(f"scales are {scales}, expected positive numbers")
    record = {"pass": "predict", "weights": file_fingerprint(weights), "scales": scales, "flip": flip}
    record["known_tags"] = known_tags
    record["crf"] = crf and crf.resolved()
    network, classes = load_trained(weights, "segmenter")
    dataset = open_data(data, classes, need_tags=known_tags)
    if known_tags and not dataset.tags_known:
        raise FastcamError(f"known_tags needs tags, and the images in {data.images} have none; give data.tags")
    network.to(pick_device(device), memory_format=torch.channels_last)
    open_pass(out, {**record, "classes": classes})
    views_of = functools.partial(multi_scale, scales=scales, mean=network.normalize[0], std=network.normalize[1])

    def read(image_id: str) -> tuple[str, Tensor, list[Tensor], Tensor]:
        item = dataset.by_id(image_id)
        image = item["image"].as_subclass(Tensor)
        allowed = item["tags"] > 0 if known_tags else torch.ones(len(classes), dtype=torch.bool)
        return image_id, image, views_of(image), torch.cat([torch.ones(1, dtype=torch.bool), allowed])

    def compute(job: tuple[str, Tensor, list[Tensor], Tensor]) -> tuple[str, Tensor, Tensor]:
        image_id, image, views, allowed = job
        return image_id, image, image_probabilities(network, views, image.shape[1:], flip) * allowed[:, None, None]

    def write(done: tuple[str, Tensor, Tensor]) -> None:
        image_id, image, p = done
        p = p if crf is None else crf_scores(p, image, crf)
        write_label_png(out / f"{image_id}.png", p.argmax(0))

    def work(ids: Iterable[str]) -> Iterator[None]:
        return ordered_map(write, map(compute, ordered_map(read, ids, workers)), workers)

    return run_pass("predict", out, ".png", dataset.ids, work)


def segment(
    data: Data,
    out: Path,
    labels: Path | None = None,
    method: dict[str, Any] | None = None,
    trainer: TrainerConfig = TrainerConfig(),  # noqa: B008 (frozen)
    predict: Path | None = None,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = True,
    known_tags: bool = False,
    crf: Crf | None = None,
    device: str = "auto",
    workers: int = 2,
) -> Path | PassResult:
    """Trains a segmentation network on label PNGs (with labels), or predicts masks with a trained one (with predict).

    Training writes weights.safetensors, last.ckpt and metrics.csv as the train pass does, and continues and skips as it
    does. Predicting writes one palette .png an image.

    Args:
        data: the images.
        out: output folder.
        labels: folder of .png labels to train on; 255 is ignored.
        method: name (deeplab), and where wanted backbone, weights and any field of the method's configuration.
        trainer: epochs, batches, precision, devices of a training.
        predict: weights.safetensors of a trained network; predicts instead of training.
        scales: factors of the image's size whose probabilities are averaged, for predict.
        flip: average over mirror images too, for predict.
        known_tags: keep masks to the classes among the image's tags, as CAMs are, for predict.
        crf: CRF on the probabilities, for predict; crf.preset deeplab is usual.
        device: auto, cpu or cuda, for predict.
        workers: threads that read images and write masks, for predict.
    """
    if (labels is None) == (predict is None):
        raise FastcamError("expected either labels (to train) or predict (weights, to write masks); give one of them")
    if predict is not None:
        return predict_masks(data, predict, out, scales, flip, known_tags, crf, device, workers)
    if method is None or "name" not in method:
        raise FastcamError("method.name is missing; give the name of a segmenter, such as deeplab")
    assert labels is not None
    return train_segmenter(data, labels, method, trainer, out)
