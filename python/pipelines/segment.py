"""The segment pass: images and label PNGs to a segmentation network, and the network to masks."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision import tv_tensors

from fastcam.data import multi_scale
from fastcam.data.folder import read_mask
from fastcam.errors import FastcamError
from fastcam.io import open_pass, write_label_png
from fastcam.methods import create_method
from fastcam.pipelines._data import (
    Data,
    Images,
    Transform,
    file_fingerprint,
    input_record,
    load_trained,
    method_transform,
    open_data,
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
        void: value of labels that means nothing is known, as 255 does.
    """

    def __init__(self, images: Images, labels: Path, transform: Transform, void: int | None = None) -> None:
        self.images = images
        self.labels = labels
        self.transform = transform
        self.void = void

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self.images[index]
        path = self.labels / f"{item['id']}.png"
        item["mask"] = tv_tensors.Mask(read_mask(path, len(self.images.classes), item["image"].shape[1:], self.void))
        return self.transform(item)


class Drawn(torch.utils.data.Dataset[dict[str, Any]]):
    """Unlabelled images in their order, and with each of them labelled ones that are drawn by chance.

    An item has `"unlabelled"` float `(3, S, S)`, and the labelled `"image"` `(3, S, S)` and `"mask"` `(S, S)`; with K
    subsets one of each, stacked: `"image"` `(K, 3, S, S)` and `"mask"` `(K, S, S)`. The draws come from torch's global
    generator, as those of the transforms do.

    Args:
        labelled: the labelled images.
        unlabelled: the others; without any, an item is labelled images alone, and there are as many items as these.
        subsets: indices of the labelled images that each of K networks learns from, for methods that train several.
    """

    def __init__(self, labelled: Labelled, unlabelled: Images | None, subsets: Sequence[Sequence[int]] | None) -> None:
        self.labelled = labelled
        self.unlabelled = unlabelled
        self.subsets = subsets

    def __len__(self) -> int:
        return len(self.labelled if self.unlabelled is None else self.unlabelled)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: dict[str, Any]
        if self.subsets is None:
            item = self.labelled[int(torch.randint(len(self.labelled), ()))]
        else:
            drawn = [self.labelled[subset[int(torch.randint(len(subset), ()))]] for subset in self.subsets]
            item = {name: torch.stack([one[name] for one in drawn]) for name in ("image", "mask")}
        if self.unlabelled is not None:
            item["unlabelled"] = self.unlabelled[index]["image"]
        return item


Fuse = Literal["prob", "logits", "exp_logits"]


def window_logits(network: Any, images: Tensor, window: int) -> Tensor:
    """Logits `(B, K, H, W)` of windows that overlap by at least a third, averaged; the last ones end with the image.

    Args:
        network: a segmenter.
        images: `(B, 3, H, W)`.
        window: side of the windows; images no larger are taken whole.
    """
    sides = images.shape[-2:]
    step = max(1, 2 * window // 3)
    starts = [
        sorted({min(start, max(side - window, 0)) for start in range(0, max(side - window, 0) + step, step)})
        for side in sides
    ]
    total, count = images.new_zeros(()), images.new_zeros(sides)
    for y, x in itertools.product(*starts):
        here = ..., slice(y, y + window), slice(x, x + window)
        logits = network.logits(images[here]).float()
        if total.ndim == 0:
            total = logits.new_zeros((*logits.shape[:2], *sides))
        total[here] += logits
        count[here] += 1
    return total / count


@torch.inference_mode()
def image_probabilities(
    network: Any, views: list[Tensor], size: Sequence[int], flip: bool, fuse: Fuse = "prob", window: int = 0
) -> Tensor:
    """Probabilities of the labels `(C + 1, H, W)` from the views and their mirror images, on the CPU.

    Args:
        network: a trained segmenter, on its device.
        views: the image at several scales, normalised, `(3, h_s, w_s)` each.
        size: `(H, W)` of the image.
        flip: use mirror images too.
        fuse: what of the views is averaged: probabilities; logits; or the exponentials of logits, after those of a view
            and its mirror image were averaged (HRNet-OCR), which lets the sure views decide.
        window: side of the windows that views are cut into, or 0.
    """
    device = next(network.parameters()).device
    total: Tensor | None = None
    for view in views:
        batch = view[None].to(device, non_blocking=True)
        batch = torch.cat([batch, batch.flip(-1)]) if flip else batch
        logits = window_logits(network, batch, window) if window else network.logits(batch).float()
        logits = F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)
        both = logits.softmax(1) if fuse == "prob" else logits
        term = torch.stack([both[0], both[1].flip(-1)]).mean(0) if flip else both[0]
        if total is None:
            total = term
        else:  # sums of exponentials as logarithms, which cannot overflow
            total = torch.logaddexp(total, term) if fuse == "exp_logits" else total + term
    assert total is not None
    if fuse == "exp_logits":
        return total.softmax(0).cpu()
    mean = total / len(views)
    return (mean if fuse == "prob" else mean.softmax(0)).cpu()


