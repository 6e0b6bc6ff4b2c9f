"""Training on labelled and unlabelled images, and ACDC's slices through the passes."""

import csv
import dataclasses
import json

import numpy as np
import pytest
import torch
from pipelines.tiny import CLASSES, TRAINER

from fastcam.data import VOCDataset
from fastcam.errors import FastcamError
from fastcam.io import load_weights, read_label_png, write_label_png
from fastcam.methods import load_method
from fastcam.pipelines import _fit
from fastcam.pipelines._data import Data, open_data
from fastcam.pipelines._fit import Seeded
from fastcam.pipelines.acdc import acdc
from fastcam.pipelines.cli import main
from fastcam.pipelines.evaluate import evaluate, table
from fastcam.pipelines.segment import Drawn, Labelled, segment

DEEPLAB = {"name": "deeplab", "backbone": "resnet10t", "head_channels": 16, "rates": [1, 2]}


@pytest.fixture(scope="module")
def labels(root, tmp_path_factory):
    """The true masks of the training images as label PNGs."""
    folder = tmp_path_factory.mktemp("labels")
    for item in VOCDataset(root, "train", classes=CLASSES):
        write_label_png(folder / f"{item['id']}.png", item["mask"].as_subclass(torch.Tensor))
    return folder


def number(item):
    """What stands for an image: its brightness, which no other image has."""
    item = dict(item)
    item["image"] = item["image"].float().mean((1, 2))
    if "mask" in item:
        item["mask"] = item["mask"].float().mean()
    return item


@pytest.fixture
def drawn(root, data, labels):
    def make(subsets):
        images, others = open_data(data), open_data(dataclasses.replace(data, split="val"), transform=number)
        return Drawn(Labelled(images, labels, number), others, subsets)

    return make


def whites(root, split):
    return [number(item) for item in VOCDataset(root, split, classes=CLASSES)]


def test_an_item_is_its_unlabelled_image_and_a_labelled_one_that_is_drawn(root, drawn):
    dataset = Seeded(drawn(None), 0)
    known = [item["image"] for item in whites(root, "train")]
    seen = set()
    for turn in range(12):
        for index, true in enumerate(whites(root, "val")):
            item = dataset[turn, index]
            assert torch.equal(item["unlabelled"], true["image"])
            seen.add(next(i for i, image in enumerate(known) if torch.equal(image, item["image"])))
            again = dataset[turn, index]
            assert torch.equal(again["image"], item["image"])
            assert torch.equal(again["mask"], item["mask"])
    assert len(seen) > 8  # 48 draws of 12 images
    assert len(dataset.dataset) == 4


def test_every_network_draws_from_its_own_subset(root, drawn):
    subsets = [[0, 1], [5], [2, 3, 4]]
    dataset = Seeded(drawn(subsets), 1)
    known = whites(root, "train")
    for turn in range(6):
        item = dataset[turn, 0]
        assert item["image"].shape == (3, 3)
        for image, mask, subset in zip(item["image"], item["mask"], subsets, strict=True):
            assert any(torch.equal(image, known[i]["image"]) for i in subset)
            assert any(torch.allclose(mask, known[i]["mask"]) for i in subset)


def test_without_unlabelled_images_there_are_as_many_items_as_labelled_ones(data, labels):
    assert len(Drawn(Labelled(open_data(data), labels, number), None, [[0], [1]])) == 12


def test_unlabelled_images_are_refused_by_a_method_that_does_not_learn_from_them(data, labels, tmp_path):
    with pytest.raises(FastcamError, match="method deeplab does not learn from unlabelled images; leave them out"):
        segment(data, tmp_path / "out", labels=labels, unlabelled=data, method=DEEPLAB, trainer=TRAINER)
    assert not (tmp_path / "out").exists()


COTRAINING = {"name": "cotraining", "backbone": "unet", "width": 2, "channels": 3, "epochs": 4}
STEPS = dataclasses.replace(TRAINER, epochs=2, steps_per_epoch=2, batch_size=2, crop=32)


@pytest.fixture(scope="module")
def others(data):
    return dataclasses.replace(data, split="val")


def learn(data, labels, others, out, method=COTRAINING, trainer=STEPS):
    return segment(data, out, labels=labels, unlabelled=others, method=method, trainer=trainer)


def same_state(first, second):
    a, b = (load_weights(path)[0] for path in (first, second))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def cotrained(data, labels, others, tmp_path_factory):
    return learn(data, labels, others, tmp_path_factory.mktemp("whole"), {**COTRAINING, "adv_begin": 0, "cot_end": 2})


