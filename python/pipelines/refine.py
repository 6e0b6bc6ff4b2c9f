"""The refine pass: CAMs and the image's colours to sharper CAMs, by a fully connected CRF."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastcam.errors import FastcamError
from fastcam.io import CamSet, load_cams, open_pass, save_cams
from fastcam.ops.crf_mean_field import crf_mean_field
from fastcam.ops.unaries import unary_from_labels, unary_from_softmax
from fastcam.pipelines._data import Data, folder_classes, input_record, load_image, open_data
from fastcam.pipelines._parallel import PassResult, ordered_map, run_pass

# Published settings (specs of their codes): iterations, Gaussian sxy and compat, bilateral sxy, srgb and compat, unary.
PRESETS: dict[str, dict[str, Any]] = {
    "irn": {"gaussian_sxy": 3, "gaussian_compat": 3, "sxy": 50, "srgb": 5, "compat": 10, "unary": "label"},
    "psa": {"gaussian_sxy": 3, "gaussian_compat": 3, "sxy": 80, "srgb": 13, "compat": 10, "unary": "softmax"},
    "deeplab": {"gaussian_sxy": 1, "gaussian_compat": 3, "sxy": 67, "srgb": 3, "compat": 4, "unary": "softmax"},
}


@dataclass(frozen=True)
class Crf:
    """A fully connected CRF. What is not given comes from the preset.

    Args:
        preset: irn (AFA and ToCo too), psa (SEAM too) or deeplab (DRS, CLIP-ES too).
        iterations: steps of mean field.
        gaussian_sxy: standard deviation of the spatial kernel, in pixels.
        gaussian_compat: weight of the spatial kernel.
        sxy: spatial standard deviation of the bilateral kernel, in pixels.
        srgb: colour standard deviation of the bilateral kernel, in grey levels.
        compat: weight of the bilateral kernel.
        unary: where the CRF starts: from the scores (softmax), or from their best label (label).
        gt_prob: confidence in that label, for unary label.
    """

    preset: Literal["irn", "psa", "deeplab"] = "irn"
    iterations: int = 10
    gaussian_sxy: float | None = None
    gaussian_compat: float | None = None
    sxy: float | None = None
    srgb: float | None = None
    compat: float | None = None
    unary: Literal["softmax", "label"] | None = None
    gt_prob: float = 0.7

    def resolved(self) -> dict[str, Any]:
        """All values by name, with the preset's where none is given.

        Raises:
            FastcamError: a value out of range.
        """
        given = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        values = {**PRESETS[self.preset], **given}
        for name in ("gaussian_sxy", "gaussian_compat", "sxy", "srgb", "compat", "iterations"):
            if not values[name] > 0:
                raise FastcamError(f"crf.{name} is {values[name]}, expected a number above 0")
        if not 0 < values["gt_prob"] < 1:
            raise FastcamError(f"crf.gt_prob is {values['gt_prob']}, expected a number between 0 and 1")
        return values


def crf_scores(scores: Tensor, image: Tensor, crf: Crf) -> Tensor:
    """Marginals of the CRF that starts from scores.

    Args:
        scores: float `(K, H, W)`, background first.
        image: uint8 `(3, H, W)`.
        crf: its parameters.

    Returns:
        float32 `(K, H, W)`, summing to 1. With one label there is nothing to decide: ones.
    """
    if len(scores) == 1:
        return torch.ones_like(scores)
    values = crf.resolved()
    if values["unary"] == "label":
        unary = unary_from_labels(scores.argmax(0)[None], len(scores), values["gt_prob"], zero_unsure=False)
    else:
        unary = unary_from_softmax(scores[None])
    return crf_mean_field(
        unary,
        image[None],
        iterations=values["iterations"],
        gaussian=(values["gaussian_sxy"], values["gaussian_compat"]),
        bilateral=(values["sxy"], values["srgb"], values["compat"]),
    )[0]


def own_background(cams: CamSet, image_id: str, background: float | None, power: float | None) -> Tensor:
    """`CamSet.scores` with a constant background, `(1 - max)^power`, or the stored one where neither is given.

    Raises:
        FastcamError: both are given, or none is given and none is stored.
    """
    if background is not None and power is not None:
        raise FastcamError(f"background {background} and power {power} exclude each other; give one of them")
    if power is not None:
        return cams.scores(("power", power))
    if background is None and cams.background is None:
        raise FastcamError(f"CAMs of {image_id} have no background of their own; give a background or a power")
    return cams.scores(background)


def refine(
    data: Data,
    cams: Path,
    out: Path,
    how: Literal["crf"] = "crf",
    crf: Crf = Crf(),
    background: float | None = None,
    power: float | None = None,
    workers: int = 2,
) -> PassResult:
    """Sharpens CAMs along the edges of the image.

    Only the classes that are present take part. The result is a CamSet at the size of the image with a background: the
    CRF's marginals.

    Args:
        data: the images.
        cams: folder of CamSets that make-cam wrote.
        out: output folder, one .npz an image.
        how: the way; crf is the fully connected CRF.
        crf: its parameters.
        background: constant score of the background beside the CAMs.
        power: score of the background is (1 - largest CAM)^power. Neither: the CAMs' own background.
        workers: images that are worked on at the same time.
    """
    dataset = open_data(data, folder_classes(cams), need_tags=False)
    record: dict[str, Any] = {"pass": "refine", "how": how, "crf": crf.resolved()}
    record |= {"background": background, "power": power, **input_record(cams, "make-cam")}
    open_pass(out, record)

    def one(image_id: str) -> None:
        camset = load_cams(cams / f"{image_id}.npz")
        image = load_image(dataset, image_id, camset.size)
        marginals = crf_scores(own_background(camset, image_id, background, power), image, crf)
        save_cams(out / f"{image_id}.npz", CamSet(camset.keys, marginals[1:], marginals[0], camset.size))

    def work(ids: Iterable[str]) -> Iterator[None]:
        return ordered_map(one, ids, workers)

    return run_pass("refine", out, ".npz", dataset.ids, work)
