"""refine by IRN, PSA, PAR and PAMR."""

import dataclasses
import json

import pytest
import torch
from pipelines.tiny import CLASSES, TRAINER, files
from torch.nn import functional as F

from fastcam.data import VOCDataset, multi_scale
from fastcam.errors import FastcamError
from fastcam.io import load_cams, load_instances, load_weights, read_label_png, read_pass
from fastcam.methods import load_method
from fastcam.ops.pixel_refine import pixel_refine
from fastcam.pipelines import _affinity, _fit
from fastcam.pipelines.label import label
from fastcam.pipelines.refine import Crf, Pixel, Seeds, pixel_scores, refine

CRF = Crf(iterations=2, sxy=20)
SEEDS = Seeds(high=0.5, low=0.2)
ONE = dataclasses.replace(TRAINER, epochs=1)
BACKBONE = {"backbone": "test_resnet"}
IRN = {
    **BACKBONE,
    "edge_channels": 8,
    "displacement_channels": [8, 8, 16, 16, 16],
    "train_radius": 4,
    "pad": 16,
    "steps": 16,
}
PSA = {**BACKBONE, "head_channels": [4, 4, 8], "steps": 16, "frozen_stages": 4, "lr": 0.01}


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def irn(data, cams, tmp_path_factory):
    """IRN's output for the training images, with objects."""
    out = tmp_path_factory.mktemp("irn")
    settings = {"crf": CRF, "seeds": SEEDS, "background": 0.25, "method": IRN, "trainer": ONE}
    refine(data, cams, out / "cams", how="irn", instances=out / "instances", **settings)
    return out


@pytest.fixture(scope="module")
def network(irn):
    return irn / "cams" / "network" / "weights.safetensors"


def image_of(root, index: int):
    return VOCDataset(root, "train", classes=CLASSES)[index]["image"].as_subclass(torch.Tensor)


def view_of(root, index: int, method):
    """The normalised image as a method sees it."""
    return multi_scale(image_of(root, index), (1.0,), mean=method.normalize[0], std=method.normalize[1])[0]


