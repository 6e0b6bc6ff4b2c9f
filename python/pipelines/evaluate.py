"""The evaluate pass: label PNGs, CAMs or objects against masks."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastcam.errors import FastcamError
from fastcam.io import Instances, atomic_write, finished_ids, load_cams, load_instances, read_label_png
from fastcam.metrics import ConfusionMatrix, InstanceScores, VolumeScores, cam_threshold_sweep, iou, mean_iou
from fastcam.pipelines._data import Data, folder_classes, load_mask, open_data
from fastcam.pipelines._parallel import ordered_map
from fastcam.pipelines.label import to_labels

ABSENT: tuple[Literal["skip", "zero", "gt_only"], ...] = ("skip", "zero", "gt_only")
THRESHOLDS = [round(0.01 * step, 2) for step in range(100)]


def evaluate(
    data: Data,
    predictions: Path,
    out: Path | None = None,
    threshold: float | None = None,
    ignored: Literal["background", "skip"] = "background",
    objects: Path = Path("SegmentationObject"),
    volumes: Path | None = None,
    workers: int = 2,
) -> dict[str, Any]:
    """Scores label PNGs, CAMs or objects against the masks of a data set, and writes scores.json.

    Objects (.json) are scored by average precision over regions, AP^r, and by the best overlap with each true object.
    All counts of labels and CAMs go into one confusion matrix over the data set. CAMs are scored at a threshold, or
    with their own background; every constant threshold from 0 to 0.99 is scored beside it, and without a threshold or a
    background of their own the best one stands for them.

    Args:
        data: the data set with masks.
        predictions: folder of .png labels, of CamSets that make-cam or refine wrote, or of .json objects.
        out: folder for scores.json; the folder of the predictions if it is not given.
        threshold: constant score of the background, for CAMs.
        ignored: what a predicted 255 counts as: background (IRN), or nothing (AFA; flatters labels that ignore much).
        volumes: CSV (image, volume, slice, spacing_z, spacing_y, spacing_x) that says which images are slices of a
            volume: labels are scored by Dice and HD95 of volumes too. The acdc command writes volumes.csv.
        objects: folder of PNGs that number the true objects, below data.root or absolute, for predicted objects.
        workers: images that are read at the same time.

    Returns:
        What scores.json holds: "data" as given; "predictions", relative to the folder of scores.json; "images";
        "classes", background first; "mean_iou" by the rule for absent classes ("skip", "zero", "gt_only"); "iou" by
        class (rule "skip"; null without pixels); "confusion", rows true; for CAMs "threshold" (null: their own
        background) and "sweep" {"thresholds", "mean_iou", "best_threshold", "best_mean_iou"}; for labels "ignored",
        the fraction of predicted 255. Of objects "thresholds" of the overlap, "mean_ap" at each, "ap" by class at each
        (null without true objects), "best_overlap" by class and "mean_best_overlap", "objects": their number by class.
        Of volumes "volumes" {"count"; by class, background aside, "dice", "slice_dice" (mean over slices; both 1 for a
        class that is neither true nor predicted), "hd95" over the volumes where the class is true and predicted, and
        "missed", the number where it is only one of both; "mean_dice", ...; "of": the scores of each volume}.

    Raises:
        FastcamError: no masks, no or missing predictions, or a mask of another size than its prediction.
    """
    dataset = open_data(data, folder_classes(predictions), masks=True)
    found = {suffix: finished_ids(predictions, suffix) for suffix in (".npz", ".png", ".json")}
    suffix = max(found, key=lambda kind: len(found[kind] & set(dataset.ids)))
    missing = [image_id for image_id in dataset.ids if image_id not in found[suffix]]
    if missing:
        count = f"{len(missing)} of {len(dataset.ids)} images"
        raise FastcamError(f"{predictions} has no prediction for {count}, e.g. {missing[0]}; finish that pass first")
    where = {"data": dataclasses.asdict(data), "predictions": os.path.relpath(predictions, out or predictions)}
    if suffix == ".json":
        root = Path(data.root or "", objects)
        scores = {**where, "images": len(dataset.ids), **_score_instances(dataset, predictions, root, workers)}
        return _written(out or predictions, scores)
    names = ["background", *dataset.classes]
    if volumes is not None and suffix != ".png":
        raise FastcamError(f"volumes {volumes} are for labels, and {predictions} holds other files; leave it out")
    score = _score_cams if suffix == ".npz" else _score_labels
    confusion, further = score(dataset, predictions, len(names), threshold, ignored, workers)
    scores = {
        **where,
        "images": len(dataset.ids),
        "classes": names,
        "mean_iou": {absent: _number(mean_iou(confusion, absent)) for absent in ABSENT},
        "iou": dict(zip(names, [_number(value) for value in iou(confusion).tolist()], strict=True)),
        **further,
        "confusion": confusion.tolist(),
    }
    if volumes is not None:
        scores["volumes"] = _score_volumes(dataset, predictions, volumes, workers)
    return _written(out or predictions, scores)


def _written(folder: Path, scores: dict[str, Any]) -> dict[str, Any]:
    with atomic_write(folder / "scores.json") as temporary:
        temporary.write_text(json.dumps(scores, indent=2) + "\n")
    return scores


def table(scores: dict[str, Any]) -> str:
    """What `evaluate` returned as lines of text."""
    if "ap" in scores:
        return _instance_table(scores)
    mean = scores["mean_iou"]
    lines = [f"{'class':<16} IoU %"]
    lines += [f"{name:<16} {_percent(value)}" for name, value in scores["iou"].items()]
    lines += [f"{'mean':<16} {_percent(mean['skip'])}   over {scores['images']} images"]
    if mean["zero"] != mean["skip"] or mean["gt_only"] != mean["skip"]:
        lines += [
            f"{'  absent as 0':<16} {_percent(mean['zero'])}",
            f"{'  in masks only':<16} {_percent(mean['gt_only'])}",
        ]
    if "sweep" in scores:
        best, at = scores["sweep"], scores["threshold"]
        lines += [f"background: {'its own' if at is None else f'threshold {at}'}"]
        lines += [f"best threshold: {best['best_threshold']} gives {_percent(best['best_mean_iou']).strip()}"]
    elif scores["ignored"]:
        lines += [f"predicted 255: {_percent(scores['ignored']).strip()} % of the pixels"]
    if "volumes" in scores:
        lines += _volume_table(scores["volumes"])
    return "\n".join(lines)


def _volume_table(scores: dict[str, Any]) -> list[str]:
    lines = [f"{'volumes':<16} Dice %  by slice    HD95  missed"]
    rows = [(name, *(scores[key][name] for key in ("dice", "slice_dice", "hd95", "missed"))) for name in scores["dice"]]
    rows += [("mean", scores["mean_dice"], scores["mean_slice_dice"], scores["mean_hd95"], sum(row[4] for row in rows))]
    for name, overlap, slices, distance, missed in rows:
        far = "-" if distance is None else f"{distance:.2f}"
        lines += [f"{name:<16}  {_percent(overlap)}     {_percent(slices)} {far:>7} {missed:>7}"]
    return [*lines, f"over {scores['count']} volumes"]


def _instance_table(scores: dict[str, Any]) -> str:
    lines = [f"{'class':<16} " + " ".join(f"{f'AP {t}':>7}" for t in scores["thresholds"]) + "     ABO objects"]
    rows = [(name, scores["ap"][name], scores["best_overlap"][name], n) for name, n in scores["objects"].items()]
    rows += [("mean", scores["mean_ap"], scores["mean_best_overlap"], sum(scores["objects"].values()))]
    lines += [
        f"{name:<16} " + " ".join(f"{_percent(value):>7}" for value in [*ap, best]) + f" {count:>7}"
        for name, ap, best, count in rows
    ]
    return "\n".join([*lines, f"over {scores['images']} images"])


def _percent(value: float | None) -> str:
    return "    -" if value is None else f"{100 * value:5.1f}"


def true_objects(labels: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The objects of an image.

    Args:
        labels: of every pixel, uint8 `(H, W)`: 0 background, 255 ignored.
        numbers: uint8 `(H, W)`: 0 and 255 no object, else the object's number.

    Returns:
        Masks bool `(M, H, W)` and classes int64 `(M,)`, label - 1: the commonest label below 255 of an object's pixels.
        What is mostly background is no object of these classes.
    """
    masks, classes = [], []
    for number in numbers.unique().tolist():
        mask = numbers == number
        inside = labels[mask & (labels != 255)]
        if number in (0, 255) or len(inside) == 0 or (label := int(inside.bincount().argmax())) == 0:
            continue
        masks.append(mask)
        classes.append(label - 1)
    empty = torch.zeros(0, *labels.shape, dtype=torch.bool)
    return torch.stack(masks) if masks else empty, torch.tensor(classes, dtype=torch.int64)


