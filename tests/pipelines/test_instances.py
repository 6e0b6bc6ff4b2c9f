"""make-cam --instances and the scores of objects."""

import json

import pytest
import torch
from PIL import Image
from pipelines.tiny import CLASSES, TRAINER, files

from fastcam.errors import FastcamError
from fastcam.io import Instances, load_instances, read_label_png, save_instances
from fastcam.pipelines._data import Data
from fastcam.pipelines.evaluate import evaluate, table, true_objects
from fastcam.pipelines.make_cam import make_cam
from fastcam.pipelines.train import train

PRM = {"name": "prm", "backbone": "resnet10t", "sub_pixel": 2, "side": 48, "peak_threshold": -100.0, "lr": 0.001}


@pytest.fixture(scope="module")
def prm(data, tmp_path_factory):
    """Weights of PRM after two epochs."""
    return train(data, PRM, TRAINER, tmp_path_factory.mktemp("prm"))


@pytest.fixture
def val(root):
    return Data(root=str(root), split="val", tags="image_labels.csv")


def numbered(root, folder, ids):
    """Numbers of objects as PNGs: every class of an image is one object."""
    folder.mkdir()
    for image_id in ids:
        labels = read_label_png(root / "SegmentationClass" / f"{image_id}.png")
        Image.fromarray(labels.numpy()).save(folder / f"{image_id}.png")


def test_one_command_writes_cams_and_objects_and_a_second_call_nothing(val, prm, tmp_path):
    found = tmp_path / "objects"
    result = make_cam(val, prm, tmp_path / "cams", scales=(1.0,), instances=found)
    assert result.written == 4
    assert files(found) == {f"val_{i:04d}.json" for i in range(4)}
    objects = [load_instances(found / name) for name in sorted(files(found))]
    assert sum(len(one.masks) for one in objects) > 0
    assert all(one.masks.shape[1:] == (48, 48) for one in objects)
    assert make_cam(val, prm, tmp_path / "cams", scales=(1.0,), instances=found).written == 0
    with pytest.raises(FastcamError, match="another configuration"):
        make_cam(val, prm, tmp_path / "cams", scales=(1.0,), instances=found, proposals=found)


def test_given_proposals_are_resized_and_are_all_that_is_found(val, prm, tmp_path):
    masks = torch.zeros(2, 24, 24, dtype=torch.bool)
    masks[0, :12], masks[1, :, :12] = True, True
    for i in range(4):
        given = Instances(masks, torch.zeros(2, dtype=torch.int64), torch.ones(2))
        save_instances(tmp_path / "given" / f"val_{i:04d}.json", f"val_{i:04d}", given)
    make_cam(val, prm, tmp_path / "cams", scales=(1.0,), instances=tmp_path / "objects", proposals=tmp_path / "given")
    halves = masks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    for i in range(4):
        found = load_instances(tmp_path / "objects" / f"val_{i:04d}.json").masks
        assert all((mask == halves).flatten(1).all(1).any() for mask in found)


def test_settings_that_do_not_belong_together_are_refused(val, prm, weights, tmp_path):
    with pytest.raises(FastcamError, match="instances are for methods that find objects, and cam does not"):
        make_cam(val, weights, tmp_path / "a", instances=tmp_path / "b")
    with pytest.raises(FastcamError, match="proposals are for instances"):
        make_cam(val, prm, tmp_path / "a", proposals=tmp_path / "b")
    with pytest.raises(FastcamError, match=r"instances .*val_0000.json do not exist"):
        make_cam(val, prm, tmp_path / "a", instances=tmp_path / "b", proposals=tmp_path / "c")


def test_true_objects_score_100_and_the_scores_are_written(val, root, tmp_path):
    ids = [f"val_{i:04d}" for i in range(4)]
    numbered(root, tmp_path / "numbers", ids)
    for image_id in ids:
        labels = read_label_png(root / "SegmentationClass" / f"{image_id}.png")
        masks, classes = true_objects(labels, labels)
        assert classes.tolist() == [k - 1 for k in labels.unique().tolist() if k not in (0, 255)]
        found = Instances(masks, classes, torch.rand(len(masks)))
        save_instances(tmp_path / "found" / f"{image_id}.json", image_id, found)
    scores = evaluate(Data(root=val.root, split="val"), tmp_path / "found", objects=tmp_path / "numbers")
    assert scores["mean_ap"] == [1.0, 1.0, 1.0]
    assert scores["mean_best_overlap"] == 1
    assert sum(scores["objects"].values()) > 0
    assert json.loads((tmp_path / "found" / "scores.json").read_text()) == scores
    lines = table(scores).splitlines()
    assert lines[0].split() == ["class", "AP", "0.25", "AP", "0.5", "AP", "0.75", "ABO", "objects"]
    assert [line.split()[0] for line in lines[1:-2]] == CLASSES


def test_an_object_has_the_commonest_label_of_its_pixels():
    labels = torch.tensor([[2, 2, 255, 1], [0, 0, 0, 1], [255, 255, 3, 3]], dtype=torch.uint8)
    numbers = torch.tensor([[1, 1, 1, 1], [2, 2, 2, 2], [5, 5, 255, 0]], dtype=torch.uint8)
    masks, classes = true_objects(labels, numbers)
    assert classes.tolist() == [1]  # the second object is mostly background, the third is ignored
    assert torch.equal(masks[0], numbers == 1)


def test_labels_of_other_classes_and_numbers_of_another_size_are_refused(val, root, tmp_path):
    numbered(root, tmp_path / "numbers", ["val_0000"])
    (tmp_path / "list.txt").write_text("val_0000\n")
    data, numbers = Data(root=val.root, split=str(tmp_path / "list.txt")), tmp_path / "numbers"
    whole = torch.ones(1, 48, 48, dtype=torch.bool)
    wrong = Instances(whole, torch.tensor([90]), torch.ones(1))
    save_instances(tmp_path / "found" / "val_0000.json", "val_0000", wrong)
    with pytest.raises(FastcamError, match="has label 91, expected 1 to"):
        evaluate(data, tmp_path / "found", objects=numbers)
    save_instances(tmp_path / "found" / "val_0000.json", "val_0000", Instances(whole, torch.tensor([0]), torch.ones(1)))
    Image.new("L", (5, 5)).save(tmp_path / "numbers" / "val_0000.png")
    with pytest.raises(FastcamError, match="are 5 x 5 pixels, their mask is not"):
        evaluate(data, tmp_path / "found", objects=numbers)
