"""The command that compares CRFs on real photographs, on one of them."""

import json
import statistics

import pytest
import torch

from fastcam.bench import _crf_agreement as agreement
from fastcam.data import VOCDataset
from fastcam.io import load_weights


def test_lattice_and_pydensecrf_are_equally_far_from_the_exact_sums(shared_data, tmp_path, capsys):
    pytest.importorskip("pydensecrf.densecrf", reason="needs pydensecrf2")
    path = tmp_path / "agreement.json"
    options = ["--images", "0", "--full", "0", "--small", "1", "--side", "16", "--threads", "1", "--json", str(path)]
    agreement.main([str(shared_data), *options])
    rows = json.loads(path.read_text())["distance"]
    means = {
        solver: [row["mean"] for row in rows if row["solver"] == solver] for solver in ("fast", "lattice", "pydensecrf")
    }
    assert len(rows) == 3 * 2 * 3 * 2  # solvers, labels, presets, steps
    assert means["lattice"] == pytest.approx(means["pydensecrf"], rel=1e-2, abs=1e-6)
    assert 0 < statistics.fmean(means["fast"]) < 0.05
    assert "| present | irn | 10 |" in capsys.readouterr().out


def test_the_network_labels_a_photograph_as_its_mask(shared_data):
    voc = shared_data / "voc/VOCdevkit/VOC2012"
    item = VOCDataset(voc, "val")[100]
    weights, _ = load_weights(shared_data / agreement.WEIGHTS)
    logits = agreement.deeplab({name: tensor.float() for name, tensor in weights.items()}, item["image"][None])
    mask = torch.as_tensor(item["mask"])
    assert (logits.argmax(1)[0] == mask)[mask != 255].float().mean() > 0.97  # trained on it
