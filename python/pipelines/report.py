"""The report of a run: one HTML file with nothing outside it, to look at, to keep and to send."""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastcam.errors import FastcamError
from fastcam.io import CamSet, atomic_write, load_cams, read_label_png, read_pass
from fastcam.metrics import ConfusionMatrix, mean_iou
from fastcam.pipelines import _report_pictures as pictures
from fastcam.pipelines._data import Data, Images, open_data
from fastcam.pipelines._report_catalogue import catalogue_section
from fastcam.pipelines._report_charts import Curve, bars, legend, lines
from fastcam.pipelines._report_style import SCRIPT, STYLE
from fastcam.pipelines.env import env
from fastcam.pipelines.label import to_labels

# Passes whose output is scored, in the order of the pipeline: name in the report, CSS colour.
STAGES = {
    "make-cam": ("CAM", "var(--cam)"),
    "refine": ("Refined CAM", "var(--refined)"),
    "label": ("Label", "var(--label)"),
    "predict-tags": ("Network, given tags", "var(--given)"),
    "predict": ("Network", "var(--network)"),
}
TRAININGS = {"train": "CAM network", "refine-train": "Affinity network", "segment": "Segmentation network"}
ORDER = ["train", "make-cam", "refine-train", "refine", "label", "segment", "predict-tags", "predict"]
LABELS = ("label", "predict-tags", "predict")  # passes that write label PNGs
MOST_MATRIX = 24  # labels of a confusion matrix that is still shown whole


@dataclasses.dataclass(frozen=True)
class Pass:
    """A pass folder of the run: `kind` is its pass in `pass.json`; `count` and `seconds` are its `times.json`."""

    kind: str
    folder: Path
    config: dict[str, Any]
    count: int | None
    seconds: float | None


@dataclasses.dataclass(frozen=True)
class Score:
    """A `scores.json`, of which stage and data it is."""

    stage: str
    data: Data
    values: dict[str, Any]

    @property
    def mean(self) -> float | None:
        """mIoU over the labels that occur."""
        return self.values["mean_iou"]["skip"]


@dataclasses.dataclass(frozen=True)
class Example:
    """An image with all that the run made of it; `labels` and their `iou` by the kind of the pass."""

    image_id: str
    item: dict[str, Any]
    cams: CamSet | None
    labels: dict[str, Tensor]
    iou: dict[str, float]


def report(run: Path, out: Path | None = None, samples: int = 10, failures: int = 6) -> Path:
    """Writes one self-contained HTML file about a run.

    It shows the scores, the classes, the choice of the threshold, images with all that was made of them, the worst
    images, what is taken for what, training curves, times and configuration: whatever of these the folder holds. Images
    and masks are read from the data set that the scores name. Of a pseudo-label run it shows quality, class balance,
    thresholds, the images of lowest quality and the errors, from its catalogue and stored CAMs.

    Args:
        run: folder that holds the folders of passes (any with a pass.json) and, anywhere below, scores.json files.
        out: the file to write; report.html in the run's folder if it is not given.
        samples: images shown, at even ranks from the best to the worst.
        failures: of the worst images shown.

    Returns:
        The path of the file.

    Raises:
        FastcamError: the folder is missing or holds no pass.
    """
    if not run.is_dir():
        raise FastcamError(f"run folder {run} does not exist; give the folder that holds the passes' folders")
    passes = find_passes(run)
    if not passes:
        raise FastcamError(f"run folder {run} holds no folder with a pass.json; run a pass with --out below it first")
    scores = find_scores(run, passes)
    classes: list[str] = next((p.config["classes"] for p in passes if p.config.get("classes")), [])
    groups, notes = _ranked_examples(passes, scores)
    sections = [
        ("summary", "Scores", _summary(scores)),
        ("classes", "Classes", _class_bars(scores)),
        ("threshold", "Background threshold", _threshold_curves(scores)),
        ("examples", "Examples", _examples(groups, notes, samples, classes)),
        ("failures", "Failures", _failures(groups, failures, classes)),
        ("catalogue", "Pseudo-labels", _catalogues(passes, failures)),
        ("confusion", "Confusion", _confusions(scores)),
        ("training", "Training", _training(passes)),
        ("times", "Times", _times(passes)),
        ("configuration", "Configuration", _configuration(passes)),
    ]
    out = out or run / "report.html"
    with atomic_write(out) as temporary:
        temporary.write_text(_page(run, sections), encoding="utf-8")
    return out


