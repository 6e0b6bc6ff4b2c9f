"""The demo: all passes, from tags to scored masks, on a data set that draws itself."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

from fastcam.data import write_procedural
from fastcam.pipelines._data import Data
from fastcam.pipelines._settings import TrainerConfig
from fastcam.pipelines.evaluate import evaluate
from fastcam.pipelines.label import label
from fastcam.pipelines.make_cam import make_cam
from fastcam.pipelines.refine import Crf, refine
from fastcam.pipelines.report import report
from fastcam.pipelines.segment import segment
from fastcam.pipelines.train import train

# timm's smallest ResNet: learns to tell six painted animals apart in under a minute.
BACKBONE = {"backbone": "test_resnet", "frozen_stages": 0, "frozen_norm": False}
# A few hundred steps from random weights: the losses between maps must not outweigh the one that names the animals.
SFC = {"name": "sfc", **BACKBONE, "lr": 0.3, "head_lr_factor": 1.0, "prototype_loss": 0.4, "weight_loss": 0.4}
SFC |= {"bank_draws": 2, "center_features": True, "side_channels": [16, 32, 32, 64], "correlation_channels": 64}
DEEPLAB = {"name": "deeplab", **BACKBONE, "lr": 0.1, "rates": [2, 4], "head_channels": 64, "low_level_channels": 16}
DEEPLAB |= {"class_weights": [1.0, 1.5, 3.0, 1.5, 3.0, 2.0, 3.0]}  # lion, goat and mouse: rarer than their twins


class DemoResult(NamedTuple):
    """What the demo ends in.

    Attributes:
        scores: mIoU of the CAMs, the labels and the network's masks, on train and on val; of the masks twice: among the
            image's tags, as CAMs and labels are, and from the image alone.
        report: the HTML file.
        seconds: wall-clock time.
    """

    scores: dict[str, tuple[float, float]]
    report: Path
    seconds: float

    def __str__(self) -> str:
        rows = [f"{name:<34}{100 * a:>7.1f}{100 * b:>7.1f}" for name, (a, b) in self.scores.items()]
        head = f"{'mIoU, %':<34}{'train':>7}{'val':>7}"
        return "\n".join(["", head, *rows, "", f"{self.seconds:.0f} seconds; open the report: {self.report}"])


def demo(
    out: Path = Path("runs/demo"),
    train_images: int = 240,
    val_images: int = 80,
    epochs: int = 18,
    segment_epochs: int = 14,
    seed: int = 0,
    workers: int = 2,
) -> DemoResult:
    """Runs the whole pipeline on painted animals: no download, under three minutes on two CPU cores.

    Writes a data set in VOC's layout, trains SFC on its tags only, makes CAMs of several scales, sharpens them with the
    CRF, writes labels, trains a segmentation network on them, scores all of it against the true masks and writes a
    report. A demo that was stopped goes on where it was when it is run again.

    Args:
        out: folder for all of it.
        train_images: images to learn from.
        val_images: images to test on.
        epochs: of the CAM network.
        segment_epochs: of the segmentation network.
        seed: of the data set and the trainings.
        workers: threads that read and write images.
    """
    start = time.perf_counter()
    root = out / "data"
    learn = Data(root=str(root), split="train", tags="image_labels.csv")
    test = Data(root=str(root), split="val", tags="image_labels.csv")
    both = Data(root=str(root), split="train+val", tags="image_labels.csv")
    trainer: dict[str, Any] = {"batch_size": 16, "crop": 128, "resize_long": (112, 160), "workers": 0, "seed": seed}

    def step(number: int, what: str) -> None:
        print(f"[{time.perf_counter() - start:5.0f} s] {number}/8 {what}", flush=True)

    step(1, f"drawing {train_images + val_images} images of six animals into {root}")
    if not (root / "image_labels.csv").is_file():  # the last file to be written
        write_procedural(root, train=train_images, val=val_images, seed=seed)
    step(2, "training SFC on image-level tags, from random weights")
    weights = train(learn, SFC, TrainerConfig(epochs=epochs, **trainer), out / "train")
    step(3, "making class activation maps of four scales and their mirror images")
    make_cam(both, weights, out / "cams", workers=workers)
    step(4, "sharpening them with a fully connected CRF")
    refine(both, out / "cams", out / "refined", crf=Crf(sxy=24, srgb=9), workers=workers)
    step(5, "writing label PNGs")
    label(out / "refined", out / "labels", workers=workers)
    step(6, "training a segmentation network on these labels, from SFC's backbone")
    method = {**DEEPLAB, "weights": str(weights)}
    segmenter = segment(learn, out / "segment", out / "labels", method, TrainerConfig(epochs=segment_epochs, **trainer))
    assert isinstance(segmenter, Path)
    segment(both, out / "predictions", predict=segmenter, known_tags=True, workers=workers)
    segment(both, out / "predictions_alone", predict=segmenter, workers=workers)
    step(7, "scoring CAMs, refined CAMs, labels and masks against the truth, which nothing has seen until now")
    mean = {}
    for stage in ("cams", "refined", "labels", "predictions", "predictions_alone"):
        for data in (learn, test):
            scores = evaluate(data, out / stage, out / "scores" / data.split / stage, workers=workers)
            mean[stage, data.split] = scores["mean_iou"]["skip"]
    step(8, "writing the report")
    path = report(out)
    names = {
        "cams": "CAMs (given the tags)",
        "labels": "labels (CAMs and CRF)",
        "predictions": "network (given the tags)",
        "predictions_alone": "network (the image alone)",
    }
    table = {name: (mean[stage, "train"], mean[stage, "val"]) for stage, name in names.items()}
    return DemoResult(table, path, time.perf_counter() - start)
