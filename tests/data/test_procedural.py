import csv
import hashlib

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from fastcam.data import PROCEDURAL_CLASSES, VOCDataset, load_class_list, write_procedural


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("procedural")
    write_procedural(root, train=60, val=12, seed=0, size=96)
    return root


@pytest.fixture(scope="module")
def dataset(root):
    return VOCDataset(root, "train", classes=load_class_list(root / "classes.txt"))


def test_layout_reads_as_voc(root, dataset):
    assert dataset.classes == PROCEDURAL_CLASSES and len(dataset) == 60
    assert len(VOCDataset(root, "val", classes=PROCEDURAL_CLASSES)) == 12
    item = dataset[3]
    assert item["image"].shape == (3, 96, 96) and item["mask"].shape == (96, 96)
    with Image.open(root / "SegmentationClass/train_0003.png") as mask:
        assert mask.mode == "P"


def test_tags_of_the_csv_are_those_of_the_masks(root, dataset):
    listed = VOCDataset(root, "train", classes=PROCEDURAL_CLASSES, tags="image_labels.csv")
    assert torch.equal(listed.tags, dataset.tags)
    with (root / "image_labels.csv").open() as file:
        assert next(csv.reader(file))[:4] == ["id", "split", "width_original", "height_original"]


def test_counts_have_a_long_tail_and_no_class_is_missing(root, dataset):
    counts = dict(zip(PROCEDURAL_CLASSES, dataset.tags.sum(0).tolist(), strict=True))
    assert min(counts.values()) >= 1
    for head, tail in (("fox", "lion"), ("sheep", "goat"), ("elephant", "mouse")):
        assert counts[head] > 1.5 * counts[tail]
    assert set(dataset.tags.sum(1).tolist()) == {1, 2, 3}
    assert VOCDataset(root, "val", classes=PROCEDURAL_CLASSES).tags.sum(0).min() >= 1


def test_every_object_has_a_border_of_255_that_is_thin(dataset):
    for item in dataset:
        mask = item["mask"].numpy()
        assert set(np.unique(mask)) <= {0, *range(1, 7), 255}
        for label in np.unique(mask[(mask > 0) & (mask < 255)]):
            around = ndimage.binary_dilation(mask == label) & (mask != label)
            assert (mask[around] == 255).all()
        assert not ndimage.binary_erosion(mask == 255, np.ones((7, 7))).any()
        assert 0.01 < ((mask > 0) & (mask < 255)).mean() < 0.7


def test_image_depends_on_seed_and_index_only(root, tmp_path):
    def digest(folder, name):
        files = folder / f"JPEGImages/{name}.jpg", folder / f"SegmentationClass/{name}.png"
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]

    write_procedural(tmp_path / "few", train=2, val=1, seed=0, size=96)
    write_procedural(tmp_path / "other", train=2, val=1, seed=1, size=96)
    for name in ("train_0001", "val_0000"):
        assert digest(tmp_path / "few", name) == digest(root, name) != digest(tmp_path / "other", name)


def test_a_pair_shares_its_body_but_not_its_head(root, dataset):
    """Mean colour of fox and lion is near, that of fox and elephant is far: tags alone leave the body ambiguous."""
    colours = {}
    for k in (0, 1, 4):
        pixels = [item["image"][:, item["mask"] == k + 1].float() for item in dataset if item["tags"][k]]
        colours[k] = torch.cat(pixels, 1).median(1).values
    assert (colours[0] - colours[1]).norm() < 0.5 * (colours[0] - colours[4]).norm()


def test_bad_arguments():
    with pytest.raises(ValueError, match="write_procedural: expected size >= 32"):
        write_procedural("unused", size=16)