def find_passes(run: Path) -> list[Pass]:
    """The pass folders in a run's folder, in the order of the pipeline."""
    found = []
    for path in sorted({run / "pass.json", *run.glob("*/pass.json"), *run.glob("*/*/pass.json")}):
        record = read_pass(path.parent)
        if record is None or not isinstance(record["config"].get("pass"), str):
            continue
        times = _read_json(path.with_name("times.json")) or {}
        config = record["config"]
        kind = config["pass"] + ("-tags" if config.get("known_tags") else "")
        found.append(Pass(kind, path.parent, config, times.get("count"), times.get("seconds")))
    return sorted(found, key=lambda p: ORDER.index(p.kind) if p.kind in ORDER else len(ORDER))


def find_scores(run: Path, passes: Sequence[Pass]) -> list[Score]:
    """All `scores.json` below a run's folder that score its own passes, in the order of the pipeline."""
    kinds = {p.folder.resolve(): p.kind for p in passes}
    scores = []
    for path in sorted(run.rglob("scores.json")):
        values = _read_json(path)
        if not values or not {"data", "predictions", "classes", "iou", "mean_iou", "confusion"} <= values.keys():
            continue
        kind = kinds.get((path.parent / values["predictions"]).resolve())
        if kind in STAGES:
            scores.append(Score(kind, Data(**values["data"]), values))
    return sorted(scores, key=lambda score: list(STAGES).index(score.stage))


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _splits(scores: Sequence[Score]) -> list[str]:
    return list(dict.fromkeys(score.data.split for score in sorted(scores, key=lambda s: s.data.split)))


# Sections. Each returns HTML, or "" where the run has nothing for it.


def _summary(scores: Sequence[Score]) -> str:
    if not scores:
        return ""
    splits = _splits(scores)
    by = {(score.stage, score.data.split): score for score in scores}
    stages = [stage for stage in STAGES if any(score.stage == stage for score in scores)]
    best = {split: max((by[s, split].mean or 0 for s in stages if (s, split) in by), default=0) for split in splits}
    rows = []
    for stage in stages:
        cells = []
        for split in splits:
            score = by.get((stage, split))
            if score is None or score.mean is None:
                cells.append('<td class="none">–</td>')
                continue
            strong = " class=best" if score.mean == best[split] else ""
            how = score.values.get("threshold", "")
            detail = "" if how == "" else "own background" if how is None else f"threshold {how:g}"
            cells.append(f"<td{strong}><b>{100 * score.mean:.1f}</b><small>{detail}</small></td>")
        name, tone = STAGES[stage]
        rows.append(
            f'<tr><th scope="row"><span class="swatch" style="--tone:{tone}"></span>{name}</th>{"".join(cells)}</tr>'
        )
    counts = {score.data.split: score.values["images"] for score in scores}
    head = "".join(f'<th scope="col">{escape(split)}<small>{counts[split]} images</small></th>' for split in splits)
    return (
        f'<table class="scores"><thead><tr><th scope="col">mIoU, %</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table>"
        "<p class=hint>Mean over the background and the classes that occur, from one confusion matrix over all pixels. "
        "Every stage knows the tags of an image, but for “Network”, which sees the image alone.</p>"
    )


