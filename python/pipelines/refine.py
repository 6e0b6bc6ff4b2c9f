"""The refine pass: CAMs and images to sharper CAMs: by a CRF, by colours nearby, by regions, by learned affinities."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from fastcam.errors import FastcamError
from fastcam.io import (
    CamSet,
    finished_ids,
    load_cams,
    open_pass,
    read_label_png,
    save_cams,
    write_label_png,
)
from fastcam.methods.region_growing import Config, grow_regions, region_scores, vote_labels
from fastcam.nn.unaries import unary_from_labels, unary_from_softmax
from fastcam.ops.crf_mean_field import crf_mean_field
from fastcam.ops.pixel_refine import pixel_refine
from fastcam.pipelines._data import Data, Images, folder_classes, input_record, load_image, open_data
from fastcam.pipelines._parallel import PassResult, ordered_map, run_pass
from fastcam.pipelines._settings import TrainerConfig
from fastcam.pipelines.regions import check_stages, cut_stages

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
        preset: irn (AFA and ToCo too), psa (SEAM too) or deeplab (DRS, CLIP-ES too). By default irn, for how psa psa.
        iterations: steps of mean field.
        gaussian_sxy: standard deviation of the spatial kernel, in pixels.
        gaussian_compat: weight of the spatial kernel.
        sxy: spatial standard deviation of the bilateral kernel, in pixels.
        srgb: colour standard deviation of the bilateral kernel, in grey levels.
        compat: weight of the bilateral kernel.
        unary: where the CRF starts: from the scores (softmax), or from their best label (label).
        gt_prob: confidence in that label, for unary label.
    """

    preset: Literal["irn", "psa", "deeplab"] | None = None
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
        given = {key: value for key, value in asdict(self).items() if value is not None}
        given.setdefault("preset", "irn")
        values = {**PRESETS[given["preset"]], **given}
        for name in ("gaussian_sxy", "gaussian_compat", "sxy", "srgb", "compat", "iterations"):
            if not values[name] > 0:
                raise FastcamError(f"crf.{name} is {values[name]}, expected a number above 0")
        if not 0 < values["gt_prob"] < 1:
            raise FastcamError(f"crf.gt_prob is {values['gt_prob']}, expected a number between 0 and 1")
        return values


@dataclass(frozen=True)
class Pixel:
    """PAR or PAMR: every pixel becomes a mean of its neighbours, weighted by likeness of colour, again and again.

    Args:
        dilations: distances of the neighbours, eight at each, in pixels of the scaled image.
        iterations: how often.
        scale: of the image and its CAMs meanwhile (ToCo, AFA: 0.5).
    """

    dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    iterations: int = 10
    scale: float = 0.5

    def check(self) -> None:
        """Raises FastcamError where a value is out of range."""
        if not self.dilations or min(self.dilations) < 1:
            raise FastcamError(f"pixel.dilations are {list(self.dilations)}, expected whole numbers of at least 1")
        if self.iterations < 1:
            raise FastcamError(f"pixel.iterations is {self.iterations}, expected at least 1")
        if not 0 < self.scale <= 1:
            raise FastcamError(f"pixel.scale is {self.scale}, expected a number above 0 and at most 1")


@dataclass(frozen=True)
class Regions:
    """Averages over the regions of the image, and over several stages of their growing.

    Args:
        levels: stages, as thresholds of similarity: 2 is the superpixels, 1.3 many regions, 0.9 few.
        counts: stages, as numbers of regions.
        margin: share of a region by which its label has to lead, else the region becomes 255; for label PNGs.
        growing: the superpixels, and how they grow together.
    """

    levels: tuple[float, ...] = (1.3, 1.1, 0.9, 0.7)
    counts: tuple[int, ...] = ()
    margin: float = 0.0
    growing: Config = field(default_factory=Config)

    def check(self) -> None:
        """Raises FastcamError where a value is out of range."""
        self.growing.check()
        check_stages(self.levels, self.counts, self.growing.stop)
        if not 0 <= self.margin <= 1:
            raise FastcamError(f"regions.margin is {self.margin}, expected a share from 0 to 1")

    def cuts(self, image: Tensor) -> list[Tensor]:
        """The regions int64 `(H, W)` of an image uint8 `(3, H, W)` at every stage."""
        return list(cut_stages(grow_regions(image[None], self.growing)[0], self.levels, self.counts).values())