def _score_instances(dataset: Any, folder: Path, objects: Path, workers: int) -> dict[str, Any]:
    scores = InstanceScores(len(dataset.classes))

    def read(image_id: str) -> tuple[Instances, Tensor, Tensor, Tensor]:
        found = load_instances(folder / f"{image_id}.json")
        if len(found.classes) and int(found.classes.max()) >= len(dataset.classes):
            at = f"{folder / image_id}.json has label {int(found.classes.max()) + 1}"
            raise FastcamError(f"{at}, expected 1 to {len(dataset.classes)}; check data.classes")
        labels = load_mask(dataset, image_id, found.masks.shape[1:])
        numbers = read_label_png(objects / f"{image_id}.png")
        if numbers.shape != labels.shape:
            size = f"{numbers.shape[1]} x {numbers.shape[0]}"
            raise FastcamError(
                f"objects {objects / image_id}.png are {size} pixels, their mask is not; make them alike"
            )
        return found, *true_objects(labels, numbers), labels == 255

    for image in ordered_map(read, dataset.ids, workers):
        scores.update(*image)
    ap, best = scores.average_precision(), scores.best_overlap()
    return {
        "classes": list(dataset.classes),
        "thresholds": list(scores.thresholds),
        "mean_ap": [_number(value) for value in ap.nanmean(dim=0).tolist()],
        "ap": {k: [_number(v) for v in row] for k, row in zip(dataset.classes, ap.tolist(), strict=True)},
        "mean_best_overlap": _number(float(best.nanmean())),
        "best_overlap": {k: _number(v) for k, v in zip(dataset.classes, best.tolist(), strict=True)},
        "objects": dict(zip(dataset.classes, scores.objects, strict=True)),
    }