def _class_bars(scores: Sequence[Score]) -> str:
    charts = []
    for split in _splits(scores):
        group = [score for score in scores if score.data.split == split]
        names = group[0].values["classes"]
        series = [(*STAGES[score.stage], [score.values["iou"].get(name) for name in names]) for score in group]
        alt = f"IoU of each class on {split}: " + "; ".join(
            f"{label} {', '.join(f'{n} {100 * v:.0f}' for n, v in zip(names, values, strict=True) if v is not None)}"
            for label, _, values in series
        )
        charts.append(_figure(f"IoU on {split}, %", bars(names, series, alt)))
    key = legend([(*STAGES[stage], False) for stage in STAGES if any(score.stage == stage for score in scores)])
    return f'{key}<div class="charts">{"".join(charts)}</div>' if charts else ""


def _threshold_curves(scores: Sequence[Score]) -> str:
    curves, first = [], None
    for score in scores:
        sweep = score.values.get("sweep")
        if not sweep:
            continue
        first = first or score.data.split
        points = [(t, m) for t, m in zip(sweep["thresholds"], sweep["mean_iou"], strict=True) if m is not None]
        name, tone = STAGES[score.stage]
        mark = (sweep["best_threshold"], sweep["best_mean_iou"]) if points else None
        if points:
            curves.append(Curve(f"{name}, {score.data.split}", points, tone, score.data.split != first, mark))
    if not curves:
        return ""
    alt = "mIoU against the constant background threshold: " + "; ".join(
        f"{curve.name} best {100 * curve.mark[1]:.1f} at {curve.mark[0]:g}" for curve in curves if curve.mark
    )
    chart = lines(curves, "threshold", "mIoU, %", alt)
    best = "".join(
        f"<li>{escape(curve.name)}: {100 * curve.mark[1]:.1f} at {curve.mark[0]:g}</li>"
        for curve in curves
        if curve.mark
    )
    return (
        f'<div class="charts">{_figure("mIoU at every constant background", chart)}'
        f"<div>{legend([(c.name, c.tone, c.dashed) for c in curves])}<p class=hint>Best of each:</p>"
        f"<ul class=plain>{best}</ul><p class=hint>A pixel is background where no map beats the threshold. A flat top "
        "means that the choice matters little.</p></div></div>"
    )


