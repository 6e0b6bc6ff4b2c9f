"""The few-shot pass: a trained method on fixed episodes of novel classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from fastcam.errors import FastcamError
from fastcam.io import load_weights
from fastcam.methods import method_class
from fastcam.pipelines._data import Data


def few_shot(
    data: Data,
    weights: Path,
    out: Path,
    shots: int = 1,
    ways: int | None = None,
    queries: int | None = None,
    episodes: int = 1000,
    seed: int = 0,
    classes: tuple[str, ...] = (),
    episode_list: Path | None = None,
    size: int = 256,
    predictor: Literal["network", "prototype", "prior"] = "network",
    threshold: float = 0.5,
    predictions: bool = False,
    against: Path | None = None,
    device: str = "auto",
    workers: int = 2,
) -> dict[str, Any]:
    """Tests a few-shot method on episodes of classes it has not learned, and writes scores.json.

    Methods that classify: an episode is a few labelled images of each of some classes, and further images of these
    classes, which go to the nearest mean of a class; every image is embedded once. The score is the mean accuracy over
    the episodes, with its 95 % interval. A pre-trained network that embeds images (amdim) is tested as it is.

    Methods that segment: an episode is one query image and a few images in which its class is marked. Intersections
    and unions are added up over the episodes; the scores are the mean IoU over the novel classes and FB-IoU, with 95 %
    intervals over episodes drawn again. The episodes are drawn once and kept in list.json; --episode-list takes
    the list of another run. A run that was stopped goes on with the episodes that are not there yet.

    Args:
        data: the images, with masks, and with all classes, base and novel; for methods that classify images of one
            class each, of the classes to test.
        weights: weights.safetensors of a finished train pass.
        out: output folder; of methods that segment one .episode.json an episode.
        shots: marked images an episode; labelled images of each class.
        ways: classes an episode; methods that segment have one, others by default 5.
        queries: query images an episode; methods that segment have one, others by default 15 of each class.
        episodes: number of episodes.
        seed: of the draw of the episodes.
        classes: names of the classes to test; by default those that the method kept for it, or all of the data's.
        episode_list: list.json of another run, instead of shots, episodes and seed.
        size: length that the longer side of every image is brought to; its shorter side is filled up to a square.
        predictor: the network; or a baseline on its untrained trunk: cosines with the mean features of the class and of
            its background (prototype), or the best cosine with any marked place (prior).
        threshold: of the prior.
        predictions: write a .png an episode: 1 the class, 0 not.
        against: output folder of another run on the same episodes; the difference of the scores is added.
        device: auto, cpu or cuda.
        workers: threads that read images and write results.

    Returns:
        What scores.json holds.

    Raises:
        FastcamError: weights of another kind of method, no masks, classes with too few images, or a list that does not
            fit the data.
    """
    saved = load_weights(weights)[1]
    cls = method_class(saved["method"]) if "method" in saved else None
    kind = "network of another program" if cls is None else cls.kind
    if hasattr(cls, "embed"):
        if predictor != "network" or predictions:
            raise FastcamError(
                f"method {saved['method']} classifies images; predictor and predictions are of methods that segment"
            )
        from fastcam.pipelines._few_shot_classification import classify_episodes

        return classify_episodes(
            data,
            weights,
            out,
            shots=shots,
            ways=5 if ways is None else ways,
            queries=15 if queries is None else queries,
            count=episodes,
            seed=seed,
            names=classes or None,
            episode_list=episode_list,
            against=against,
            device=device,
            workers=workers,
        )
    if kind != "few-shot":
        raise FastcamError(f"weights {weights} are of a {kind}, expected a few-shot method; give other weights")
    for name, given in (("ways", ways), ("queries", queries)):
        if given not in (None, 1):
            raise FastcamError(
                f"{name} is {given}, but method {saved['method']} segments one image for one class; use 1"
            )
    from fastcam.pipelines._few_shot_segmentation import segment_episodes

    return segment_episodes(
        data,
        weights,
        out,
        shots=shots,
        count=episodes,
        seed=seed,
        names=classes,
        episode_list=episode_list,
        size=size,
        predictor=predictor,
        threshold=threshold,
        predictions=predictions,
        against=against,
        device=device,
        workers=workers,
    )


def table(scores: dict[str, Any]) -> str:
    """What :func:`few_shot` returned as lines of text."""
    if "accuracy" in scores:
        return _accuracy_table(scores)
    names = [*scores["iou"], "mean", "FB-IoU"]
    values = [*scores["iou"].values(), scores["mean_iou"], scores["fb_iou"]]
    intervals = scores["intervals"]
    ranges = [*intervals["iou"].values(), intervals["mean_iou"], intervals["fb_iou"]]
    lines = [f"{'class':<20} IoU %   95 % of draws"]
    for name, value, (low, high) in zip(names, values, ranges, strict=True):
        lines.append(f"{name:<20} {_percent(value)}   {_percent(low)} to {_percent(high)}")
    for name, (value, low, high) in scores.get("difference", {}).items():
        numbers = [_percent(number).strip() for number in (value, low, high)]
        lines.append("{}: {} more than the other run, 95 % of draws {} to {}".format(name, *numbers))
    return "\n".join([*lines, f"{scores['shots']} shots, {scores['episodes']} episodes, {scores['predictor']}"])


def _accuracy_table(scores: dict[str, Any]) -> str:
    about = ", ".join(f"{scores[name]} {name}" for name in ("ways", "shots", "queries", "episodes"))
    lines = [f"accuracy {_percent(scores['accuracy'])} +- {100 * scores['interval']:.2f} %  ({about})"]
    if "difference" in scores:
        above = f"{100 * scores['difference']:.2f} +- {100 * scores['difference_interval']:.2f}"
        lines.append(f"{above} above the other run on the same episodes")
    return "\n".join(lines)


def _percent(value: float | None) -> str:
    return "    -" if value is None else f"{100 * value:5.1f}"