class TestIRN:
    def test_leaves_cams_objects_and_a_trained_network(self, irn):
        names = files(irn / "cams")
        assert {f"train_{i:04d}.npz" for i in range(12)} | {"pass.json", "times.json"} <= names
        assert {"weights.safetensors", "last.ckpt", "metrics.csv", "pass.json"} <= files(irn / "cams" / "network")
        assert files(irn / "instances") == {f"train_{i:04d}.json" for i in range(12)}
        assert read_pass(irn / "cams")["config"]["classes"] == CLASSES

    def test_is_trained_on_labels_of_the_two_threshold_rule(self, irn, data, cams, tmp_path):
        label(cams, tmp_path, high=0.5, low=0.2, crf=CRF, data=data)
        for i in range(12):
            ours = read_label_png(irn / "cams" / "network" / "labels" / f"train_{i:04d}.png")
            assert torch.equal(ours, read_label_png(tmp_path / f"train_{i:04d}.png"))

    def test_cams_are_those_of_the_network(self, irn, network, cams, root):
        method = load_method(network)
        with torch.no_grad():
            scores = method.refine(view_of(root, 4, method)[None], load_cams(cams / "train_0004.npz").maps[None], 0.25)
        expected = F.interpolate(scores, (12, 12), mode="bilinear", align_corners=False)[0]
        stored = load_cams(irn / "cams" / "train_0004.npz")
        torch.testing.assert_close(stored.maps, expected[1:], rtol=1e-3, atol=1e-3)  # stored as float16
        assert stored.background.unique().tolist() == [0.25]
        assert stored.size == (48, 48)

    def test_objects_are_those_of_the_network_in_classes_of_the_data_set(self, irn, network, cams, root):
        method = load_method(network)
        for i in range(12):
            camset = load_cams(cams / f"train_{i:04d}.npz")
            with torch.no_grad():
                masks, index, scores = method.instances(view_of(root, i, method), camset.maps, 0.25)
            stored = load_instances(irn / "instances" / f"train_{i:04d}.json")
            assert torch.equal(stored.masks, masks)
            assert torch.equal(stored.classes, camset.keys[index])
            torch.testing.assert_close(stored.scores, scores, rtol=0, atol=1e-6)

    def test_mean_displacement_is_stored_with_the_weights(self, network, root):
        method = load_method(network)
        views = [view_of(root, i, method)[None] for i in range(12)]
        assert method.displacement.mean.abs().max() > 0
        with torch.no_grad():
            means = torch.stack([method.relations(view)[1].mean(dim=(0, 2, 3)) for view in views])
        torch.testing.assert_close(means.mean(dim=0), torch.zeros(2), rtol=0, atol=1e-4)

    def test_finished_pass_trains_and_walks_nothing_again(self, irn, data, cams, monkeypatch):
        monkeypatch.setattr(_affinity, "create_method", None)
        monkeypatch.setattr(_affinity, "walked_cams", None)
        settings = {"crf": CRF, "seeds": SEEDS, "background": 0.25, "method": IRN, "trainer": ONE}
        result = refine(data, cams, irn / "cams", how="irn", instances=irn / "instances", **settings)
        assert (result.images, result.written) == (12, 0)

    def test_trained_weights_walk_alone_to_the_same_result(self, irn, network, data, cams, tmp_path):
        refine(data, cams, tmp_path, how="irn", background=0.25, weights=network)
        assert not (tmp_path / "network").exists()
        for i in range(12):
            stored = (irn / "cams" / f"train_{i:04d}.npz").read_bytes()
            assert (tmp_path / f"train_{i:04d}.npz").read_bytes() == stored

    def test_killed_in_training_it_goes_on_to_the_same_weights(self, network, data, cams, tmp_path, monkeypatch):
        original = _fit.StepModule.training_step

        def killed(self, batch, batch_idx):
            if self.step == 2:
                raise Killed
            return original(self, batch, batch_idx)

        settings = {"crf": CRF, "seeds": SEEDS, "background": 0.25, "method": IRN}
        trainer = dataclasses.replace(ONE, checkpoint_every=1)
        with monkeypatch.context() as patch:
            patch.setattr(_fit.StepModule, "training_step", killed)
            with pytest.raises(Killed):
                refine(data, cams, tmp_path, how="irn", trainer=trainer, **settings)
        assert torch.load(tmp_path / "network" / "last.ckpt", weights_only=True)["step"] == 2
        assert not (tmp_path / "pass.json").exists()
        refine(data, cams, tmp_path, how="irn", trainer=trainer, **settings)
        first, second = load_weights(network)[0], load_weights(tmp_path / "network" / "weights.safetensors")[0]
        for name in first:
            assert torch.equal(first[name], second[name]), name

    def test_interrupted_behind_the_training_it_calibrates_again(self, network, data, cams, tmp_path, monkeypatch):
        settings = {"crf": CRF, "seeds": SEEDS, "background": 0.25, "method": IRN, "trainer": ONE}

        def stop(*args, **kwargs):
            raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(_affinity, "multi_scale", stop)
            with pytest.raises(Killed):
                refine(data, cams, tmp_path, how="irn", **settings)
        assert not (tmp_path / "network" / "weights.safetensors").exists()
        refine(data, cams, tmp_path, how="irn", **settings)
        mean = load_weights(tmp_path / "network" / "weights.safetensors")[0]["displacement.mean"]
        assert torch.equal(mean, load_weights(network)[0]["displacement.mean"])

    def test_of_several_processes_that_trained_only_the_first_walks(self, irn, data, cams, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "1")
        monkeypatch.setattr(_affinity, "walk", None)
        result = refine(data, cams, irn / "cams", how="irn", crf=CRF, seeds=SEEDS, method=IRN, trainer=ONE)
        assert result.written == 0

    def test_other_settings_of_the_network_are_refused_with_the_change(self, irn, data, cams):
        with pytest.raises(FastcamError, match=r"another configuration \(method.lr: unset -> 0.5\)"):
            refine(data, cams, irn / "cams", how="irn", crf=CRF, seeds=SEEDS, method={**IRN, "lr": 0.5}, trainer=ONE)

    def test_objects_asked_for_later_are_refused_rather_than_left_out(self, network, data, cams, tmp_path):
        refine(data, cams, tmp_path / "out", how="irn", background=0.25, weights=network)
        with pytest.raises(FastcamError, match=r"\(instances: False -> True\)"):
            refine(data, cams, tmp_path / "out", how="irn", background=0.25, weights=network, instances=tmp_path / "i")

    def test_weights_of_another_kind_or_method_are_refused(self, network, weights, data, cams, tmp_path):
        with pytest.raises(FastcamError, match=r"are of a cam \(cam\), expected a refiner"):
            refine(data, cams, tmp_path, how="irn", background=0.25, weights=weights)
        with pytest.raises(FastcamError, match="are of irn, expected psa; give other weights or --how"):
            refine(data, cams, tmp_path, how="psa", power=4, weights=network)
        assert not files(tmp_path)


