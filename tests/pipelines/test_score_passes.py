"""evaluate and segment."""

import dataclasses
import json

import pytest
import torch
from pipelines.tiny import CLASSES, TRAINER, files

from fastcam.data import VOCDataset
from fastcam.errors import FastcamError
from fastcam.io import CamSet, load_cams, open_pass, read_label_png, save_cams, write_label_png
from fastcam.metrics import ConfusionMatrix, mean_iou
from fastcam.pipelines import segment as segment_module
from fastcam.pipelines._data import Data
from fastcam.pipelines.evaluate import evaluate, table
from fastcam.pipelines.label import Rule, label_image
from fastcam.pipelines.refine import Crf, crf_scores
from fastcam.pipelines.segment import image_probabilities, segment

DEEPLAB = {"name": "deeplab", "backbone": "resnet10t", "head_channels": 16, "rates": [1, 2]}


@pytest.fixture(scope="module")
def masks(root, tmp_path_factory):
    """The true masks as a folder of predictions: a perfect result."""
    folder = tmp_path_factory.mktemp("perfect")
    for split in ("train", "val"):
        for item in VOCDataset(root, split, classes=CLASSES):
            label = item["mask"].as_subclass(torch.Tensor)
            write_label_png(folder / f"{item['id']}.png", label.masked_fill(label == 255, 0))
    return folder


@pytest.fixture(scope="module")
def segmenter(data, masks, tmp_path_factory):
    config = dataclasses.replace(TRAINER, epochs=1)
    return segment(data, tmp_path_factory.mktemp("segment"), labels=masks, method=DEEPLAB, trainer=config)


