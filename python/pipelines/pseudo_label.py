"""make-cam, refine and label in one go, on anyone's folder of images."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastcam.data import multi_scale
from fastcam.errors import FastcamError
from fastcam.io import CamSet, open_pass, write_label_png
from fastcam.pipelines._data import Data, file_fingerprint, load_trained, open_data
from fastcam.pipelines._parallel import PassResult, ordered_map, run_pass
from fastcam.pipelines.label import Rule, label_image
from fastcam.pipelines.make_cam import SCALES, image_cams, pick_device
from fastcam.pipelines.refine import Crf


def pseudo_label(
    images: Path,
    weights: Path,
    out: Path,
    labels: Path | None = None,
    scales: tuple[float, ...] = SCALES,
    threshold: float | None = None,
    power: float | None = None,
    high: float | None = None,
    low: float | None = None,
    min_score: float | None = None,
    crf: Crf | None = Crf(),  # noqa: B008 (frozen)
    tag_threshold: float = 0.5,
    device: str = "auto",
    workers: int = 2,
) -> PassResult:
    """Makes a label PNG of every image in a folder: CAMs, refined by a CRF, to labels.

    One rule decides: a threshold, a power, high and low together, or none of them for methods whose CAMs have a
    background of their own (SFC).

    Args:
        images: folder of images; sub-folders are searched too.
        weights: weights.safetensors of a finished train pass.
        out: output folder, one palette .png an image: 0 background, class k + 1, 255 ignored.
        labels: CSV with the tags of every image (image,tag tag ... or one 0/1 column a class); without it the
            classifier chooses the classes.
        scales: factors of the image's size.
        threshold: constant score of the background.
        power: score of the background is (1 - largest CAM)^power.
        high: with low: foreground is what beats this constant.
        low: background is what does not even beat this constant; pixels between the two become 255.
        min_score: pixels whose best score is lower become 255.
        crf: the CRF; null leaves the CAMs as they are.
        tag_threshold: smallest probability of a class, without labels.
        device: auto, cpu or cuda.
        workers: threads that read images, refine and write labels.
    """
    rule = Rule(threshold, power, high, low, min_score)
    rule.check()
    if not scales or min(scales) <= 0:
        raise FastcamError(f"scales are {scales}, expected positive numbers")
    record = {
        "pass": "pseudo-label",
        "weights": file_fingerprint(weights),
        "scales": scales,
        **dataclasses.asdict(rule),
    }
    record["crf"] = crf and crf.resolved()
    network, classes = load_trained(weights, "cam")
    dataset = open_data(Data(images=str(images), tags=None if labels is None else str(labels.absolute())), classes)
    if labels is None:
        record["tag_threshold"] = tag_threshold
    network.to(pick_device(device), memory_format=torch.channels_last)
    open_pass(out, {**record, "tags": "given" if labels else "predicted", "classes": classes})
    views_of = functools.partial(multi_scale, scales=scales, mean=network.normalize[0], std=network.normalize[1])

    def read(image_id: str) -> tuple[str, Tensor, list[Tensor], Tensor | None]:
        item = dataset.by_id(image_id)
        image = item["image"].as_subclass(Tensor)
        return image_id, image, views_of(image), item.get("tags")

    def compute(job: tuple[str, Tensor, list[Tensor], Tensor | None]) -> tuple[str, Tensor, CamSet]:
        image_id, image, views, tags = job
        return image_id, image, image_cams(network, views, image.shape[1:], tags, stride=1, tag_threshold=tag_threshold)

    def write(done: tuple[str, Tensor, CamSet]) -> None:
        image_id, image, cams = done
        write_label_png(out / f"{image_id}.png", label_image(cams, image_id, rule, crf, image))

    def work(ids: Iterable[str]) -> Iterator[None]:
        return ordered_map(write, map(compute, ordered_map(read, ids, workers)), workers)

    return run_pass("pseudo-label", out, ".png", dataset.ids, work)
