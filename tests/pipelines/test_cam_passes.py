"""make-cam, refine and label."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines.tiny import CLASSES, files

from fastcam.data import VOCDataset, multi_scale
from fastcam.errors import FastcamError
from fastcam.io import CamSet, load_cams, open_pass, read_label_png, read_pass, save_cams
from fastcam.methods import load_method
from fastcam.ops.crf_mean_field import crf_mean_field
from fastcam.pipelines import label as label_module
from fastcam.pipelines import make_cam as make_cam_module
from fastcam.pipelines._data import Data
from fastcam.pipelines.label import Rule, label, label_image, two_threshold_label
from fastcam.pipelines.make_cam import make_cam
from fastcam.pipelines.refine import Crf, crf_scores, refine

CRF = Crf(preset="psa", iterations=2, sxy=20)


def camset(maps, keys=(0, 2), background=None) -> CamSet:
    """A CamSet of one row of pixels."""
    maps = torch.tensor(maps, dtype=torch.float32)[:, None]
    background = None if background is None else torch.tensor([background], dtype=torch.float32)
    return CamSet(torch.tensor(keys), maps, background, tuple(maps.shape[1:]))


class TestMakeCam:
    def test_stores_what_the_method_gives_for_the_tags(self, root, weights, cams):
        method = load_method(weights)
        dataset = VOCDataset(root, "train", classes=CLASSES, tags="image_labels.csv", masks=None)
        item = dataset[3]
        views = multi_scale(item["image"].as_subclass(torch.Tensor), (1.0, 0.5))
        with torch.inference_mode():
            expected = method.fused_cams([view[None] for view in views], (12, 12), item["tags"][None]).maps[0]
        stored = load_cams(cams / f"{item['id']}.npz")
        assert stored.keys.tolist() == item["tags"].nonzero().flatten().tolist()
        assert stored.size == (48, 48)
        torch.testing.assert_close(stored.maps, expected[stored.keys], rtol=1e-3, atol=1e-4)  # stored as float16

    def test_has_one_file_an_image_and_the_record_of_the_pass(self, cams):
        wanted = {f"train_{i:04d}.npz" for i in range(12)}
        assert files(cams) == wanted | {"pass.json", "times.json"}
        assert read_pass(cams)["config"]["classes"] == CLASSES

    def test_finished_images_are_skipped_without_calling_the_network(self, data, weights, cams, monkeypatch):
        def refuse(*args, **kwargs):
            raise AssertionError("the network was called")

        monkeypatch.setattr(make_cam_module, "image_cams", refuse)
        before = {name: (cams / name).stat().st_mtime_ns for name in files(cams)}
        result = make_cam(data, weights, cams, scales=(1.0, 0.5))
        assert (result.images, result.written) == (12, 0)
        assert before == {name: (cams / name).stat().st_mtime_ns for name in files(cams)}

    def test_another_list_adds_to_the_folder(self, data, weights, cams):
        both = dataclasses.replace(data, split="train+val")
        result = make_cam(both, weights, cams, scales=(1.0, 0.5))
        assert (result.images, result.written) == (16, 4)
        for i in range(4):
            (cams / f"val_{i:04d}.npz").unlink()

    def test_other_scales_are_refused_with_the_change(self, data, weights, cams):
        with pytest.raises(FastcamError, match=r"another configuration \(scales: \[1.0, 0.5\] -> \[1.0\]\)"):
            make_cam(data, weights, cams, scales=(1.0,))

    def test_interrupted_pass_leaves_whole_files_and_goes_on_to_the_same_result(
        self, data, weights, cams, tmp_path, monkeypatch
    ):
        original, calls = make_cam_module.image_cams, []

        def interrupted(*args, **kwargs):
            calls.append(1)
            if len(calls) == 6:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(make_cam_module, "image_cams", interrupted)
            with pytest.raises(KeyboardInterrupt):
                make_cam(data, weights, tmp_path, scales=(1.0, 0.5))
        begun = files(tmp_path)
        assert 0 < sum(name.endswith(".npz") for name in begun) < 12
        assert not [name for name in begun if ".tmp" in name]
        for name in begun:
            if name.endswith(".npz"):
                load_cams(tmp_path / name)
        make_cam(data, weights, tmp_path, scales=(1.0, 0.5))
        for i in range(12):
            name = f"train_{i:04d}.npz"
            assert (tmp_path / name).read_bytes() == (cams / name).read_bytes()

    def test_failure_at_the_first_image_leaves_no_folder(self, data, weights, tmp_path, monkeypatch):
        def fail(*args, **kwargs):
            raise FastcamError("no")

        monkeypatch.setattr(make_cam_module, "image_cams", fail)
        with pytest.raises(FastcamError, match="no"):
            make_cam(data, weights, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_images_of_any_size_keep_theirs(self, root, weights, tmp_path):
        folder = tmp_path / "images"
        folder.mkdir()
        for name, size in {"wide": (61, 33), "dot": (1, 1)}.items():
            Image.new("RGB", size, "orange").save(folder / f"{name}.png")
        (tmp_path / "tags.csv").write_text("image,tags\nwide,fox goat\ndot,\n")
        source = Data(images=str(folder), tags=str(tmp_path / "tags.csv"))
        make_cam(source, weights, tmp_path / "out", scales=(1.0, 2.0))
        wide, dot = (load_cams(tmp_path / "out" / f"{name}.npz") for name in ("wide", "dot"))
        assert (wide.size, tuple(wide.maps.shape)) == ((33, 61), (2, 9, 16))
        assert (dot.size, tuple(dot.maps.shape)) == ((1, 1), (0, 1, 1))

    def test_segmenter_or_foreign_weights_are_refused(self, data, weights, tmp_path):
        foreign = tmp_path / "foreign.pth"
        torch.save({"fc.weight": torch.zeros(2, 2)}, foreign)
        with pytest.raises(FastcamError, match=r"foreign.pth say nothing of their method; expected the train pass's"):
            make_cam(data, foreign, tmp_path / "out")

    def test_classes_that_differ_from_the_weights_are_refused(self, data, weights, tmp_path):
        with pytest.raises(
            FastcamError, match=r"data.classes are fox, lion, but the input was made for fox, lion, sheep"
        ):
            make_cam(dataclasses.replace(data, classes="fox,lion"), weights, tmp_path / "out")


class TestRefine:
    def test_marginals_are_those_of_the_crf_on_the_image(self, root, data, cams, tmp_path):
        refine(data, cams, tmp_path, crf=CRF, background=0.3)
        image = VOCDataset(root, "train", classes=CLASSES)[5]["image"].as_subclass(torch.Tensor)
        scores = load_cams(cams / "train_0005.npz").scores(0.3)
        expected = crf_mean_field(
            -scores.clamp(1e-5, 1).log()[None], image[None], iterations=2, gaussian=(3, 3), bilateral=(20, 13, 10)
        )[0]
        refined = load_cams(tmp_path / "train_0005.npz")
        torch.testing.assert_close(refined.maps, expected[1:], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(refined.background, expected[0], rtol=1e-3, atol=1e-4)
        assert refined.maps.shape[1:] == refined.size == (48, 48)

    def test_label_unaries_are_those_of_the_best_label(self, cams, data, root):
        scores = load_cams(cams / "train_0001.npz").scores(0.3)
        image = VOCDataset(root, "train", classes=CLASSES)[1]["image"].as_subclass(torch.Tensor)
        crf = dataclasses.replace(CRF, unary="label", gt_prob=0.6)
        right = torch.nn.functional.one_hot(scores.argmax(0), len(scores)).permute(2, 0, 1)
        p = torch.where(right.bool(), 0.6, 0.4 / (len(scores) - 1))
        expected = crf_mean_field(-p.log()[None], image[None], iterations=2, gaussian=(3, 3), bilateral=(20, 13, 10))[0]
        torch.testing.assert_close(crf_scores(scores, image, crf), expected, rtol=1e-4, atol=1e-5)

    def test_image_without_tags_is_background(self):
        image = torch.zeros(3, 2, 2, dtype=torch.uint8)
        assert crf_scores(torch.full((1, 2, 2), 0.3), image, CRF).eq(1).all()

    def test_presets_are_the_published_ones(self):
        published = {  # specification of the authors' code: t, Gaussian sxy and compat, bilateral sxy, srgb, compat
            "irn": (10, 3, 3, 50, 5, 10, "label"),
            "psa": (10, 3, 3, 80, 13, 10, "softmax"),
            "deeplab": (10, 1, 3, 67, 3, 4, "softmax"),
        }
        for name, values in published.items():
            crf = Crf(preset=name).resolved()
            names = ("iterations", "gaussian_sxy", "gaussian_compat", "sxy", "srgb", "compat", "unary")
            assert tuple(crf[name] for name in names) == values
        assert Crf(preset="irn", srgb=7).resolved()["srgb"] == 7

    @pytest.mark.parametrize(("field", "value"), [("srgb", 0), ("iterations", 0), ("gt_prob", 1.0)])
    def test_value_out_of_range_is_named(self, field, value):
        with pytest.raises(FastcamError, match=f"crf.{field} is {value}"):
            Crf(**{field: value}).resolved()

    def test_cams_without_background_need_one(self, data, cams, tmp_path):
        with pytest.raises(FastcamError, match="have no background of their own; give a background or a power"):
            refine(data, cams, tmp_path / "out", crf=CRF)
        assert not (tmp_path / "out").exists()

    def test_image_of_another_size_than_its_cams_is_named(self, data, cams, tmp_path):
        folder = tmp_path / "cams"
        open_pass(folder, read_pass(cams)["config"])
        for i in range(12):
            stored = load_cams(cams / f"train_{i:04d}.npz")
            save_cams(folder / f"train_{i:04d}.npz", dataclasses.replace(stored, size=(40, 48)))
        with pytest.raises(FastcamError, match="image of train_0000 is 48 x 48 pixels, but its prediction is 48 x 40"):
            refine(data, folder, tmp_path / "out", crf=CRF, background=0.3)


class TestLabel:
    MAPS = ([0.9, 0.2, 0.04, 0.0], [0.1, 0.25, 0.03, 0.5])

    def test_threshold_by_hand(self):
        assert label_image(camset(self.MAPS), "a", Rule(threshold=0.3)).tolist() == [[1, 0, 0, 3]]

    def test_power_by_hand(self):
        # (1 - max)^2: 0.01, 0.5625, 0.9216, 0.25
        assert label_image(camset(self.MAPS), "a", Rule(power=2)).tolist() == [[1, 0, 0, 3]]
        # (1 - max)^8: 0.1001 in the second pixel, 0.7837 ^ ... = 0.72 in the third
        assert label_image(camset(self.MAPS), "a", Rule(power=8)).tolist() == [[1, 3, 0, 3]]

    def test_own_background_by_hand_ties_go_to_it(self):
        cams = camset(self.MAPS, background=[0.95, 0.2, 0.04, 0.5])
        assert label_image(cams, "a", Rule()).tolist() == [[0, 3, 0, 0]]

    def test_two_thresholds_by_hand(self):
        # high 0.3 sees 1, -, -, 3; low 0.05 sees 1, 3, -, 3
        assert label_image(camset(self.MAPS), "a", Rule(high=0.3, low=0.05)).tolist() == [[1, 255, 0, 3]]

    def test_certain_foreground_wins_over_another_class(self):
        certain, loose = torch.tensor([[2, 2, 0, 0]]), torch.tensor([[1, 0, 1, 0]])
        assert two_threshold_label(certain, loose).tolist() == [[2, 2, 255, 0]]

    def test_uncertain_pixels_are_ignored(self):
        assert label_image(camset(self.MAPS), "a", Rule(threshold=0.3, min_score=0.45)).tolist() == [[1, 255, 255, 3]]

    def test_rule_with_crf_is_irn_s(self, root, data, cams, tmp_path):
        crf = dataclasses.replace(CRF, unary="label")
        label(cams, tmp_path, high=0.5, low=0.1, crf=crf, data=data)
        dataset = VOCDataset(root, "train", classes=CLASSES)
        for item in (dataset[0], dataset[7]):
            stored = load_cams(cams / f"{item['id']}.npz")
            keys = np.array([0, *(stored.keys + 1).tolist()])
            image = item["image"].as_subclass(torch.Tensor)
            strict, loose = (
                keys[crf_scores(stored.scores(background), image, crf).argmax(0).numpy()] for background in (0.5, 0.1)
            )
            expected = np.where(strict > 0, strict, np.where(loose > 0, 255, 0))
            np.testing.assert_array_equal(read_label_png(tmp_path / f"{item['id']}.png").numpy(), expected)

    def test_without_a_data_set_labels_the_whole_folder(self, cams, tmp_path):
        assert label(cams, tmp_path, threshold=0.3).images == 12
        assert read_pass(tmp_path)["config"]["classes"] == CLASSES

    def test_cams_made_again_otherwise_are_not_mixed_in(self, data, cams, weights, tmp_path):
        label(cams, tmp_path / "labels", threshold=0.3)
        make_cam(data, weights, tmp_path / "other", scales=(1.0,))
        with pytest.raises(FastcamError, match=r"another configuration \(input: "):
            label(tmp_path / "other", tmp_path / "labels", threshold=0.3)

    @pytest.mark.parametrize(
        ("rule", "message"),
        [
            ({"high": 0.3}, "the two-threshold rule needs both"),
            ({"high": 0.1, "low": 0.3}, "high is 0.1, expected at least low"),
            ({"high": 0.3, "low": 0.1, "threshold": 0.2}, "exclude threshold, power and min_score"),
            ({"power": 2, "threshold": 0.2}, "threshold and power exclude each other"),
            ({"high": 0.3, "low": 0.1, "crf": CRF}, "crf needs the images"),
        ],
    )
    def test_rules_that_exclude_each_other(self, rule, message, cams, tmp_path):
        with pytest.raises(FastcamError, match=message):
            label(cams, tmp_path / "out", **rule)
        assert not (tmp_path / "out").exists()

    def test_missing_input_names_the_pass_to_run(self, tmp_path):
        with pytest.raises(FastcamError, match=r"input folder .*cams does not exist; run make-cam or refine first"):
            label(tmp_path / "cams", tmp_path / "out", threshold=0.3)


class TestClassifierTags:
    def test_without_tags_the_classifier_chooses_the_classes(self, root, weights, tmp_path, monkeypatch):
        def tag_logits(self, images):
            return torch.tensor([[5.0, -5.0, -5.0, 5.0, -5.0, -5.0]]).expand(len(images), 6)

        monkeypatch.setattr(type(load_method(weights)), "tag_logits", tag_logits, raising=False)
        make_cam(Data(images=str(root / "JPEGImages")), weights, tmp_path / "cams", scales=(1.0,))
        assert load_cams(tmp_path / "cams" / "val_0000.npz").keys.tolist() == [0, 3]


def test_labels_of_every_pass_use_the_same_ignore_value():
    assert label_module.IGNORE == 255
