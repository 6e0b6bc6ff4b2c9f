"""The convert command: label PNGs, COCO's JSON, CAM stores and IRN's .npy files into each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from fastcam.data import VOC_CLASSES, load_class_list
from fastcam.errors import FastcamError
from fastcam.io import (
    CamSet,
    finished_ids,
    load_cams,
    load_irn_npy,
    read_label_png,
    read_pass,
    save_cams,
    save_irn_npy,
    write_label_png,
)
from fastcam.io.coco import CocoImage, label_rle, read_coco, write_coco
from fastcam.io.convert import IGNORE, cams_to_irn, cams_to_label, irn_to_cams, label_to_cams

Form = Literal["png", "coco", "cams", "irn"]
SUFFIXES = {"png": ".png", "cams": ".npz", "irn": ".npy"}


def convert(
    source: Path,
    to: Form,
    out: Path,
    classes: str | None = None,
    maps: Literal["cam", "high_res"] = "cam",
    threshold: float | None = None,
) -> Path:
    """Converts labels and maps: label PNGs, COCO's JSON, CAM stores (.npz), IRN's .npy files (read without pickle).

    Labels become maps of 0 and 1, and these become the same labels again. Maps become labels by their own background
    or a threshold. Between CAM stores and IRN's files values stay as they are, but CAM stores round to float16.

    Args:
        source: a folder of .png, .npz or .npy files, or a COCO .json file.
        to: png, coco, cams or irn.
        out: the folder to write; for coco the file.
        classes: voc, coco, names with commas between, or a file: names and order of the classes in COCO's JSON. By
            default those of the pass that made the source, else those in the JSON, else voc.
        maps: which maps of IRN's files are taken, those at a quarter of the size or those at full size.
        threshold: constant score of the background, where maps without one become labels; one half of what
            IRN's files made from labels hold.

    Returns:
        What was written.
    """
    form = _form(source)
    record = read_pass(source) if source.is_dir() else None
    known = load_class_list(classes) if classes else (record or {"config": {}})["config"].get("classes")
    items = _items(source, form, known, maps)
    if to == "coco":
        names = known or VOC_CLASSES
        images = (_coco_image(image_id, _label(item, threshold), names) for image_id, item in items)
        write_coco(out, images, names)
        return out
    write: dict[str, Callable[[Path, Tensor | CamSet], None]] = {
        "png": lambda path, item: write_label_png(path, _label(item, threshold)),
        "cams": lambda path, item: save_cams(path, _cams(item)),
        "irn": lambda path, item: save_irn_npy(path, **_irn(item)),
    }
    for image_id, item in items:
        try:
            write[to](out / f"{image_id}{SUFFIXES[to]}", item)
        except FastcamError as error:
            raise FastcamError(f"{image_id} of {source}: {error}") from error
    return out


def _form(source: Path) -> Form:
    if source.suffix == ".json" and source.is_file():
        return "coco"
    if not source.is_dir():
        raise FastcamError(f"source {source} is neither a folder nor a .json file; give one of them")
    counts: dict[Form, int] = {
        "png": len(finished_ids(source, ".png")),
        "cams": len(finished_ids(source, ".npz")),
        "irn": len(finished_ids(source, ".npy")),
    }
    best = max(counts, key=lambda form: counts[form])
    if not counts[best]:
        raise FastcamError(f"source folder {source} holds no .png, .npz or .npy file; give another one")
    return best


def _items(source: Path, form: Form, classes: Sequence[str] | None, maps: str) -> Iterator[tuple[str, Tensor | CamSet]]:
    if form == "coco":
        yield from tqdm(read_coco(source, classes), desc="convert", unit="image", disable=None)
        return
    for image_id in tqdm(sorted(finished_ids(source, SUFFIXES[form])), desc="convert", unit="image", disable=None):
        path = source / f"{image_id}{SUFFIXES[form]}"
        if form == "png":
            yield image_id, read_label_png(path)
        elif form == "cams":
            yield image_id, load_cams(path)
        else:
            yield image_id, irn_to_cams(load_irn_npy(path), maps)


def _label(item: Tensor | CamSet, threshold: float | None) -> Tensor:
    return item if isinstance(item, Tensor) else cams_to_label(item, threshold)


def _cams(item: Tensor | CamSet) -> CamSet:
    return label_to_cams(item) if isinstance(item, Tensor) else item


def _irn(item: Tensor | CamSet) -> dict[str, Tensor]:
    return cams_to_irn(_cams(item))


def _coco_image(image_id: str, label: Tensor, classes: Sequence[str]) -> CocoImage:
    last = int(label[label != IGNORE].max()) if bool((label != IGNORE).any()) else 0
    if last > len(classes):
        raise FastcamError(f"{image_id} has label {last}, but there are {len(classes)} classes; give the classes")
    return CocoImage(image_id, f"{image_id}.jpg", (label.shape[0], label.shape[1]), label_rle(label.to(torch.uint8)))