@dataclass(frozen=True)
class Seeds:
    """The two backgrounds that tell which pixels CAMs are sure of; what is between them is not trained on.

    Either two constants, high and low, or two powers.

    Args:
        high: foreground is what beats this constant (IRN: 0.30).
        low: background is what does not even beat this constant (IRN: 0.05).
        high_power: foreground is what beats (1 - largest CAM)^high_power (PSA: 4).
        low_power: background is what does not even beat (1 - largest CAM)^low_power (PSA: 32, SEAM: 24).
    """

    high: float | None = None
    low: float | None = None
    high_power: float | None = None
    low_power: float | None = None

    def resolved(self, how: str) -> Seeds:
        """These, or the paper's values where none is given.

        Raises:
            FastcamError: values that do not fit together.
        """
        if self == Seeds():
            return Seeds(high=0.30, low=0.05) if how == "irn" else Seeds(high_power=4, low_power=32)
        given = {key: value for key, value in asdict(self).items() if value is not None}
        shown = ", ".join(f"{key} {value}" for key, value in given.items())
        if given.keys() not in ({"high", "low"}, {"high_power", "low_power"}):
            raise FastcamError(f"seeds are {shown}, expected high and low, or high_power and low_power")
        high, low = given.values()
        if low < 0 or (low > high if self.high is not None else low < high):
            raise FastcamError(f"seeds are {shown}, expected a low background of 0 or more, and a high one above it")
        return self

    def backgrounds(self) -> tuple[Any, Any]:
        """The high and the low one, as `CamSet.scores` takes them."""
        if self.high is not None:
            return self.high, self.low
        return ("power", self.high_power), ("power", self.low_power)