def _score_labels(
    dataset: Any,
    folder: Path,
    labels: int,
    threshold: float | None,
    ignored: Literal["background", "skip"],
    workers: int,
) -> tuple[Tensor, dict[str, Any]]:
    if threshold is not None:
        raise FastcamError(f"threshold {threshold} is for CAMs, and {folder} holds labels; leave it out")
    metric = ConfusionMatrix(labels, predicted_ignore=ignored)
    blank = pixels = 0

    def read(image_id: str) -> tuple[str, Tensor, Tensor]:
        pred = read_label_png(folder / f"{image_id}.png")
        return image_id, pred, load_mask(dataset, image_id, pred.shape)

    for image_id, pred, mask in ordered_map(read, dataset.ids, workers):
        beyond = pred[(pred >= labels) & (pred != 255)]
        if len(beyond):
            wanted = f"0 to {labels - 1} or 255 for {labels - 1} classes"
            raise FastcamError(
                f"{folder / image_id}.png has label {int(beyond[0])}, expected {wanted}; check data.classes"
            )
        metric.update(pred, mask)
        blank += int((pred == 255).sum())
        pixels += pred.numel()
    return metric.compute(), {"ignored": blank / pixels}


def read_volumes(path: Path) -> dict[str, tuple[str, int, tuple[float, float, float]]]:
    """Image -> name of its volume, number of its slice, and spacing of slices, rows and columns.

    Raises:
        FastcamError: the file does not read, or a line is no such thing.
    """
    try:
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise FastcamError(f"volumes {path} do not read: {getattr(error, 'strerror', None) or error}") from None
    table = {}
    for line, row in enumerate(rows, 2):
        try:
            spacing = (float(row["spacing_z"]), float(row["spacing_y"]), float(row["spacing_x"]))
            table[row["image"]] = (row["volume"], int(row["slice"]), spacing)
            bad = not all(math.isfinite(step) and step > 0 for step in spacing)
        except (KeyError, TypeError, ValueError):
            bad = True
        if bad:
            wanted = "image,volume,slice,spacing_z,spacing_y,spacing_x with positive spacings"
            raise FastcamError(f"volumes {path}, line {line}: expected {wanted}")
    return table