class TestEvaluate:
    def test_true_masks_score_one(self, data, masks, tmp_path):
        scores = evaluate(data, masks, tmp_path)
        assert scores["mean_iou"]["skip"] == scores["mean_iou"]["gt_only"] == 1
        assert all(value in (1, None) for value in scores["iou"].values())
        assert scores["images"] == 12
        assert scores["ignored"] == 0
        assert json.loads((tmp_path / "scores.json").read_text()) == scores

    def test_by_hand(self, tmp_path):
        """Two images of 2 x 2 pixels, classes cat and dog."""
        for folder in ("JPEGImages", "ImageSets/Segmentation", "SegmentationClass"):
            (tmp_path / folder).mkdir(parents=True)
        (tmp_path / "classes.txt").write_text("cat\ndog\n")
        (tmp_path / "ImageSets/Segmentation/val.txt").write_text("a\nb\n")
        for name, mask, pred in (
            ("a", [[0, 1], [1, 255]], [[0, 1], [0, 2]]),
            ("b", [[0, 0], [1, 1]], [[1, 0], [1, 255]]),
        ):
            write_label_png(tmp_path / "JPEGImages" / f"{name}.png", torch.zeros(2, 2, dtype=torch.uint8))
            write_label_png(tmp_path / "SegmentationClass" / f"{name}.png", torch.tensor(mask))
            write_label_png(tmp_path / "pred" / f"{name}.png", torch.tensor(pred))
        from fastcam.pipelines._data import Data

        source = Data(root=str(tmp_path), split="val", tags="mask")
        scores = evaluate(source, tmp_path / "pred", tmp_path / "background")
        assert scores["confusion"] == [[2, 1, 0], [2, 2, 0], [0, 0, 0]]
        assert scores["iou"] == {"background": 2 / 5, "cat": 2 / 5, "dog": None}
        assert scores["mean_iou"] == pytest.approx({"skip": 0.4, "zero": 0.8 / 3, "gt_only": 0.4})
        assert scores["ignored"] == 1 / 8
        skipped = evaluate(source, tmp_path / "pred", tmp_path / "skip", ignored="skip")
        assert skipped["confusion"] == [[2, 1, 0], [1, 2, 0], [0, 0, 0]]
        lines = table(scores).splitlines()
        assert lines[1:5] == ["background        40.0", "cat               40.0", "dog                  -",
                              "mean              40.0   over 2 images"]  # fmt: skip

    def test_sweep_of_cams_equals_labelling_at_every_threshold(self, root, data, cams, tmp_path):
        scores = evaluate(data, cams, tmp_path)
        dataset = VOCDataset(root, "train", classes=CLASSES)
        for threshold in (0.0, 0.2, 0.41):
            confusion = ConfusionMatrix(7)
            for item in dataset:
                pred = label_image(load_cams(cams / f"{item['id']}.npz"), item["id"], Rule(threshold=threshold))
                confusion.update(pred, item["mask"].as_subclass(torch.Tensor))
            at = scores["sweep"]["thresholds"].index(threshold)
            assert scores["sweep"]["mean_iou"][at] == pytest.approx(mean_iou(confusion.compute()), abs=1e-12)
        assert scores["threshold"] == scores["sweep"]["best_threshold"]
        assert scores["mean_iou"]["skip"] == scores["sweep"]["best_mean_iou"] == max(scores["sweep"]["mean_iou"])
        fixed = evaluate(data, cams, tmp_path, threshold=0.41)
        assert fixed["mean_iou"]["skip"] == scores["sweep"]["mean_iou"][41]

    def test_cams_with_a_background_are_scored_by_it(self, root, data, cams, tmp_path):
        confusion = ConfusionMatrix(7)
        for item in VOCDataset(root, "train", classes=CLASSES):
            stored = load_cams(cams / f"{item['id']}.npz")
            own = dataclasses.replace(stored, background=torch.full(stored.maps.shape[1:], 0.25))
            save_cams(tmp_path / "own" / f"{item['id']}.npz", own)
            confusion.update(label_image(own, "", Rule()), item["mask"].as_subclass(torch.Tensor))
        scores = evaluate(data, tmp_path / "own")
        assert scores["threshold"] is None
        assert scores["confusion"] == confusion.compute().tolist()

    def test_missing_prediction_is_counted_and_named(self, data, masks, tmp_path):
        for path in masks.glob("train_*.png"):
            if path.stem != "train_0004":
                (tmp_path / path.name).write_bytes(path.read_bytes())
        with pytest.raises(FastcamError, match=r"has no prediction for 1 of 12 images, e.g. train_0004"):
            evaluate(data, tmp_path)

    def test_prediction_of_another_size_is_named(self, data, masks, tmp_path):
        for path in masks.glob("train_*.png"):
            write_label_png(tmp_path / path.name, torch.zeros(40, 48, dtype=torch.uint8))
        with pytest.raises(FastcamError, match="mask of train_0000 is 48 x 48 pixels, but its prediction is 48 x 40"):
            evaluate(data, tmp_path)

    def test_label_beyond_the_classes_is_named(self, data, tmp_path):
        for i in range(12):
            write_label_png(tmp_path / f"train_{i:04d}.png", torch.full((48, 48), 7, dtype=torch.uint8))
        with pytest.raises(FastcamError, match=r"train_0000.png has label 7, expected 0 to 6 or 255 for 6 classes"):
            evaluate(data, tmp_path)
        assert "scores.json" not in files(tmp_path)

    def test_class_beyond_the_classes_is_named(self, data, tmp_path):
        for i in range(12):
            cams = CamSet(torch.tensor([6]), torch.zeros(1, 12, 12), None, (48, 48))
            save_cams(tmp_path / f"train_{i:04d}.npz", cams)
        with pytest.raises(FastcamError, match=r"train_0000.npz has class 6, expected 0 to 5"):
            evaluate(data, tmp_path)