def crf_scores(scores: Tensor, image: Tensor, crf: Crf) -> Tensor:
    """Marginals of the CRF that starts from scores.

    Args:
        scores: float `(K, H, W)`, background first; or `(G, K, H, W)`: G problems on one image, which share the costly
            part of the work.
        image: uint8 `(3, H, W)`.
        crf: its parameters.

    Returns:
        float32 of the shape of `scores`, summing to 1. With one label there is nothing to decide: ones.
    """
    labels = scores.shape[-3]
    if labels == 1:
        return torch.ones_like(scores)
    values = crf.resolved()
    if values["unary"] == "label":
        best = scores.max(-3).indices.reshape(-1, *scores.shape[-2:])  # argmax over planes takes 30 times as long
        unary = unary_from_labels(best, labels, values["gt_prob"], zero_unsure=False).view(scores.shape)
    else:
        unary = unary_from_softmax(scores)
    return crf_mean_field(
        unary[None],
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


def pixel_scores(scores: Tensor, image: Tensor, mode: Literal["par", "pamr"], pixel: Pixel) -> Tensor:
    """Scores refined by PAR, which starts from their softmax (ToCo, AFA), or by PAMR, which starts from their shares.

    Args:
        scores: float `(K, H, W)`, background first.
        image: uint8 `(3, H, W)`.
        mode: which.
        pixel: its parameters.

    Returns:
        float32 `(K, h, w)` at `pixel.scale`, summing to 1. With one label there is nothing to decide: ones.
    """
    size = [max(1, round(side * pixel.scale)) for side in image.shape[-2:]]
    if len(scores) == 1:
        return scores.new_ones(1, *size)
    small, colours = (
        F.interpolate(x[None].float(), size, mode="bilinear", align_corners=False) for x in (scores, image)
    )
    start = small.softmax(dim=1) if mode == "par" else shares(small)
    refined = pixel_refine(start, colours, mode=mode, dilations=pixel.dilations, iterations=pixel.iterations)
    return shares(refined)[0]


def shares(scores: Tensor) -> Tensor:
    """`(B, K, H, W)` divided by the sum of every pixel; 0 everywhere stays 0."""
    return scores / scores.sum(dim=1, keepdim=True).clamp(min=1e-12)


def refine(
    data: Data,
    cams: Path,
    out: Path,
    how: Literal["crf", "irn", "psa", "par", "pamr", "regions"] = "crf",
    crf: Crf = Crf(),
    background: float | None = None,
    power: float | None = None,
    pixel: Pixel = Pixel(),
    regions: Regions = Regions(),
    method: dict[str, Any] | None = None,
    seeds: Seeds = Seeds(),
    trainer: TrainerConfig = TrainerConfig(),  # noqa: B008 (frozen)
    weights: Path | None = None,
    instances: Path | None = None,
    device: str = "auto",
    workers: int = 2,
) -> PassResult:
    """Sharpens CAMs: one CamSet an image, with a background.

    crf, par and pamr look at the colours of the image. regions averages over regions that grow from superpixels; label
    PNGs, those of a segmentation network for example, it decides anew by the vote of every region. irn and psa first
    train a network on what the CAMs are sure of (weights, last.ckpt, metrics.csv and the labels in network/ of the
    output folder), which tells what belongs together, then let the CAMs walk along it; with weights they walk only.
    Only the classes that are present take part.

    Args:
        data: the images; irn and psa train on the same ones.
        cams: folder of CamSets that make-cam wrote; for how regions also of label PNGs.
        out: output folder, one .npz an image; of label PNGs one .png.
        how: crf, the fully connected CRF; par or pamr, means of similar pixels; regions; irn or psa, random walks.
        crf: the CRF, for how crf; and of the labels that irn and psa are trained on.
        background: constant score of the background beside the CAMs (irn: 0.25, beside the walked CAMs).
        power: score of the background is (1 - largest CAM)^power (psa: 16). Neither: the CAMs' own background.
        pixel: for how par and pamr.
        regions: for how regions.
        method: of the network, for how irn and psa: backbone (a timm name), weights (local file for the backbone) and
            any field of the method's configuration, as in --method.backbone resnet50 --method.lr 0.05.
        seeds: which pixels the CAMs are sure of, for how irn and psa.
        trainer: epochs, batches, precision, devices of the network, for how irn and psa.
        weights: weights.safetensors of a network trained before, for how irn and psa.
        instances: folder for the objects in each image, .json with COCO's run-length masks, for how irn.
        device: auto, cpu or cuda, for how irn and psa.
        workers: images that are worked on at the same time; for irn and psa threads that read and write.
    """
    _check(how, background, power, method, weights, instances)
    if how in ("irn", "psa"):
        from fastcam.pipelines._affinity import train_network, walk  # needs what is here

        if weights is None:
            recipe, labels_crf = {"name": how, **(method or {})}, dataclasses.replace(crf, preset=crf.preset or how)
            folder, sure = out / "network", seeds.resolved(how)
            weights = train_network(
                data, cams, folder, recipe, sure, labels_crf, trainer, background, power, device, workers
            )
            if os.environ.get("LOCAL_RANK", "0") != "0":  # a process that helped to train; the first one walks
                return PassResult(out, 0, 0, 0.0)
        return walk(data, cams, out, how, weights, background, power, instances, device, workers)
    dataset = open_data(data, folder_classes(cams), need_tags=False)
    pixel.check()
    regions.check()
    on_labels = how == "regions" and cams.is_dir() and not finished_ids(cams, ".npz")
    if on_labels and (background, power) != (None, None):
        raise FastcamError(f"background and power are for CAMs, and {cams} holds none; leave them out")
    if not on_labels and regions.margin:
        raise FastcamError(f"regions.margin is for label PNGs, and {cams} holds CAMs; leave it out")
    settings: dict[str, dict[str, Any]] = {"crf": {"crf": crf.resolved()}, "regions": {"regions": asdict(regions)}}
    chosen = settings.get(how, {"pixel": asdict(pixel)})
    record = {"pass": "refine", "how": how, **chosen, "background": background, "power": power}
    open_pass(out, {**record, **input_record(cams, "make-cam")})
    if on_labels:
        return _vote(dataset, cams, out, regions, workers)

    def one(image_id: str) -> None:
        camset = load_cams(cams / f"{image_id}.npz")
        image = load_image(dataset, image_id, camset.size)
        scores = own_background(camset, image_id, background, power)
        if how == "crf":
            refined = crf_scores(scores, image, crf)
        elif how == "regions":
            refined = region_scores(scores, regions.cuts(image))
        else:
            refined = pixel_scores(scores, image, "par" if how == "par" else "pamr", pixel)
        save_cams(out / f"{image_id}.npz", CamSet(camset.keys, refined[1:], refined[0], camset.size))

    def work(ids: Iterable[str]) -> Iterator[None]:
        return ordered_map(one, ids, workers)

    return run_pass("refine", out, ".npz", dataset.ids, work)


def _vote(dataset: Images, labels: Path, out: Path, regions: Regions, workers: int) -> PassResult:
    """The refine pass by regions on label PNGs."""

    def one(image_id: str) -> None:
        label = read_label_png(labels / f"{image_id}.png")
        image = load_image(dataset, image_id, label.shape)
        write_label_png(out / f"{image_id}.png", vote_labels(label, regions.cuts(image), regions.margin))

    def work(ids: Iterable[str]) -> Iterator[None]:
        return ordered_map(one, ids, workers)

    return run_pass("refine", out, ".png", dataset.ids, work)


def _check(
    how: str,
    background: float | None,
    power: float | None,
    method: dict[str, Any] | None,
    weights: Path | None,
    instances: Path | None,
) -> None:
    """Raises FastcamError where settings do not belong together."""
    if background is not None and power is not None:
        raise FastcamError(f"background {background} and power {power} exclude each other; give one of them")
    if how not in ("irn", "psa"):
        for name, value in (("method", method), ("weights", weights)):
            if value is not None:
                raise FastcamError(f"{name} is for how irn and psa, and how is {how}; leave it out")
    if how != "irn" and instances is not None:
        raise FastcamError(f"instances are for how irn, and how is {how}; leave them out")
    if method and method.get("name", how) != how:
        raise FastcamError(f"method.name is {method['name']}, and how is {how}; leave the name out")
    if method and weights is not None:
        raise FastcamError("method describes a network to train, and weights is a trained one; give one of them")
