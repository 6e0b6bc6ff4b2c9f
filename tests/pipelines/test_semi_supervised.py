"""Training on labelled and unlabelled images, and ACDC's slices through the passes."""

import dataclasses

import pytest
import torch
from pipelines.tiny import CLASSES, TRAINER

from fastcam.data import VOCDataset
from fastcam.errors import FastcamError
from fastcam.io import write_label_png
from fastcam.pipelines._data import open_data
from fastcam.pipelines._fit import Seeded
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