def _score_volumes(dataset: Any, folder: Path, volumes: Path, workers: int) -> dict[str, Any]:
    table = read_volumes(volumes)
    slices: dict[str, list[str]] = {}
    for image_id in dataset.ids:
        if image_id not in table:
            raise FastcamError(f"volumes {volumes} do not name image {image_id}; give the file of this data set")
        slices.setdefault(table[image_id][0], []).append(image_id)
    metric = VolumeScores(len(dataset.classes) + 1)

    def read(name: str) -> tuple[str, Tensor, Tensor, tuple[float, float, float]]:
        ids = sorted(slices[name], key=lambda image_id: table[image_id][1])
        preds = [read_label_png(folder / f"{image_id}.png") for image_id in ids]
        masks = [load_mask(dataset, image_id, pred.shape) for image_id, pred in zip(ids, preds, strict=True)]
        if len({pred.shape for pred in preds}) > 1:
            raise FastcamError(f"slices of volume {name} have several sizes, e.g. {ids[0]}; check {volumes}")
        pred = torch.stack(preds)
        return name, pred.masked_fill(pred == 255, 0), torch.stack(masks), table[ids[0]][2]

    for volume in ordered_map(read, slices, workers):
        metric.update(*volume)
    overlap, by_slice, distance = (torch.stack(parts) for parts in (metric.dice, metric.slice_dice, metric.hd95))
    found = distance.where(distance.isfinite(), torch.nan)
    missed = distance.isinf().sum(0)
    scores: dict[str, Any] = {"count": len(metric.names)}
    for key, values in (("dice", overlap.mean(0)), ("slice_dice", by_slice.mean(0)), ("hd95", found.nanmean(0))):
        scores[key] = {k: _number(v) for k, v in zip(dataset.classes, values[1:].tolist(), strict=True)}
        scores[f"mean_{key}"] = _number(float(values[1:].nanmean()))
    scores["missed"] = dict(zip(dataset.classes, missed[1:].tolist(), strict=True))
    scores["of"] = {
        name: {
            "dice": [_number(v) for v in overlap[i, 1:].tolist()],
            "slice_dice": [_number(v) for v in by_slice[i, 1:].tolist()],
            "hd95": [_number(v) for v in found[i, 1:].tolist()],
        }
        for i, name in enumerate(metric.names)
    }
    return scores


def _score_cams(
    dataset: Any,
    folder: Path,
    labels: int,
    threshold: float | None,
    ignored: Literal["background", "skip"],
    workers: int,
) -> tuple[Tensor, dict[str, Any]]:
    metric = ConfusionMatrix(labels, predicted_ignore=ignored)
    thresholds = sorted({*THRESHOLDS, *([] if threshold is None else [threshold])})
    sweep = torch.zeros(len(thresholds), labels, labels, dtype=torch.int64)
    with_background = 0

    def count(image_id: str) -> tuple[Tensor, Tensor, Tensor | None]:
        camset = load_cams(folder / f"{image_id}.npz")
        if len(camset.keys) and int(camset.keys[-1]) >= labels - 1:
            at = f"{folder / image_id}.npz has class {int(camset.keys[-1])}"
            raise FastcamError(f"{at}, expected 0 to {labels - 2}; check data.classes")
        mask = load_mask(dataset, image_id, camset.size)
        pred = None if camset.background is None else to_labels(camset.scores().max(0).indices, camset.keys)
        return mask, cam_threshold_sweep(camset, mask, thresholds, labels - 1), pred

    for mask, counts, pred in ordered_map(count, dataset.ids, workers):
        sweep += counts
        if pred is not None:
            metric.update(pred, mask)
            with_background += 1
    if with_background not in (0, len(dataset.ids)):
        raise FastcamError(f"{folder} mixes CAMs with and without a background; make them again in an empty folder")
    means = [mean_iou(confusion) for confusion in sweep]
    best = max(range(len(means)), key=lambda i: -1.0 if math.isnan(means[i]) else means[i])
    record = {
        "thresholds": thresholds,
        "mean_iou": [_number(mean) for mean in means],
        "best_threshold": thresholds[best],
        "best_mean_iou": _number(means[best]),
    }
    if threshold is None and with_background:
        return metric.compute(), {"threshold": None, "sweep": record}
    at = best if threshold is None else thresholds.index(threshold)
    return sweep[at], {"threshold": thresholds[at], "sweep": record}


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value
