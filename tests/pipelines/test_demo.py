"""The demo, shrunk: every pass runs, in order and in the open, and a second call has nothing left to do."""

import re

import pytest

from fastcam.errors import FastcamError
from fastcam.pipelines.demo import demo

SMALL = {"train_images": 16, "val_images": 4, "epochs": 1, "segment_epochs": 1, "workers": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, demo(out, **SMALL)


def test_report_has_every_section(finished):
    _, result = finished
    sections = re.findall(r'<section id="(\w+)"', result.report.read_text(encoding="utf-8"))
    # One epoch of one step draws no curve of the training.
    wanted = "summary classes threshold examples failures confusion times configuration"
    assert sections == wanted.split()


def test_result_is_a_table_of_mean_ious_and_the_reports_path(finished):
    _, result = finished
    lines = [line for line in str(result).splitlines() if line]
    assert [line.split()[0] for line in lines] == [
        "mIoU,",
        "CAMs",
        "labels",
        "network",
        "network",
        lines[-1].split()[0],
    ]
    for line in lines[1:5]:
        assert all(0 <= float(figure) <= 100 for figure in line.split()[-2:])
    assert lines[-1].endswith(str(result.report))


def test_figures_are_those_of_the_scores_files(finished):
    import json

    out, result = finished
    for name, folder in zip(result.scores, ("cams", "labels", "predictions", "predictions_alone"), strict=True):
        for figure, split in zip(result.scores[name], ("train", "val"), strict=True):
            scores = json.loads((out / "scores" / split / folder / "scores.json").read_text())
            assert scores["mean_iou"]["skip"] == figure


def test_second_call_continues_and_ends_the_same_with_progress_shown(finished, capsys):
    out, result = finished
    before = (out / "segment/weights.safetensors").stat().st_mtime_ns
    again = demo(out, **SMALL)
    assert again.scores == result.scores
    assert (out / "segment/weights.safetensors").stat().st_mtime_ns == before
    assert re.findall(r"(\d)/8", capsys.readouterr().out) == [str(number) for number in range(1, 9)]


def test_another_seed_does_not_mix_with_the_old_output(finished):
    out, _ = finished
    with pytest.raises(FastcamError, match="seed: 0 -> 1"):
        demo(out, **SMALL, seed=1)