class TestSegment:
    def test_writes_the_most_probable_label_of_every_image(self, root, data, segmenter, tmp_path):
        source = dataclasses.replace(data, split="val")
        result = segment(source, tmp_path / "masks", predict=segmenter, scales=(1.0, 0.5))
        assert (result.images, result.written) == (4, 4)
        assert {name for name in files(tmp_path / "masks") if name.endswith(".png")} == {
            f"val_{i:04d}.png" for i in range(4)
        }
        from fastcam.data import multi_scale
        from fastcam.methods import load_method

        network = load_method(segmenter)
        image = VOCDataset(root, "val", classes=CLASSES)[1]["image"].as_subclass(torch.Tensor)
        views = multi_scale(image, (1.0, 0.5), mean=network.normalize[0], std=network.normalize[1])
        with torch.inference_mode():
            total = torch.zeros(7, 48, 48)
            for view in views:
                for mirrored in (False, True):
                    logits = network.logits(view[None].flip(-1) if mirrored else view[None])
                    p = torch.nn.functional.interpolate(logits, (48, 48), mode="bilinear").softmax(1)[0]
                    total += p.flip(-1) if mirrored else p
        assert torch.equal(read_label_png(tmp_path / "masks" / "val_0001.png").long(), total.argmax(0))

    def test_known_tags_keep_masks_to_the_classes_among_them(self, root, data, segmenter, tmp_path):
        source = dataclasses.replace(data, split="val")
        segment(source, tmp_path, predict=segmenter, known_tags=True)
        for item in VOCDataset(root, "val", classes=CLASSES, tags="image_labels.csv", masks=None):
            allowed = {0, *(item["tags"].nonzero().flatten() + 1).tolist()}
            assert set(read_label_png(tmp_path / f"{item['id']}.png").unique().tolist()) <= allowed

    def test_known_tags_without_tags_are_refused(self, root, segmenter, tmp_path):
        with pytest.raises(FastcamError, match=r"known_tags needs tags, and the images in .* have none"):
            segment(Data(images=str(root / "JPEGImages")), tmp_path, predict=segmenter, known_tags=True)

    def test_crf_works_on_the_probabilities(self, root, data, segmenter, tmp_path):
        crf = Crf(preset="deeplab", iterations=2)
        source = dataclasses.replace(data, split="val")
        segment(source, tmp_path, predict=segmenter, flip=False, crf=crf)
        from fastcam.data import multi_scale
        from fastcam.methods import load_method

        image = VOCDataset(root, "val", classes=CLASSES)[0]["image"].as_subclass(torch.Tensor)
        p = image_probabilities(load_method(segmenter), multi_scale(image, (1.0,)), (48, 48), flip=False)
        assert torch.equal(read_label_png(tmp_path / "val_0000.png").long(), crf_scores(p, image, crf).argmax(0))

    def test_finished_training_and_masks_are_left_alone(self, data, masks, segmenter, tmp_path, monkeypatch):
        segment(data, tmp_path, predict=segmenter)

        def refuse(*args, **kwargs):
            raise AssertionError("called again")

        monkeypatch.setattr(segment_module, "create_method", refuse)
        monkeypatch.setattr(segment_module, "image_probabilities", refuse)
        config = dataclasses.replace(TRAINER, epochs=1)
        before = segmenter.stat().st_mtime_ns
        assert segment(data, segmenter.parent, labels=masks, method=DEEPLAB, trainer=config) == segmenter
        assert segmenter.stat().st_mtime_ns == before
        assert segment(data, tmp_path, predict=segmenter).written == 0

    def test_missing_label_is_counted_and_named(self, data, tmp_path):
        write_label_png(tmp_path / "labels" / "train_0000.png", torch.zeros(48, 48, dtype=torch.uint8))
        with pytest.raises(
            FastcamError, match=r"has no label for 11 of 12 images, e.g. train_0001; finish the label pass"
        ):
            segment(data, tmp_path / "out", labels=tmp_path / "labels", method=DEEPLAB, trainer=TRAINER)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("workers", [0, 1])
    def test_label_of_another_size_is_named_in_one_line(self, workers, data, tmp_path):
        for i in range(12):
            write_label_png(tmp_path / "labels" / f"train_{i:04d}.png", torch.zeros(48, 40, dtype=torch.uint8))
        config = dataclasses.replace(TRAINER, workers=workers)
        with pytest.raises(FastcamError, match=r"^label .*png is 40 x 48 pixels, but its image is 48 x 48") as caught:
            segment(data, tmp_path / "out", labels=tmp_path / "labels", method=DEEPLAB, trainer=config)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_label_beyond_the_classes_is_named(self, data, tmp_path):
        for i in range(12):
            write_label_png(tmp_path / "labels" / f"train_{i:04d}.png", torch.full((48, 48), 9, dtype=torch.uint8))
        with pytest.raises(FastcamError, match="has value 9, expected 0 to 6 or 255"):
            segment(data, tmp_path / "out", labels=tmp_path / "labels", method=DEEPLAB, trainer=TRAINER)

    def test_method_of_the_wrong_kind_is_named(self, data, masks, weights, tmp_path):
        method = {"name": "cam", "backbone": "resnet10t"}
        with pytest.raises(FastcamError, match="method cam is a cam, expected a segmenter such as deeplab"):
            segment(data, tmp_path / "out", labels=masks, method=method, trainer=TRAINER)
        with pytest.raises(FastcamError, match=r"are of a cam \(cam\), expected a segmenter"):
            segment(data, tmp_path / "out", predict=weights)
        with pytest.raises(FastcamError, match="either labels"):
            segment(data, tmp_path / "out")

    def test_record_of_foreign_labels_names_their_folder(self, data, masks, segmenter):
        record = json.loads((segmenter.parent / "pass.json").read_text())
        assert record["config"]["input"] == str(masks)
        assert open_pass(segmenter.parent, record["config"]) == record["fingerprint"]
