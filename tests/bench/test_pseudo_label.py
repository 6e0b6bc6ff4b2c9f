"""The command that compares PseudoLabeler with today's loop, on two small drawings."""

import json

import numpy as np
import pytest

from fastcam.bench import _pseudo_label as bench
from fastcam.data import write_procedural


def test_both_ways_give_the_same_labels(tmp_path, capsys):
    pytest.importorskip("pydensecrf.densecrf", reason="needs pydensecrf2")
    write_procedural(tmp_path / "voc", train=2, val=1, size=64)
    path = tmp_path / "report.json"
    options = ["--count", "2", "--part", "1", "--backbone", "test_resnet", "--threads", "1", "--json", str(path)]
    bench.main([str(tmp_path / "voc/JPEGImages"), *options, "--scales", "1", "0.5"])
    report = json.loads(path.read_text())
    assert report["same labels"] > 0.98 and report["images"] == 2
    assert set(report["today"]) == {"read and scale", "network", "fuse", "files between", "CRF", "encode", "all"}
    text = capsys.readouterr().out
    assert "| 10,000,000 | 256 |" in text and "PseudoLabeler" in text


def test_crf_of_labels_keeps_a_clear_label():
    pytest.importorskip("pydensecrf.densecrf", reason="needs pydensecrf2")
    image = np.zeros((16, 20, 3), np.uint8)
    image[:, 10:] = 255
    labels = (image[..., 0] > 0).astype(np.int64)
    assert np.array_equal(bench.crf_of_labels(image, labels, 2), labels)
