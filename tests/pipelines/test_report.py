"""The report: whole from a whole run, and still a report from half of one or from hostile names."""

import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from fastcam.errors import FastcamError
from fastcam.io import CamSet, open_pass, save_cams, write_label_png
from fastcam.pipelines._data import Data
from fastcam.pipelines._report_charts import Curve, lines
from fastcam.pipelines._report_pictures import class_colour, label_overlay
from fastcam.pipelines.evaluate import evaluate
from fastcam.pipelines.report import report

HOSTILE = "<img src=x onerror=alert(1)>&\"'"
CLASSES = ["cat", "dog <b>"]
SECTIONS = [
    "summary", "classes", "threshold", "examples", "failures", "confusion", "training", "times", "configuration",
]  # fmt: skip


class Page(HTMLParser):
    """Tags with their attributes, and whether every tag that was opened was closed in order."""

    VOID = frozenset({"meta", "img", "br", "line", "rect", "circle", "polyline"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.texts = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def ids(self):
        return [attrs["id"] for tag, attrs in self.tags if tag == "section"]


def read(path):
    page = Page(path.read_text(encoding="utf-8"))
    assert not page.open
    return page


@pytest.fixture
def run(tmp_path):
    """A run on four images of 24 x 20 pixels: the left half is class 1, the right half is the background."""
    root, out = tmp_path / "data", tmp_path / "run"
    ids = ["plain", "two words", HOSTILE.replace("/", ""), "ümlaut"]
    (root / "JPEGImages").mkdir(parents=True)
    (root / "ImageSets/Segmentation").mkdir(parents=True)
    (root / "classes.txt").write_text("\n".join(CLASSES))
    mask = torch.zeros(20, 24, dtype=torch.uint8)
    mask[:, :12] = 2
    for split in ("train", "val"):
        names = [f"{split}-{image_id}".replace(" ", "_") for image_id in ids]
        (root / f"ImageSets/Segmentation/{split}.txt").write_text("\n".join(names))
        for i, name in enumerate(names):
            Image.fromarray(np.full((20, 24, 3), 60 * i, np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
            write_label_png(root / "SegmentationClass" / f"{name}.png", mask)
            cam = CamSet(
                torch.tensor([1]), torch.linspace(1, 0, 6).repeat(5, 1)[None], torch.full((5, 6), 0.4), (20, 24)
            )
            save_cams(out / "cams" / f"{name}.npz", cam)
            save_cams(out / "refined" / f"{name}.npz", cam)
            prediction = mask.clone()
            prediction[:, : 3 * i] = 1
            write_label_png(out / "labels" / f"{name}.png", prediction.masked_fill(mask == 0, 255))
            write_label_png(out / "predictions" / f"{name}.png", prediction)
    kinds = {"cams": "make-cam", "refined": "refine", "labels": "label", "predictions": "predict", "train": "train"}
    for folder, kind in {**kinds, "segment": "segment"}.items():
        record = {"pass": kind, "classes": CLASSES, "method": {"name": "sfc"}, "note": HOSTILE}
        (out / folder).mkdir(exist_ok=True)
        (out / folder / "pass.json").write_text(json.dumps({"config": record, "fingerprint": "0"}))
        (out / folder / "times.json").write_text('{"count": 8, "seconds": 2.5}')
    rows = ["step,epoch,loss,loss_cls", *(f"{s},{s / 2},{1 / s},{0.5 / s}" for s in range(1, 6))]
    for folder in ("train", "segment"):
        (out / folder / "metrics.csv").write_text("\n".join(rows))
    for split in ("train", "val"):
        for stage in ("cams", "refined", "labels", "predictions"):
            evaluate(Data(root=str(root), split=split), out / stage, out / "scores" / split / stage, workers=0)
    return out


def test_whole_run_has_all_sections_in_order(run):
    page = read(report(run))
    assert page.ids() == SECTIONS
    links = [attrs["href"] for tag, attrs in page.tags if tag == "a"]
    assert links == [f"#{name}" for name in SECTIONS]


def test_nothing_is_loaded_from_outside(run):
    path = report(run)
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"(https?:)?//[a-z]", re.sub(r"base64,[A-Za-z0-9+/=]+", "", text))
    for tag, attrs in read(path).tags:
        assert tag not in ("link", "iframe", "object", "embed")
        assert attrs.get("src", "data:").startswith("data:")
        assert tag != "script" or "src" not in attrs
    assert "url(" not in text


def test_every_picture_says_what_it_shows(run):
    page = read(report(run))
    pictures = [attrs["alt"] for tag, attrs in page.tags if tag == "img" and "src" in attrs]
    assert len(pictures) > 40
    assert all(pictures)
    charts = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert charts and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)


def test_names_from_files_are_text_never_markup(run):
    page = read(report(run))
    assert all("onerror" not in attrs for _, attrs in page.tags)
    assert ("b", {}) in page.tags
    assert sum(HOSTILE.replace(" ", "_") in text for text in page.texts) >= 2
    assert any(text == "dog <b>" for text in page.texts)


def test_scores_are_those_of_evaluate(run):
    text = report(run).read_text(encoding="utf-8")
    scores = json.loads((run / "scores/val/predictions/scores.json").read_text())
    # Of class 1's 240 pixels an image, 0, 60, 120 and 180 are wrong: 600 of 960 right, none of the others.
    assert scores["iou"]["dog <b>"] == pytest.approx(600 / 960)
    assert f"<b>{100 * scores['mean_iou']['skip']:.1f}</b>" in text


def test_worst_images_come_first_among_the_failures(run):
    text = report(run, failures=2).read_text(encoding="utf-8")
    failures = text[text.index('<section id="failures"') : text.index('<section id="confusion"')]
    titles = re.findall(r"<h4>(.*?)</h4>", failures)
    assert [title[:10] for title in titles] == ["val-ümlaut", "val-&lt;im"]


@pytest.mark.parametrize(
    ("removed", "gone"),
    [
        (["scores"], {"summary", "classes", "threshold", "failures", "confusion"}),
        (["train", "segment"], {"training"}),
        (["cams", "refined", "labels"], {"threshold"}),
        (["predictions", "segment"], set()),
        (
            [f"{name}/times.json" for name in ("train", "segment", "cams", "refined", "labels", "predictions")],
            {"times"},
        ),
    ],
)
def test_missing_parts_are_left_out_and_said(run, removed, gone):
    for name in removed:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = read(report(run))
    assert gone.isdisjoint(page.ids())
    assert not gone or any("holds nothing (yet) for" in text for text in page.texts)
    assert "configuration" in page.ids()


def test_data_set_that_moved_away_leaves_scores_and_a_note(run):
    (run.parent / "data").rename(run.parent / "elsewhere")
    page = read(report(run))
    assert "summary" in page.ids()
    assert any("pictures of train are left out" in text for text in page.texts)


def test_run_that_only_began_has_its_configuration(tmp_path):
    open_pass(tmp_path / "train", {"pass": "train", "classes": CLASSES, "method": {"lr": 0.1}})
    page = read(report(tmp_path))
    assert page.ids() == ["configuration"]
    assert "method.lr" in page.texts


def test_damaged_side_files_are_skipped(run):
    (run / "train/metrics.csv").write_text("step,loss\nx,y\n")
    (run / "train/times.json").write_text("{")
    (run / "scores/val/cams/scores.json").write_text("[]")
    assert read(report(run)).ids() == SECTIONS


def test_report_goes_where_it_is_told(run, tmp_path):
    assert report(run, tmp_path / "a/b.html") == tmp_path / "a/b.html"
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("name", ["absent", "empty"])
def test_folder_without_a_run_is_refused_in_one_line(tmp_path, name):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FastcamError, match=f"run folder .*{name}") as error:
        report(tmp_path / name)
    assert "\n" not in str(error.value)


def test_overlay_colours_a_label_and_keeps_the_place():
    import base64
    import io

    label = torch.zeros(40, 40, dtype=torch.uint8)
    label[:20] = 3
    uri = label_overlay(torch.full((3, 40, 40), 128, dtype=torch.uint8), label)
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))), np.float64)
    assert picture[10, 20] == pytest.approx(0.4 * 128 + 0.6 * np.array(class_colour(2)), abs=6)
    assert picture[30, 20] == pytest.approx(np.full(3, 0.8 * 128), abs=6)


def test_curve_of_one_point_has_axes_and_no_division_by_zero():
    assert "polyline" in lines([Curve("a", [(1.0, 0.0)], "red")], "x", "y", "one point")