def _examples(groups: dict[str, list[_Ranked]], notes: list[str], samples: int, classes: Sequence[str]) -> str:
    blocks = []
    share = -(-samples // max(1, len(groups)))
    for split, ranked in groups.items():
        chosen = [ranked[round(i * (len(ranked) - 1) / max(1, share - 1))] for i in range(min(share, len(ranked)))]
        rows = "".join(_row(r.load(), classes) for r in chosen)
        blocks.append(f"<h3>{escape(split)}</h3>{rows}")
    text = "".join(f'<p class="note">{escape(note)}</p>' for note in notes)
    if not blocks:
        return text
    return (
        f"{_class_legend(classes)}<p class=hint>At even ranks from the best to the worst image of each list. Numbers "
        f"are the image's mIoU, %. Click a picture to enlarge it.</p>{text}{''.join(blocks)}"
    )


def _failures(groups: dict[str, list[_Ranked]], failures: int, classes: Sequence[str]) -> str:
    # The list whose images no stage has learned from comes last in the alphabet of splits: train, val.
    ranked = [r for r in list(groups.values())[-1] if r.iou is not None] if groups else []
    if not ranked or failures < 1:
        return ""
    worst = ranked[::-1][:failures]
    name = STAGES[worst[0].stage][0] if worst[0].stage else ""
    return (
        f"<p class=hint>The images of {escape(worst[0].split)} with the lowest mIoU of the stage “{name}”, worst first."
        f"</p>{''.join(_row(r.load(), classes) for r in worst)}"
    )


def _catalogues(passes: Sequence[Pass], worst: int) -> str:
    return "".join(catalogue_section(p.folder, p.config, worst) for p in passes if p.kind == "pseudo-label")


def _confusions(scores: Sequence[Score]) -> str:
    blocks = []
    for split in _splits(scores):
        score = [score for score in scores if score.data.split == split][-1]
        names, counts = score.values["classes"], score.values["confusion"]
        rows = [[value / (sum(row) or 1) for value in row] for row in counts]
        title = f"{STAGES[score.stage][0]} on {split}"
        wrong = sorted(
            ((rows[t][p], names[t], names[p]) for t in range(len(rows)) for p in range(len(rows)) if t != p),
            reverse=True,
        )
        items = "".join(
            f"<li>{escape(t)} taken for {escape(p)}: {100 * v:.1f} %</li>" for v, t, p in wrong[:6] if v > 0
        )
        table = _matrix(names, rows, title) if len(names) <= MOST_MATRIX else ""
        blocks.append(f"<figure><figcaption>{escape(title)}</figcaption>{table}<ul class=plain>{items}</ul></figure>")
    if not blocks:
        return ""
    return (
        f'<div class="charts">{"".join(blocks)}</div><p class=hint>Rows are the true labels; a row sums to 100 % of '
        "that label's pixels.</p>"
    )


def _matrix(names: Sequence[str], rows: Sequence[Sequence[float]], title: str) -> str:
    head = "".join(f'<th scope="col"><span>{escape(name)}</span></th>' for name in names)
    body = []
    for t, row in enumerate(rows):
        cells = "".join(
            f'<td class="{"hit" if t == p else "miss"}" style="--v:{value:.3f}">{_rounded(100 * value)}</td>'
            for p, value in enumerate(row)
        )
        body.append(f'<tr><th scope="row">{escape(names[t])}</th>{cells}</tr>')
    return (
        f'<div class="scroll"><table class="matrix"><caption class="unseen">{escape(title)}</caption>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{''.join(body)}</tbody></table></div>"
    )


def _rounded(percent: float) -> str:
    return f"{percent:.0f}" if percent >= 0.5 else ""


def _training(passes: Sequence[Pass]) -> str:
    charts = []
    for p in passes:
        if p.kind not in TRAININGS:
            continue
        columns = _read_metrics(p.folder / "metrics.csv")
        names = [name for name in columns if name.startswith("loss")]
        tones = ("var(--network)", "var(--cam)", "var(--refined)", "var(--label)")
        curves = [
            Curve(name, columns[name], tones[i % len(tones)], i > 0)
            for i, name in enumerate(names)
            if len(columns[name]) > 1
        ]
        if not curves:
            continue
        alt = "; ".join(f"{c.name} from {c.points[0][1]:.3g} to {c.points[-1][1]:.3g}" for c in curves)
        title = f"{TRAININGS[p.kind]}: {p.config.get('method', {}).get('name', '')}"
        key = legend([(c.name, c.tone, c.dashed) for c in curves])
        charts.append(_figure(title, key + lines(curves, "step", "loss", alt, percent=False)))
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _read_metrics(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Column -> (step, value) of a training's `metrics.csv`; empty where it is missing or damaged."""
    columns: dict[str, list[tuple[float, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name != "step" and value:
                        columns.setdefault(name, []).append((float(row["step"]), float(value)))
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return columns


def _times(passes: Sequence[Pass]) -> str:
    timed = [p for p in passes if p.seconds]
    if not timed:
        return ""
    total = sum(p.seconds or 0 for p in timed)
    rows = []
    for p in timed:
        seconds, unit = p.seconds or 0.0, "steps" if p.kind in TRAININGS else "images"
        rate = f"{(p.count or 0) / seconds:.1f} {unit}/s"
        rows.append(
            f'<tr><th scope="row">{escape(p.kind)}<small>{escape(p.folder.name)}</small></th>'
            f"<td>{p.count or 0} {unit}</td><td>{_duration(seconds)}</td><td>{rate}</td>"
            f'<td class="wide"><span class="bar" style="width:{100 * seconds / total:.1f}%"></span></td></tr>'
        )
    return (
        '<table class="times"><thead><tr><th scope="col">Pass</th><th scope="col">Work</th><th scope="col">Time</th>'
        f'<th scope="col">Rate</th><th scope="col">Share</th></tr></thead><tbody>{"".join(rows)}</tbody>'
        f'<tfoot><tr><th scope="row">Sum</th><td></td><td>{_duration(total)}</td><td colspan="2"></td></tr></tfoot>'
        "</table>"
    )


def _duration(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{int(minutes)} min {rest:.0f} s" if minutes else f"{rest:.1f} s"


def _configuration(passes: Sequence[Pass]) -> str:
    blocks = []
    for p in passes:
        rows = "".join(
            f'<tr><th scope="row">{escape(key)}</th><td><code>{escape(value)}</code></td></tr>'
            for key, value in _flat(p.config)
        )
        blocks.append(
            f"<details><summary>{escape(p.kind)} <small>{escape(p.folder.name)}</small></summary>"
            f'<div class="scroll"><table class="config">{rows}</table></div></details>'
        )
    blocks.append(f"<details><summary>Versions and backends</summary><pre>{escape(env())}</pre></details>")
    return "".join(blocks)


def _flat(config: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows = []
    for key, value in config.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value if isinstance(value, str) else json.dumps(value)))
    return rows


# Pictures.


@dataclasses.dataclass(frozen=True)
class _Ranked:
    """An image, the IoU it is ranked by, the stage of that, and how to load the rest: large splits stay on disk."""

    split: str
    iou: float | None
    stage: str | None
    load: Callable[[], Example]


def _ranked_examples(passes: Sequence[Pass], scores: Sequence[Score]) -> tuple[dict[str, list[_Ranked]], list[str]]:
    """Split -> its images from best to worst by the furthest stage; and what could not be read."""
    sources = {score.data.split: score.data for score in scores}
    if not sources:
        sources = {
            p.config["data"]["split"]: Data(**p.config["data"])
            for p in passes
            if p.kind == "train" and "data" in p.config
        }
    classes = next((p.config["classes"] for p in passes if p.config.get("classes")), None)
    groups: dict[str, list[_Ranked]] = {}
    notes: list[str] = []
    for split in sorted(sources):
        try:
            dataset = open_data(sources[split], classes, masks=any(score.data.split == split for score in scores))
            ranked = [_rank(passes, dataset, split, image_id) for image_id in dataset.ids]
        except FastcamError as error:
            notes.append(f"The pictures of {split} are left out: {error}")
            continue
        groups[split] = sorted(ranked, key=lambda r: -1.0 if r.iou is None else r.iou, reverse=True)
    return groups, notes


def _rank(passes: Sequence[Pass], dataset: Images, split: str, image_id: str) -> _Ranked:
    stage = next(
        (p for p in reversed(passes) if p.kind in LABELS and (p.folder / f"{image_id}.png").is_file()),
        None,
    )
    iou = None
    if stage is not None:
        mask = dataset.by_id(image_id).get("mask")
        if mask is not None:
            iou = _image_iou(read_label_png(stage.folder / f"{image_id}.png"), mask, len(dataset.classes) + 1)
    return _Ranked(split, iou, stage.kind if stage else None, lambda: _example(passes, dataset, image_id))


def _image_iou(label: Tensor, mask: Tensor, labels: int) -> float | None:
    if label.shape != mask.shape:
        return None
    metric = ConfusionMatrix(labels, predicted_ignore="background")
    metric.update(label, mask.as_subclass(Tensor))
    mean = mean_iou(metric.compute())
    return None if mean != mean else mean


def _example(passes: Sequence[Pass], dataset: Images, image_id: str) -> Example:
    item = dataset.by_id(image_id)
    cams, labels = None, {}
    for p in passes:
        maps, png = p.folder / f"{image_id}.npz", p.folder / f"{image_id}.png"
        if p.kind == "make-cam" and maps.is_file():
            cams = load_cams(maps)
        elif p.kind == "refine" and maps.is_file():
            refined = load_cams(maps)
            labels["refine"] = to_labels(refined.scores().max(0).indices, refined.keys)
        elif p.kind in LABELS and png.is_file():
            labels[p.kind] = read_label_png(png)
    size = item["image"].shape[1:]
    labels = {kind: label for kind, label in labels.items() if label.shape == size}
    iou = {}
    if "mask" in item:
        for kind, label in labels.items():
            value = _image_iou(label, item["mask"], len(dataset.classes) + 1)
            if value is not None:
                iou[kind] = value
    return Example(image_id, item, cams if cams is None or cams.size == tuple(size) else None, labels, iou)


def _row(example: Example, classes: Sequence[str]) -> str:
    image = example.item["image"].as_subclass(Tensor)
    cells = [_picture(pictures.photo(image), "Image", f"image {example.image_id}")]
    if "mask" in example.item:
        mask = example.item["mask"].as_subclass(Tensor)
        names = _names(mask, classes)
        cells.append(
            _picture(pictures.label_overlay(image, mask), "Truth", f"true mask of {example.image_id}: {names}")
        )
    if example.cams is not None and len(example.cams.keys):
        for k, heat in zip(example.cams.keys.tolist(), pictures.full_size(example.cams), strict=True):
            name = classes[k] if k < len(classes) else f"class {k}"
            share = f"{100 * (heat > 0.5).float().mean():.0f} % of it above one half"
            cells.append(_picture(pictures.heat_overlay(image, heat), f"CAM {name}", f"CAM of {name}, {share}"))
    for kind, label in example.labels.items():
        title = STAGES[kind][0]
        alt = f"{title} of {example.image_id}: {_names(label, classes)}"
        score = f" <b>{100 * example.iou[kind]:.0f}</b>" if kind in example.iou else ""
        cells.append(_picture(pictures.label_overlay(image, label), title, alt, score))
    return (
        f'<article class="row"><h4>{escape(example.image_id)}</h4><div class="strip">{"".join(cells)}</div></article>'
    )


def _names(label: Tensor, classes: Sequence[str]) -> str:
    found = [int(v) for v in torch.unique(label) if 0 < v <= len(classes)]
    return ", ".join(classes[v - 1] for v in found) or "background only"


def _picture(uri: str, caption: str, alt: str, extra: str = "") -> str:
    return (
        f'<figure class="pic"><img src="{uri}" alt="{escape(alt)}" loading="lazy">'
        f"<figcaption>{escape(caption)}{extra}</figcaption></figure>"
    )


def _class_legend(classes: Sequence[str]) -> str:
    items = "".join(
        f'<li><span class="swatch" style="--tone:rgb{pictures.class_colour(k)}"></span>{escape(name)}</li>'
        for k, name in enumerate(classes)
    )
    return (
        f'<ul class="legend">{items}<li><span class="swatch striped"></span>ignored</li>'
        f'<li>CAM 0 <span class="heat" style="background:{pictures.heat_gradient()}"></span> 1</li></ul>'
    )


def _figure(title: str, content: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{content}</figure>"


def _page(run: Path, sections: Sequence[tuple[str, str, str]]) -> str:
    shown = [(anchor, title, body) for anchor, title, body in sections if body]
    links = "".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in shown)
    parts = "".join(
        f'<section id="{anchor}" aria-labelledby="h-{anchor}"><h2 id="h-{anchor}">{title}</h2>{body}</section>'
        for anchor, title, body in shown
    )
    missing = ", ".join(title.lower() for _, title, body in sections if not body)
    note = f'<p class="note">The run holds nothing (yet) for: {missing}.</p>' if missing else ""
    name, when = escape(run.resolve().name), time.strftime("%Y-%m-%d %H:%M")
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>fastcam report: {name}</title><style>{STYLE}</style></head><body>"
        f'<header><p class="brand">fastcam</p><h1>{name}</h1><p>From image-level tags to masks. Written {when}.</p>'
        f'<nav aria-label="Sections">{links}</nav></header><main>{parts}{note}</main>'
        f'<dialog aria-label="Enlarged picture"><img alt=""><p></p></dialog><script>{SCRIPT}</script></body></html>\n'
    )