def train_segmenter(
    data: Data,
    labels: Path,
    method: dict[str, Any],
    trainer: TrainerConfig,
    out: Path,
    unlabelled: Data | None = None,
) -> Path:
    """Trains a segmentation network on label PNGs, and on images without; see `segment`."""
    record = {"pass": "segment", "data": dataclasses.asdict(data), "method": method, "trainer": trainer_record(trainer)}
    source = input_record(labels, "label")
    images = open_data(data, source["classes"])
    missing = [image_id for image_id in images.ids if not (labels / f"{image_id}.png").is_file()]
    if missing:
        count = f"{len(missing)} of {len(images)} images"
        raise FastcamError(f"{labels} has no label for {count}, e.g. {missing[0]}; finish the label pass first")
    record |= {**source, "classes": list(images.classes)}
    if unlabelled is not None:
        record["unlabelled"] = dataclasses.asdict(unlabelled)
    if (out / WEIGHTS).is_file():
        open_pass(out, record)
        return out / WEIGHTS
    from fastcam.pipelines._fit import fit, seeded_init

    with seeded_init(trainer.seed):
        network: Any = create_method(num_classes=len(images.classes), **method)
    if network.kind != "segmenter":
        raise FastcamError(f"method {network.name} is a {network.kind}, expected a segmenter such as deeplab")
    if getattr(network, "learns_from_unlabelled", False) != (unlabelled is not None):
        wanted = "leave them out" if unlabelled is not None else "give unlabelled.root or unlabelled.images"
        learns = "does not learn" if unlabelled is not None else "learns"
        raise FastcamError(f"method {network.name} {learns} from unlabelled images; {wanted}")
    transform = method_transform(trainer, network)
    dataset: Any = Labelled(images, labels, transform, data.void)
    subsets = network.labelled_subsets(images.ids, trainer.seed) if hasattr(network, "labelled_subsets") else None
    if subsets is not None or unlabelled is not None:
        others = None
        if unlabelled is not None:
            others = open_data(unlabelled, images.classes, need_tags=False, transform=transform)
        dataset = Drawn(dataset, others, subsets)
    return fit(network, dataset, images.classes, trainer, out, record)


def predict_masks(
    data: Data,
    weights: Path,
    out: Path,
    scales: tuple[float, ...],
    flip: bool,
    fuse: Fuse,
    window: int,
    known_tags: bool,
    crf: Crf | None,
    device: str,
    workers: int,
    change: Mapping[str, Any] | None = None,
) -> PassResult:
    """Writes the masks of a trained segmenter; see `segment`."""
    if not scales or min(scales) <= 0:
        raise FastcamError(f"scales are {scales}, expected positive numbers")
    if window < 0:
        raise FastcamError(f"window is {window}, expected pixels, or 0 for whole images")
    record = {"pass": "predict", "weights": file_fingerprint(weights), "scales": scales, "flip": flip}
    record |= {"fuse": fuse, "window": window, "known_tags": known_tags}
    record["crf"] = crf and crf.resolved()
    record |= {"change": change} if change else {}
    network, classes = load_trained(weights, "segmenter", change or {})
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
        p = image_probabilities(network, views, image.shape[1:], flip, fuse, window)
        return image_id, image, p * allowed[:, None, None]

    def write(done: tuple[str, Tensor, Tensor]) -> None:
        image_id, image, p = done
        p = p if crf is None else crf_scores(p, image, crf)
        write_label_png(out / f"{image_id}.png", p.max(0).indices)

    def work(ids: Iterable[str]) -> Iterator[None]:
        return ordered_map(write, map(compute, ordered_map(read, ids, workers)), workers)

    return run_pass("predict", out, ".png", dataset.ids, work)


def segment(
    data: Data,
    out: Path,
    labels: Path | None = None,
    method: dict[str, Any] | None = None,
    trainer: TrainerConfig = TrainerConfig(),  # noqa: B008 (frozen)
    unlabelled: Data | None = None,
    predict: Path | None = None,
    scales: tuple[float, ...] = (1.0,),
    flip: bool = True,
    fuse: Fuse = "prob",
    window: int = 0,
    known_tags: bool = False,
    crf: Crf | None = None,
    change: dict[str, Any] | None = None,
    device: str = "auto",
    workers: int = 2,
) -> Path | PassResult:
    """Trains a segmentation network on label PNGs (with labels), or predicts masks with a trained one (with predict).

    Semi-supervised methods learn from more images than have labels: a step sees batch_size of the unlabelled ones, and
    as many labelled ones that are drawn (for each network, where there are several). Training writes
    weights.safetensors, last.ckpt and metrics.csv as the train pass does, and continues and skips as it does.
    Predicting writes one palette .png an image.

    Args:
        data: the images.
        out: output folder.
        labels: folder of .png labels to train on; 255 is ignored.
        method: name (deeplab, ocr, cotraining or cyclegan), and where wanted backbone, weights and any field of the
            method's configuration.
        trainer: epochs, batches, precision, devices of a training.
        unlabelled: images without labels, for methods that learn from such (cotraining, cyclegan).
        predict: weights.safetensors of a trained network; predicts instead of training.
        scales: factors of the image's size whose results are averaged, for predict.
        flip: average over mirror images too, for predict.
        fuse: average prob (probabilities), logits, or exp_logits (exponentials of logits), for predict.
        window: side of windows that larger images are cut into, a third overlapping; 0 for whole images, for predict.
        known_tags: keep masks to the classes among the image's tags, as CAMs are, for predict.
        crf: CRF on the probabilities, for predict; crf.preset deeplab is usual.
        change: fields of the method's configuration that differ from the training, for predict, as in
            --change.vote hard.
        device: auto, cpu or cuda, for predict.
        workers: threads that read images and write masks, for predict.
    """
    if (labels is None) == (predict is None):
        raise FastcamError("expected either labels (to train) or predict (weights, to write masks); give one of them")
    if predict is not None:
        return predict_masks(data, predict, out, scales, flip, fuse, window, known_tags, crf, device, workers, change)
    if method is None or "name" not in method:
        raise FastcamError("method.name is missing; give the name of a segmenter, such as deeplab")
    assert labels is not None
    return train_segmenter(data, labels, method, trainer, out, unlabelled)