class TestPSA:
    def test_trains_and_walks_with_the_background(self, data, cams, root, tmp_path):
        refine(data, cams, tmp_path, how="psa", crf=CRF, power=4, method=PSA, trainer=ONE)
        method = load_method(tmp_path / "network" / "weights.safetensors")
        camset = load_cams(cams / "train_0002.npz")
        with torch.no_grad():
            planes = camset.scores(("power", 4))[None]
            scores = method.refine(view_of(root, 2, method)[None], planes, None)
        expected = F.interpolate(scores, (12, 12), mode="bilinear", align_corners=False)[0]
        stored = load_cams(tmp_path / "train_0002.npz")
        torch.testing.assert_close(stored.maps, expected[1:], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(stored.background, expected[0], rtol=1e-3, atol=1e-3)
        crf = read_pass(tmp_path / "network")["config"]["crf"]
        assert (crf["preset"], crf["unary"]) == ("psa", "softmax")

    def test_seeds_are_those_of_its_powers(self, cams, root):
        camset, image = load_cams(cams / "train_0003.npz"), image_of(root, 3)
        crf = dataclasses.replace(CRF, preset="psa")
        ours = _affinity.seed_label(camset, image, Seeds().resolved("psa"), crf)
        keys = torch.cat([torch.zeros(1, dtype=torch.int64), camset.keys + 1])
        la, ha = (keys[_affinity.crf_scores(camset.scores(("power", a)), image, crf).argmax(0)] for a in (4, 32))
        expected = torch.where(la > 0, la, torch.where(ha == 0, 0, 255))
        assert torch.equal(ours.long(), expected)


class TestPixel:
    @pytest.mark.parametrize("how", ["par", "pamr"])
    def test_scores_are_those_of_the_op_on_half_the_image(self, how, data, cams, root, tmp_path):
        pixel = Pixel(dilations=(1, 2), iterations=3)
        refine(data, cams, tmp_path, how=how, background=0.4, pixel=pixel)
        camset, image = load_cams(cams / "train_0006.npz"), image_of(root, 6)
        half = [
            F.interpolate(x[None].float(), (24, 24), mode="bilinear", align_corners=False)
            for x in (camset.scores(0.4), image)
        ]
        start = half[0].softmax(1) if how == "par" else half[0] / half[0].sum(1, keepdim=True)
        refined = pixel_refine(start, half[1], mode=how, dilations=(1, 2), iterations=3)
        if how == "par":
            refined = refined / 1.01**3  # its weights sum to 1.01
        stored = load_cams(tmp_path / "train_0006.npz")
        torch.testing.assert_close(stored.maps, refined[0, 1:], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(stored.background, refined[0, 0], rtol=1e-3, atol=1e-3)
        assert stored.size == (48, 48)

    def test_image_without_tags_is_background(self):
        image = torch.zeros(3, 5, 4, dtype=torch.uint8)
        assert pixel_scores(torch.full((1, 5, 4), 0.3), image, "par", Pixel()).tolist() == [[[1, 1], [1, 1]]]

    @pytest.mark.parametrize(
        ("pixel", "message"),
        [
            (Pixel(dilations=(0, 1)), r"pixel.dilations are \[0, 1\]"),
            (Pixel(dilations=()), r"pixel.dilations are \[\]"),
            (Pixel(iterations=0), "pixel.iterations is 0"),
            (Pixel(scale=2.0), "pixel.scale is 2.0"),
        ],
    )
    def test_value_out_of_range_is_named(self, pixel, message, data, cams, tmp_path):
        with pytest.raises(FastcamError, match=message):
            refine(data, cams, tmp_path / "out", how="par", background=0.3, pixel=pixel)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"how": "crf", "method": {"lr": 1}}, "method is for how irn and psa, and how is crf"),
        ({"how": "par", "weights": "w"}, "weights is for how irn and psa, and how is par"),
        ({"how": "psa", "instances": "i"}, "instances are for how irn, and how is psa"),
        ({"how": "irn", "method": {"name": "psa"}}, "method.name is psa, and how is irn"),
        ({"how": "irn", "method": {"lr": 1}, "weights": "w"}, "method describes a network to train, and weights is"),
        ({"how": "irn", "background": 0.3, "power": 4}, "background 0.3 and power 4 exclude each other"),
        ({"how": "irn", "seeds": Seeds(high=0.3)}, "seeds are high 0.3, expected high and low, or"),
        ({"how": "irn", "seeds": Seeds(0.3, None, 4)}, "seeds are high 0.3, high_power 4, expected high and low, or"),
        ({"how": "irn", "seeds": Seeds(0.1, 0.3)}, "seeds are high 0.1, low 0.3, expected a low background"),
        ({"how": "psa", "seeds": Seeds(None, None, 8, 4)}, "seeds are high_power 8, low_power 4, expected a low"),
        ({"how": "irn", "method": {"edge_chanels": 8}}, "unknown setting 'edge_chanels', did you mean 'edge_channels'"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused_before_anything_is_written(
    settings, message, data, cams, tmp_path
):
    with pytest.raises(FastcamError, match=message):
        refine(data, cams, tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", ["irn", "psa", "par"])
def test_cams_without_background_need_one_and_say_so_before_any_training(how, data, cams, tmp_path):
    with pytest.raises(FastcamError, match="have no background of their own; give a background or a power"):
        refine(data, cams, tmp_path / "out", how=how)
    assert not (tmp_path / "out").exists()


def test_records_of_objects_are_those_of_coco(irn):
    content = json.loads((irn / "instances" / "train_0000.json").read_text())
    assert content["size"] == [48, 48]
    assert content["annotations"][0].keys() == {"image_id", "category_id", "score", "segmentation"}
    assert content["annotations"][0]["image_id"] == "train_0000"