def test_killed_and_run_again_ends_in_the_same_bits(data, labels, others, cotrained, tmp_path, monkeypatch):
    method = {**COTRAINING, "adv_begin": 0, "cot_end": 2}
    trainer = dataclasses.replace(STEPS, checkpoint_every=1)
    original = _fit.StepModule.training_step

    def training_step(self, batch, batch_idx):
        if self.step == 3:
            raise KeyboardInterrupt
        return original(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(_fit.StepModule, "training_step", training_step)
        with pytest.raises(KeyboardInterrupt):
            learn(data, labels, others, tmp_path, method, trainer)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["step"] == 3
    assert same_state(learn(data, labels, others, tmp_path, method, trainer), cotrained)


def test_all_networks_learn_and_metrics_name_the_terms(data, cotrained):
    state, about = load_weights(cotrained)
    assert about["method"] == "cotraining"
    assert {name.split(".")[1] for name in state if name.startswith("networks.")} == {"0", "1"}
    assert not torch.equal(state["networks.0.last.weight"], state["networks.1.last.weight"])
    with (cotrained.parent / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert {"supervised", "jsd", "adversarial", "diversity", "cot_factor", "adv_factor", "lr", "lr1"} <= set(rows[0])
    assert float(rows[-1]["jsd"]) > 0
    assert float(rows[-1]["cot_factor"]) == 0.5


def test_method_that_learns_from_unlabelled_images_is_refused_without(data, labels, tmp_path):
    with pytest.raises(
        FastcamError, match=r"method cotraining learns from unlabelled images; give unlabelled\.root or"
    ):
        learn(data, labels, None, tmp_path / "out")
    alone = {**COTRAINING, "cot_max": 0.0, "adv_max": 0.0}
    with pytest.raises(FastcamError, match="method cotraining does not learn from unlabelled images; leave them out"):
        learn(data, labels, data, tmp_path / "out", alone)
    assert not (tmp_path / "out").exists()
    assert learn(data, labels, None, tmp_path / "alone", alone).is_file()


def test_folder_trained_on_other_unlabelled_images_is_refused(data, labels, cotrained):
    method = {**COTRAINING, "adv_begin": 0, "cot_end": 2}
    with pytest.raises(FastcamError, match=r"another configuration \(unlabelled.split: val -> train\)"):
        learn(data, labels, data, cotrained.parent, method)


def test_vote_may_change_for_prediction(data, cotrained, tmp_path):
    masks = []
    for name, change in (("soft", None), ("first", {"vote": 0})):
        segment(data, tmp_path / name, predict=cotrained, flip=False, change=change)
        masks.append(torch.stack([read_label_png(path) for path in sorted((tmp_path / name).glob("*.png"))]))
    network = load_method(cotrained)
    item = open_data(data)[0]
    with torch.inference_mode():
        p = network.probabilities(item["image"].as_subclass(torch.Tensor)[None] / 255)
    assert torch.equal(masks[0][0].long(), p.mean(0)[0].argmax(0))
    assert torch.equal(masks[1][0].long(), p[0, 0].argmax(0))
    with pytest.raises(FastcamError, match=r"another configuration \(change.vote: 0 -> hard\)"):
        segment(data, tmp_path / "first", predict=cotrained, flip=False, change={"vote": "hard"})
    with pytest.raises(FastcamError, match="unknown setting 'votes', did you mean 'vote'"):
        segment(data, tmp_path / "no", predict=cotrained, change={"votes": 1})


@pytest.fixture(scope="module")
def acdc_root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("patients")
    rng = np.random.default_rng(0)
    for patient in range(5):
        arrays = {}
        for phase in ("ed", "es"):
            arrays[f"{phase}_label"] = np.repeat(np.repeat(rng.integers(0, 4, (2, 4, 4)), 8, 1), 8, 2).astype(np.uint8)
            arrays[f"{phase}_image"] = 60 * arrays[f"{phase}_label"] + 10
        np.savez(folder / f"patient{patient:03d}.npz", **arrays)
    return acdc(folder, tmp_path_factory.mktemp("acdc"), labelled=(0.25,))


class TestACDC:
    def test_slices_train_predict_and_are_scored_by_volume(self, acdc_root, tmp_path):
        root = str(acdc_root)
        where = Data(root=root, split="labelled_25")
        free = Data(root=root, split="unlabelled_25")
        method = {"name": "cotraining", "backbone": "enet"}
        weights = learn(where, acdc_root / "SegmentationClass", free, tmp_path / "train", method)
        test = Data(root=root, split="test")
        segment(test, tmp_path / "masks", predict=weights)
        scores = evaluate(test, tmp_path / "masks", volumes=acdc_root / "volumes.csv")
        assert scores["volumes"]["count"] == 2
        assert set(scores["volumes"]["dice"]) == {"rv", "myocardium", "lv"}
        perfect = evaluate(test, acdc_root / "SegmentationClass", tmp_path, volumes=acdc_root / "volumes.csv")
        assert perfect["volumes"]["mean_dice"] == perfect["volumes"]["mean_slice_dice"] == 1
        assert perfect["volumes"]["mean_hd95"] == 0
        assert json.loads((tmp_path / "scores.json").read_text()) == perfect
        lines = table(perfect).splitlines()
        assert lines[-6:] == [
            "volumes          Dice %  by slice    HD95  missed",
            "rv                100.0     100.0    0.00       0",
            "myocardium        100.0     100.0    0.00       0",
            "lv                100.0     100.0    0.00       0",
            "mean              100.0     100.0    0.00       0",
            "over 2 volumes",
        ]

    def test_command_line_takes_a_second_data_section_and_changes(self, acdc_root, tmp_path, capsys):
        common = ["segment", "--data.root", str(acdc_root)]
        train = ["--config", "cotraining_acdc_small", "--data.split", "labelled_25", "--trainer.epochs", "1"]
        train += ["--labels", str(acdc_root / "SegmentationClass"), "--trainer.steps_per_epoch", "1"]
        train += ["--unlabelled.root", str(acdc_root), "--unlabelled.split", "unlabelled_25"]
        assert main([*common, *train, "--out", str(tmp_path / "train")]) == 0
        weights = tmp_path / "train" / "weights.safetensors"
        assert capsys.readouterr().out == f"{weights}\n"
        predict = ["--data.split", "test", "--predict", str(weights), "--change.vote", "1"]
        assert main([*common, *predict, "--out", str(tmp_path / "masks")]) == 0
        assert len(list((tmp_path / "masks").glob("*.png"))) == 4
        assert json.loads((tmp_path / "masks" / "pass.json").read_text())["config"]["change"] == {"vote": 1}

    def test_volumes_by_hand(self, acdc_root, tmp_path):
        """The truth with one class wiped out in one volume: Dice 0 there, and no surface to measure from."""
        truth, test = acdc_root / "SegmentationClass", Data(root=str(acdc_root), split="test")
        ids = open_data(test).ids
        for image_id in ids:
            label = read_label_png(truth / f"{image_id}.png")
            write_label_png(tmp_path / f"{image_id}.png", label.masked_fill((label == 2) & ("_ed_" in image_id), 0))
        scores = evaluate(test, tmp_path, volumes=acdc_root / "volumes.csv")["volumes"]
        assert scores["dice"]["myocardium"] == 0.5
        assert scores["missed"] == {"rv": 0, "myocardium": 1, "lv": 0}
        assert scores["hd95"] == {"rv": 0, "myocardium": 0, "lv": 0}
        name = next(name for name in scores["of"] if name.endswith("_ed"))
        assert scores["of"][name] == {"dice": [1, 0, 1], "slice_dice": [1, 0, 1], "hd95": [0, None, 0]}

    def test_mistakes_are_named(self, acdc_root, cams, data, tmp_path):
        test = Data(root=str(acdc_root), split="test")
        truth, csv_file = acdc_root / "SegmentationClass", tmp_path / "volumes.csv"
        csv_file.write_text("image,volume,slice,spacing_z,spacing_y,spacing_x\na,b,0,1,1,1\n")
        with pytest.raises(FastcamError, match=r"volumes .*volumes.csv do not name image patient"):
            evaluate(test, truth, tmp_path, volumes=csv_file)
        csv_file.write_text("image,volume,slice,spacing_z,spacing_y,spacing_x\na,b,0,0,1,1\n")
        with pytest.raises(
            FastcamError, match=r"volumes.csv, line 2: expected image,volume,slice,.* positive spacings"
        ):
            evaluate(test, truth, tmp_path, volumes=csv_file)
        with pytest.raises(FastcamError, match=r"volumes .*none.csv do not read: No such file"):
            evaluate(test, truth, tmp_path, volumes=tmp_path / "none.csv")
        with pytest.raises(FastcamError, match=r"volumes .* are for labels, and .* holds other files; leave it out"):
            evaluate(data, cams, tmp_path, volumes=csv_file)

    def test_another_seed_in_the_same_folder_is_refused(self, acdc_root, shared_data):
        with pytest.raises(FastcamError, match=r"was made with another configuration"):
            acdc(shared_data / "medical" / "acdc", acdc_root, seed=5)
