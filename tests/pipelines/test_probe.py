"""The probe: its classifier against the optimum, its scores against torchmetrics, and the pass as a whole."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from pipelines.tiny import CLASSES, TRAINER, files
from torchmetrics.functional.classification import binary_average_precision

from fastcam.errors import FastcamError
from fastcam.io import load_weights
from fastcam.methods import load_method
from fastcam.metrics import ConfusionMatrix, mean_iou, tag_average_precision
from fastcam.pipelines._data import Data
from fastcam.pipelines.probe import (
    Rows,
    choose_l2,
    fit_linear,
    folds_of,
    image_rows,
    pixel_rows,
    probe,
    scores_of,
    weighted_average_precision,
)
from fastcam.pipelines.segment import segment
from fastcam.pipelines.train import train

METHOD = {
    "name": "mevt",
    "backbone": "test_convnext+context16",
    "view_clusters": 4,
    "region_clusters": 4,
    "prototypes": 4,
    "head_hidden": 8,
    "bottleneck": 4,
    "num_locals": 0,
    "warmup_epochs": 0,
    "epochs": 1,
}
FAST = {"size": 32, "l2": (0.01,), "bootstrap": 50, "workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def pretrained(root, tmp_path_factory):
    """Weights of MEVT after one epoch on the images alone."""
    out = tmp_path_factory.mktemp("mevt")
    return train(Data(images=f"{root}/JPEGImages"), METHOD, dataclasses.replace(TRAINER, epochs=1), out)


def rows(n=40, d=5, classes=3, seed=0):
    torch.manual_seed(seed)
    y = torch.randint(classes, (n,))
    return Rows(torch.randn(n, d) + torch.eye(classes, d)[y], y, torch.arange(n))


class TestClassifier:
    def test_softmax_classifier_is_where_the_gradient_is_zero(self):
        r = rows()
        weight, bias = fit_linear(r.x, r.y, 0.1, 3)
        error = (r.x.double() @ weight.T + bias).softmax(1) - torch.eye(3, dtype=torch.float64)[r.y]
        assert float((error.T @ r.x.double() / 40 + 0.1 * weight).abs().max()) < 1e-5
        assert float(error.sum(0).abs().max()) < 1e-4

    def test_logistic_classifier_is_where_the_gradient_is_zero(self):
        r = rows()
        tags = (torch.rand(40, 2) < 0.4).float()
        weight, bias = fit_linear(r.x, tags, 0.1, 2)
        error = (r.x.double() @ weight.T + bias).sigmoid() - tags
        assert float((error.T @ r.x.double() / 40 + 0.1 * weight).abs().max()) < 1e-5

    def test_a_class_that_no_image_has_is_finite(self):
        weight, bias = fit_linear(torch.randn(6, 2), torch.zeros(6, 1), 0.1, 1)
        assert weight.isfinite().all() and bias.isfinite().all()

    def test_folds_are_even_within_classes_and_the_same_every_time(self):
        r = Rows(torch.zeros(30, 1), torch.arange(30) % 3, torch.arange(30))
        fold = folds_of(r, 5, seed=1)
        assert all(torch.bincount(fold[r.y == k]).tolist() == [2] * 5 for k in range(3))
        assert torch.equal(fold, folds_of(r, 5, seed=1))

    def test_rows_of_one_image_stay_in_one_fold(self):
        r = Rows(torch.zeros(8, 1), torch.zeros(8, dtype=torch.int64), torch.arange(4).repeat_interleave(2))
        assert folds_of(r, 2, seed=0).tolist().count(0) == 2
        assert r.of(torch.tensor([True, False, False, True])).image.tolist() == [0, 0, 3, 3]

    def test_cross_validation_takes_the_penalty_that_noise_needs(self):
        torch.manual_seed(0)
        y = torch.randint(2, (30,))
        x = torch.cat([y[:, None] + 0.8 * torch.randn(30, 1), torch.randn(30, 60)], 1)
        best, scores = choose_l2(Rows(x, y, torch.arange(30)), (1e-4, 1.0), 5, 0, 2, "class")
        assert best == 1.0 and scores[1] > scores[0]
        tie, scores = choose_l2(Rows(y[:, None].float(), y, torch.arange(30)), (1e-4, 1e-3), 5, 0, 2, "class")
        assert scores == [1.0, 1.0] and tie == 1e-3


class TestScores:
    def test_average_precision_agrees_with_torchmetrics_also_where_items_are_repeated(self):
        torch.manual_seed(0)
        scores, positive = torch.rand(20).mul(8).round(), torch.rand(20) < 0.4
        counts = torch.randint(3, (4, 20))
        ours = weighted_average_precision(scores, positive, counts.double())
        for value, count in zip(ours, counts, strict=True):
            index = torch.arange(20).repeat_interleave(count)
            theirs = binary_average_precision(scores[index] / 8, positive[index].long())
            torch.testing.assert_close(value.float(), theirs)

    def test_map_agrees_with_the_metric_and_leaves_out_absent_classes(self):
        torch.manual_seed(0)
        logits, tags = torch.randn(12, 3), (torch.rand(12, 3) < 0.5).float()
        tags[:, 1] = 0
        ours = scores_of(logits, Rows(logits, tags, torch.arange(12)), torch.ones(1, 12), "tags")
        torch.testing.assert_close(ours[0].float(), tag_average_precision(logits.sigmoid(), tags).nanmean())

    def test_accuracy_by_hand(self):
        r = Rows(torch.zeros(3, 1), torch.tensor([0, 1, 1]), torch.arange(3))
        logits = torch.tensor([[1.0, 0], [0, 1], [1, 0]])
        weights = torch.tensor([[1.0, 1, 1], [0, 0, 3], [2, 1, 0]])
        torch.testing.assert_close(
            scores_of(logits, r, weights, "class"), torch.tensor([2 / 3, 0, 1], dtype=torch.float64)
        )

    def test_mean_iou_agrees_with_the_metric(self):
        torch.manual_seed(0)
        y, image = torch.randint(3, (40,)), torch.arange(4).repeat_interleave(10)
        logits = torch.randn(40, 3)
        expected = ConfusionMatrix(3)
        expected.update(logits.argmax(1)[image != 2], y[image != 2])
        weights = torch.tensor([[1.0, 1, 0, 1]])
        ours = scores_of(logits, Rows(logits, y, image), weights, "pixels")
        assert float(ours) == pytest.approx(mean_iou(expected.compute()))

    def test_rows_of_outputs(self):
        outputs = [torch.arange(4.0).view(1, 1, 2, 2), torch.full((1, 2, 1, 1), 7.0)]
        assert image_rows(outputs, (0, 1)).tolist() == [[1.5, 7, 7]]
        assert pixel_rows(outputs, (-1, 0)).shape == (1, 3, 2, 2)


class TestPass:
    @pytest.mark.parametrize("target", ["tags", "pixels"])
    def test_weights_against_random_ones(self, data, pretrained, tmp_path, target):
        common = {**FAST, "target": target}
        base = probe(data, "val", tmp_path / "random", weights=pretrained, random=True, **common)
        result = probe(data, "val", tmp_path / "mevt", weights=pretrained, against=tmp_path / "random", **common)
        low, high = result.interval
        assert low <= result.score <= high and low >= 0 and high <= 1
        assert result.difference[0] == pytest.approx(result.score - base.score)
        scores = json.loads((tmp_path / "mevt" / "scores.json").read_text())
        assert (scores["train_images"], scores["test_images"], scores["metric"]) == (12, 4, result.metric)
        assert scores["features"] == 64

    def test_same_command_same_numbers_and_features_are_computed_once(self, data, pretrained, tmp_path, monkeypatch):
        first = probe(data, "val", tmp_path / "a", weights=pretrained, **FAST)
        again = probe(data, "val", tmp_path / "b", weights=pretrained, **FAST)
        assert first._replace(out=None) == again._replace(out=None)
        monkeypatch.setattr("fastcam.pipelines.probe.compute_rows", lambda *_: pytest.fail("computed again"))
        other = probe(data, "val", tmp_path / "a", weights=pretrained, **{**FAST, "l2": (0.1, 1.0), "folds": 3})
        assert other.l2 in (0.1, 1.0)
        assert files(tmp_path / "a") == {"pass.json", "features.npz", "scores.json", "replicates.npy", "times.json"}

    def test_pixels_are_those_of_the_masks(self, data, pretrained, tmp_path):
        probe(data, "val", tmp_path, weights=pretrained, **{**FAST, "target": "pixels"})
        with np.load(tmp_path / "features.npz") as stored:
            assert set(np.unique(stored["y_0"])) <= set(range(len(CLASSES) + 1))
            assert stored["x_0"].shape[0] <= 12 * 8 * 8 and stored["image_0"].max() == 11

    def test_a_folder_with_one_class_an_image(self, root, pretrained, tmp_path):
        names = sorted(path.name for path in (root / "JPEGImages").iterdir())
        table = "\n".join(f"{name},{CLASSES[i % 2]}" for i, name in enumerate(names))
        (tmp_path / "tags.csv").write_text(f"file,class\n{table}\n")
        (tmp_path / "test.txt").write_text("\n".join(names[:4]) + "\n")
        data = Data(images=f"{root}/JPEGImages", tags=f"{tmp_path}/tags.csv", classes=CLASSES)
        test = str(tmp_path / "test.txt")
        result = probe(data, test, tmp_path / "out", weights=pretrained, target="class", **FAST)
        assert result.metric == "accuracy" and result.score in (0, 0.25, 0.5, 0.75, 1)
        (tmp_path / "bad.txt").write_text("nothing.jpg\n")
        with pytest.raises(FastcamError, match="test names nothing, which is no image in"):
            probe(data, str(tmp_path / "bad.txt"), tmp_path / "bad", weights=pretrained, **FAST)

    def test_a_backbone_by_name_and_stages(self, data, pretrained, tmp_path):
        one = {**FAST, "stages": (-1,)}
        probe(data, "val", tmp_path / "a", backbone="test_convnext", weights=pretrained, **one)
        probe(data, "val", tmp_path / "b", backbone="test_convnext", random=True, **one)
        scores = [json.loads((tmp_path / k / "scores.json").read_text()) for k in "ab"]
        channels = load_weights(pretrained)[0]["backbone.decoder.lateral.3.weight"].shape[1]
        assert [s["features"] for s in scores] == [channels, channels]

    def test_a_segmenter_starts_from_the_weights_and_is_built_without_them(self, root, data, pretrained, tmp_path):
        method = {
            "name": "deeplab",
            "backbone": "test_convnext+context16",
            "weights": str(pretrained),
            "output_stride": 32,
            "rates": [1],
            "head_channels": 8,
            "lr": 1e-9,  # so that what it started from is still there
            "weight_decay": 0.0,
        }
        settings = dataclasses.replace(TRAINER, epochs=1)
        trained = segment(data, tmp_path / "network", root / "SegmentationClass", method, settings)
        ours, theirs = load_weights(pretrained)[0], load_method(trained).backbone.state_dict()
        for key, value in ours.items():
            torch.testing.assert_close(theirs[key.removeprefix("backbone.")], value, rtol=1e-4, atol=1e-6)
        result = segment(data, tmp_path / "masks", predict=trained, device="cpu", flip=False)
        assert result.images == 12

    def test_refusals(self, data, weights, pretrained, tmp_path):
        def refused(match, test="val", **changes):
            with pytest.raises(FastcamError, match=match):
                probe(data, test, tmp_path / "refused", **{**FAST, "weights": pretrained, **changes})

        refused("weights are missing; give them, or backbone and --random true", weights=None)
        refused("are of a cam", weights=weights)
        refused("is both a training and a test image", test="train")
        refused("l2 is", l2=())
        refused("folds is 1, expected at least 2", folds=1)
        refused("stages has 9, but the network has 4 outputs", stages=(9,))
        refused(r"against is .* holds no scores\.json", against=tmp_path)
        probe(data, "val", tmp_path / "done", weights=pretrained, **FAST)
        refused("another bootstrap, 50; run it alike", against=tmp_path / "done", bootstrap=60, test="val")
