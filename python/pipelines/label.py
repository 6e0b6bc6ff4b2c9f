"""The label pass: CAMs to palette PNGs, by one threshold, by two with ignored pixels between them, or by saliency."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastcam.errors import FastcamError
from fastcam.io import (
    CamSet,
    find_saliency,
    finished_ids,
    load_cams,
    open_pass,
    read_saliency,
    write_label_png,
)
from fastcam.pipelines._data import Data, folder_classes, input_record, load_image, open_data
from fastcam.pipelines._parallel import PassResult, ordered_map, run_pass
from fastcam.pipelines.refine import Crf, crf_scores, own_background

IGNORE = 255


@dataclasses.dataclass(frozen=True)
class Rule:
    """How scores become labels. All `None`: the CAMs' own background decides.

    Args:
        threshold: constant score of the background; a class wins where its CAM is larger.
        power: score of the background is (1 - largest CAM)^power (PSA).
        high: with low: foreground is what beats this constant, and is certain (IRN: 0.30).
        low: background is what does not even beat this constant (IRN: 0.05); pixels between the two are 255.
        min_score: pixels whose best score is lower become 255 (CLIP-ES: 0.95 on the CRF's marginals).
    """

    threshold: float | None = None
    power: float | None = None
    high: float | None = None
    low: float | None = None
    min_score: float | None = None

    @property
    def has_background(self) -> bool:
        """Whether the CAMs need no background of their own."""
        return (self.threshold, self.power, self.high) != (None, None, None)

    def check(self) -> None:
        """Raises FastcamError where the values exclude each other."""
        if (self.high is None) != (self.low is None):
            raise FastcamError(f"high is {self.high} and low is {self.low}; the two-threshold rule needs both")
        if self.high is not None and (self.threshold, self.power, self.min_score) != (None, None, None):
            raise FastcamError("high and low exclude threshold, power and min_score; give one rule")
        if self.high is not None and self.low is not None and self.high < self.low:
            raise FastcamError(f"high is {self.high}, expected at least low, which is {self.low}")
        if self.threshold is not None and self.power is not None:
            raise FastcamError("threshold and power exclude each other; give one rule")


@dataclasses.dataclass(frozen=True)
class Saliency:
    """Saliency maps in the place of a background score: what is not salient is background.

    Args:
        folder: of grey images, one for every image, of its name and size.
        rule: of drs or of group_wsss, with their papers' constants.
    """

    folder: Path
    rule: Literal["drs", "group_wsss"] = "drs"


SALIENCY_RULES = {
    "drs": ("fastcam.methods.drs", "pseudo_label"),
    "group_wsss": ("fastcam.methods.group_wsss", "proxy_label"),
}


def to_labels(winner: Tensor, keys: Tensor) -> Tensor:
    """Channels of `CamSet.scores` as labels: 0 stays, channel `i` becomes `keys[i - 1] + 1`; uint8."""
    return torch.cat([keys.new_zeros(1), keys + 1]).to(torch.uint8)[winner]


def two_threshold_label(certain: Tensor, loose: Tensor) -> Tensor:
    """Foreground where the strict decision sees any; 0 where not even the loose one does; 255 between (IRN, AFA, ToCo).

    Args:
        certain: labels against the high background, uint8 `(H, W)`.
        loose: labels against the low background.

    Example:
        >>> two_threshold_label(torch.tensor([[2, 0, 0]]), torch.tensor([[1, 1, 0]]))
        tensor([[  2, 255,   0]])
    """
    undecided = torch.where(loose == 0, 0, IGNORE).to(certain.dtype)
    return torch.where(certain != 0, certain, undecided)


def label_image(cams: CamSet, image_id: str, rule: Rule, crf: Crf | None = None, image: Tensor | None = None) -> Tensor:
    """Labels of one image.

    Args:
        cams: its CAMs.
        image_id: for messages.
        rule: how.
        crf: refine each decision by this CRF first (IRN does, from labels); `None`: take the scores as they are.
        image: uint8 `(3, H, W)`, for the CRF.

    Returns:
        uint8 `(H, W)`.
    """

    return label_and_scores(cams, image_id, rule, crf, image)[0]


def label_and_scores(
    cams: CamSet, image_id: str, rule: Rule, crf: Crf | None = None, image: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What `label_image` gives, and the scores `(K, H, W)` that decided: of two thresholds, those beside the high one.

    Two thresholds share one CRF's lattice.
    """
    if rule.high is not None and rule.low is not None:
        scores = torch.stack([cams.scores(rule.high), cams.scores(rule.low)])
    else:
        scores = own_background(cams, image_id, rule.threshold, rule.power)[None]
    if crf is not None and image is not None:
        scores = crf_scores(scores, image, crf)
    best, winner = scores.max(1)
    labels = to_labels(winner, cams.keys)
    if len(labels) == 2:
        return two_threshold_label(*labels), scores[0]
    label = labels[0] if rule.min_score is None else labels[0].masked_fill(best[0] < rule.min_score, IGNORE)
    return label, scores[0]


def saliency_label(cams: CamSet, image_id: str, saliency: Saliency) -> Tensor:
    """Labels of one image by its CAMs and its saliency map.

    Args:
        cams: its CAMs.
        image_id: names the map.
        saliency: where the maps are, and the rule.

    Returns:
        uint8 `(H, W)`.

    Raises:
        FastcamError: there is no map, or it is of another size.
    """
    path = find_saliency(saliency.folder, image_id)
    plane = read_saliency(path)
    if tuple(plane.shape) != tuple(cams.size):
        came, size = (f"{w} x {h}" for h, w in (plane.shape, cams.size))
        raise FastcamError(f"saliency map {path} is {came} pixels, but its image is {size}; make them the same size")
    module, name = SALIENCY_RULES[saliency.rule]
    label = getattr(importlib.import_module(module), name)(cams.scores(0.0)[1:], plane)
    return torch.where(label == IGNORE, label, to_labels(label.long().clamp(max=len(cams.keys)), cams.keys))


def label(
    cams: Path,
    out: Path,
    threshold: float | None = None,
    power: float | None = None,
    high: float | None = None,
    low: float | None = None,
    min_score: float | None = None,
    crf: Crf | None = None,
    saliency: Saliency | None = None,
    data: Data | None = None,
    workers: int = 2,
) -> PassResult:
    """Turns CAMs into label PNGs: 0 background, class k + 1, 255 ignored.

    One rule decides: a threshold, a power, high and low together, saliency maps, or none of them where the CAMs have a
    background of their own (SFC's CAMs, the CRF's marginals). All CAMs of the
    folder are labelled, or those of a data set's list.

    Args:
        cams: folder of CamSets that make-cam or refine wrote.
        out: output folder, one palette .png an image.
        threshold: constant score of the background.
        power: score of the background is (1 - largest CAM)^power (PSA: 4, 16 or 24).
        high: with low: foreground is what beats this constant (IRN: 0.30).
        low: background is what does not even beat this constant (IRN: 0.05); pixels between the two become 255.
        min_score: pixels whose best score is lower become 255 (CLIP-ES: 0.95 on the CRF's marginals).
        crf: refine every decision by a CRF before labels are taken; needs the data set's images. IRN's rule is high
            0.30, low 0.05, crf.preset irn.
        saliency: saliency maps, which tell background from object by the rule of drs or group_wsss; excludes the rest.
        data: the data set whose images are labelled.
        workers: images that are worked on at the same time.
    """
    rule = Rule(threshold, power, high, low, min_score)
    rule.check()
    if crf is not None and data is None:
        raise FastcamError("crf needs the images; give data.root and data.split, or data.images")
    record: dict[str, Any] = {"pass": "label", "crf": crf and crf.resolved(), **dataclasses.asdict(rule)}
    if saliency is not None:
        if rule != Rule() or crf is not None:
            raise FastcamError("saliency excludes threshold, power, high and low, min_score and crf; give one rule")
        record["saliency"] = dataclasses.asdict(saliency)
    dataset = open_data(data, folder_classes(cams)) if data else None
    ids = dataset.ids if dataset else sorted(finished_ids(cams, ".npz"))
    open_pass(out, {**record, **input_record(cams, "make-cam or refine")})

    def one(image_id: str) -> None:
        camset = load_cams(cams / f"{image_id}.npz")
        image = load_image(dataset, image_id, camset.size) if dataset and crf else None
        if saliency is None:
            made = label_image(camset, image_id, rule, crf, image)
        else:
            made = saliency_label(camset, image_id, saliency)
        write_label_png(out / f"{image_id}.png", made)

    def work(todo: Iterable[str]) -> Iterator[None]:
        return ordered_map(one, todo, workers)

    return run_pass("label", out, ".png", ids, work)
